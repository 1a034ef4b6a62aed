"""Stage 1 over several processes: our one global batch, cut into what each process recorded (case `stage1_world2`).

Weights, pictures and texts are a neighbouring case's; process r has the r-th slice of its pairs. LAVIS gathers the
features of all processes, so similarities are rows of one matrix and negatives have global numbers. Its training
averages the processes' gradients; ours has one gradient of one loss, which must equal that average.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ... import config
from ...convert import lavis
from ...models import blip2
from ...models.layers import layer_norm
from ...objectives import captioning, contrastive, matching
from ...rules import flatten
from ...training.stage1_forward import Alignment
from ...typing import Array, Float, Params
from . import stage1
from .case import Case, gradients_of, named, params_of
from .collect import plan
from .comparison import Arrays, Work

MEAN, OWN = 'grads_mean.safetensors', 'grads_ranks.safetensors'
LOSSES = ('loss_itc', 'loss_itm', 'loss_lm', 'loss')
FEATURE_NORM = 'qformer/feature_norm/'


def work(case: Case) -> Work:
    """Return what there is to do; raises UserError when sizes and weights do not fit."""
    c, ranks = stage1.model_of(case), len({name for name in case.arrays if re.match(r'rank\d+\.loss$', name)})
    table = lavis.blip2(c)
    drawn = {name: _joined(case, name, ranks) for name in ('neg_image_idx', 'neg_text_idx')}
    pairs = drawn['neg_image_idx'].shape[0]
    inputs = {name: case.home.array(name)[:pairs] for name in ('pixels', 'input_ids', 'attention_mask')} | drawn
    means = {_mean(name): np.asarray(_stacked(case, name, ranks).mean()) for name in LOSSES}

    def function(params: Params, x: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
        found = _forward(c, params, x, dtype, ranks)
        return found | _gradients(c, params, x, dtype, ranks) if gradients else found

    return plan(
        case,
        params_of(case, table, blip2.shapes(c)),
        inputs,
        function,
        gradients_of(case, MEAN, table) | gradients_of(case, OWN, table, ranks),
        dict.fromkeys((f'rank{r}.{name}' for r in range(ranks) for name in drawn), 'input'),
        means,
    )


def _stacked(case: Case, name: str, ranks: int) -> np.ndarray:
    return np.stack([case.array(f'rank{rank}.{name}') for rank in range(ranks)])


def _joined(case: Case, name: str, ranks: int) -> np.ndarray:
    return np.concatenate([case.array(f'rank{rank}.{name}') for rank in range(ranks)])


def _mean(name: str) -> str:
    return f'mean of rank*.{name}'


def _forward(c: config.Blip2Config, params: Params, x: Arrays, dtype: DTypeLike, ranks: int) -> Arrays:
    """Return each process's rows of our arrays, its losses, and the loss of the whole batch."""

    def run(model: blip2.Blip2Module) -> Arrays:
        _, out = stage1.run(model, x, 'local', ranks)
        means = dict(zip(LOSSES, (out.itc.loss, out.itm.loss, out.itg.loss), strict=False))
        means['loss'] = out.itc.loss + out.itm.loss + out.itg.loss
        found = {_mean(name): value for name, value in means.items()}
        for rank in range(ranks):
            own = _rows(out, x, ranks, rank) | _losses(out, x, ranks, rank)
            found |= {f'rank{rank}.{name}': value for name, value in own.items()}
        return found

    return blip2.Blip2Module(c, dtype).apply({'params': params}, method=run)


def _slice(x: Array, ranks: int, rank: int) -> Array:
    """Return the rows of process `rank`."""
    return x.reshape(ranks, -1, *x.shape[1:])[rank]


def _itm_slice(x: Array, ranks: int, rank: int) -> Array:
    """Return the ITM rows of process `rank`, in its order: its matches, its wrong pictures, its wrong texts."""
    return x.reshape(3, ranks, -1, *x.shape[1:])[:, rank].reshape(-1, *x.shape[1:])


def _rows(out: Alignment, x: Arrays, ranks: int, rank: int) -> Arrays:
    positive = contrastive.positives(x['input_ids'], stage1.batch_of(x)['image_id'], 'diagonal')
    whole = {
        'sim_i2t': out.itc.image_to_text,
        'sim_t2i': out.itc.text_to_image,
        'itc_targets': positive.argmax(axis=1),
        'weights_i2t': matching.weights(out.itc.image_to_text, positive),
        'weights_t2i': matching.weights(out.itc.text_to_image, positive),
    }
    rows = {name: _slice(value, ranks, rank) for name, value in whole.items()}
    return rows | {'itm_logits': _itm_slice(out.itm.logits, ranks, rank)}


def _losses(out: Alignment, x: Arrays, ranks: int, rank: int) -> Arrays:
    """Return the losses over the rows of process `rank` alone."""
    itc = (_slice(out.itc.image_losses, ranks, rank).mean() + _slice(out.itc.text_losses, ranks, rank).mean()) / 2
    logits, matched = (_itm_slice(rows, ranks, rank) for rows in (out.itm.logits, out.itm.matched))
    itm, _ = matching.itm(logits, matched, jnp.ones(matched.shape, bool))
    words, text, valid = (_slice(rows, ranks, rank) for rows in (out.itg.logits, out.itg.text, x['attention_mask']))
    token_losses = captioning.token_losses(words[:, :-1], text[:, 1:], config.Objective().label_smoothing)
    itg = captioning.token_mean(token_losses, valid[:, 1:].astype(bool))
    return dict(zip(LOSSES, (itc, itm, itg, itc + itm + itg), strict=True))


def _gradients(c: config.Blip2Config, params: Params, x: Arrays, dtype: DTypeLike, ranks: int) -> Arrays:
    """Return the gradient of our loss, and each process's own.

    A process's own gradient is that of its own loss, but for the norm on the features: wrong pictures come normalised
    from other processes, and LAVIS sends their gradient back to where they came from. There the norm collects, over its
    own pictures, what the losses of all processes say.
    """
    whole = jax.grad(lambda p: _forward(c, p, x, dtype, ranks)[_mean('loss')])(params)
    found = {named(MEAN, path): g for path, g in flatten(whole).items()}

    def losses(params: Params, nudge: Array) -> Float['R']:
        with nn.intercept_methods(_nudging(nudge)):
            out = _forward(c, params, x, dtype, ranks)
        return jnp.stack([out[f'rank{rank}.loss'] for rank in range(ranks)])

    features = blip2.Blip2Module(c, dtype).apply(
        {'params': params}, method=lambda model: model.vit(x['pixels']).features
    )
    value, pull = jax.vjp(losses, params, jnp.zeros_like(features))
    own, perturbation = jax.vmap(pull)(jnp.eye(ranks, dtype=value.dtype))
    feature_norm = layer_norm(c.qformer.feature_norm_eps, dtype)
    _, pull_norm = jax.vjp(lambda p: feature_norm.apply({'params': p}, features), params['qformer']['feature_norm'])
    for rank in range(ranks):
        mine = jnp.arange(features.shape[0]).reshape(-1, 1, 1) // (features.shape[0] // ranks) == rank
        (norm,) = pull_norm(jnp.where(mine, perturbation.sum(axis=0), 0))
        flat = {path: g[rank] for path, g in flatten(own).items()} | {
            FEATURE_NORM + part: g for part, g in norm.items()
        }
        found |= {named(OWN, f'rank{rank}.{path}'): g for path, g in flat.items()}
    return found


def _nudging(nudge: Array):
    """Return the interceptor that adds `nudge` to what the norm on the features gives."""

    def intercept(following, args, kwargs, context):
        out = following(*args, **kwargs)
        return out + nudge if context.module.name == 'feature_norm' else out

    return intercept
