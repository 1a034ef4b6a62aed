"""Stage 1 with recorded negatives: every intermediate, losses, gradients (cases `stage1`, `stage1_clip`)."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ... import config
from ...convert import lavis
from ...models import blip2
from ...objectives import contrastive, matching
from ...rules import flatten
from ...training.loss_context import LossContext
from ...training.stage1_forward import Alignment, align
from ...typing import Array, Params
from . import sizes, texts
from .case import Case, gradients_of, named, params_of
from .collect import plan
from .comparison import Arrays, Work

INPUTS = ('pixels', 'input_ids', 'attention_mask', 'neg_image_idx', 'neg_text_idx')
GRADIENTS = {
    'grads.safetensors': 'local',
    'grads_vit.safetensors': 'local',  # recorded apart, since LAVIS freezes the tower by default
    'grads_gather_with_grad.safetensors': 'global',
}
"""File -> which side of ITC has a gradient there."""
IGNORED = -100  # LAVIS's label of what does not count


def model_of(case: Case) -> config.Blip2Config:
    """Return the configuration of a stage-1 model."""
    return config.Blip2Config(sizes.vit(case, 'vit'), sizes.qformer(case, 'full'), None)


def work(case: Case) -> Work:
    """Return what there is to do; raises UserError when sizes and weights do not fit."""
    c = model_of(case)
    table = lavis.blip2(c)
    recorded_gradients = {}
    for file in GRADIENTS:
        recorded_gradients |= gradients_of(case, file, table)
    tokenizer = texts.bert(case)
    modes = sorted({GRADIENTS[name.partition(':')[0]] for name in recorded_gradients})

    def function(params: Params, x: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
        ids = texts.recomputed(tokenizer, case, '', case.meta.get('texts', []))
        wanted = modes if gradients else []
        out = ids if 'local' in wanted else ids | forward(c, params, x, dtype, 'local')
        for mode in wanted:
            found, values = _gradients(c, params, x, dtype, mode)
            files = [file for file in GRADIENTS if GRADIENTS[file] == mode]
            out = out | values | {named(file, path): g for file in files for path, g in found.items()}
        return out

    inputs = {name: case.array(name) for name in INPUTS}
    return plan(case, params_of(case, table, blip2.shapes(c)), inputs, function, recorded_gradients)


def _gradients(c: config.Blip2Config, params: Params, x: Arrays, dtype: DTypeLike, mode: str) -> tuple[Arrays, Arrays]:
    """Return the gradients by path, and all that `forward` gives."""

    def loss(params: Params) -> tuple[Array, Arrays]:
        out = forward(c, params, x, dtype, mode)
        return out['loss'], out

    gradients, out = jax.grad(loss, has_aux=True)(params)
    return flatten(gradients), out


def batch_of(x: Arrays) -> Arrays:
    """Return the recorded inputs as a batch; LAVIS takes every pair for a picture and a text of its own."""
    ids = jnp.arange(x['input_ids'].shape[0])
    return {'text': x['input_ids'], 'text_mask': x['attention_mask'].astype(bool), 'image_id': ids}


def run(model: blip2.Blip2Module, x: Arrays, mode: str, shards: int = 1) -> tuple[Array, Alignment]:
    """Return the features, and what the four passes give with the recorded negatives."""
    features = model.vit(x['pixels']).features
    valid = jnp.ones(x['neg_image_idx'].shape, bool)
    negatives = matching.Negatives(x['neg_image_idx'], x['neg_text_idx'], valid, valid)
    objective = config.Objective(positives='diagonal', gather_grad=mode)
    image_features = features, jnp.ones(features.shape[:2], bool)
    key = jax.random.key(0)  # of a draw that does not take place
    context = LossContext(key, objective, shards=shards, negatives=negatives)
    return features, align(model, *image_features, batch_of(x), context)


def forward(c: config.Blip2Config, params: Params, x: Arrays, dtype: DTypeLike, mode: str) -> Arrays:
    """Return everything but gradients by its recorded name."""

    def named_arrays(model: blip2.Blip2Module) -> Arrays:
        features, out = run(model, x, mode)
        return {'image_embeds': model.qformer.feature_norm(features)} | _passes(out) | _itc(out, x) | _losses(out, x)

    return blip2.Blip2Module(c, dtype).apply({'params': params}, method=named_arrays)


def _passes(out: Alignment) -> Arrays:
    return {
        'query_output': out.queries,
        'text_output': out.text,
        'image_feats': out.image_embedding.vectors,
        'text_feat': out.text_embedding,
        'itm_hidden': out.itm.hidden,
        'itm_logits': out.itm.logits,
        'itm_labels': out.itm.matched,
        'lm_logits': out.itg.logits,
    }


def _itc(out: Alignment, x: Arrays) -> Arrays:
    positive = contrastive.positives(x['input_ids'], batch_of(x)['image_id'], 'diagonal')
    return {
        'sim_i2t': out.itc.image_to_text,
        'sim_t2i': out.itc.text_to_image,
        'itc_targets': positive.argmax(axis=1),
        'weights_i2t': matching.weights(out.itc.image_to_text, positive),
        'weights_t2i': matching.weights(out.itc.text_to_image, positive),
    }


def _losses(out: Alignment, x: Arrays) -> Arrays:
    counts = x['attention_mask'][:, 1:].astype(bool)
    return {
        'lm_labels_shifted': jnp.where(counts, out.itg.text[:, 1:], IGNORED),
        'loss_i2t': out.itc.image_losses.mean(),
        'loss_t2i': out.itc.text_losses.mean(),
        'loss_itc': out.itc.loss,
        'loss_itm': out.itm.loss,
        'loss_lm': out.itg.loss,
        'loss': out.itc.loss + out.itm.loss + out.itg.loss,
    }
