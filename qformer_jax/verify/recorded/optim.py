"""Training (case `optim`): which tensors decay, learning rates by step, and some AdamW steps on stage 1's batch."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from ... import config, presets
from ...convert import lavis
from ...convert.lazy_tensors import in_memory
from ...convert.table import Row, Table, row_of, to_jax
from ...errors import UserError
from ...models import blip2
from ...objectives.matching import Negatives
from ...rules import flatten, match, merge, split
from ...training import losses, optimizer
from ...training.loss_context import LossContext
from ...typing import Array, Params
from . import stage1
from .case import Case, params_of
from .collect import KEY_BIAS, plan
from .comparison import Arrays, Work

GROUPS, RATES, AFTER = 'groups.json', 'lr.json', 'parameters after the steps'
TABLES = tuple(
    lavis.blip2(config.Blip2Config(vit, config.QformerConfig(), lm))
    for vit, lm in ((presets.VIT_G, config.OptConfig()), (presets.VIT_L, config.T5Config()))
)
DRAWS = ('train.neg_image_idx', 'train.neg_text_idx')
LOSSES = {'train.loss': 'loss', 'train.loss_itc': 'itc', 'train.loss_itm': 'itm', 'train.loss_lm': 'itg'}
FROZEN = (('vit/.*', None), ('.*', 1.0))
_NUMBER = r'([\d.]+(?:e-?\d+)?)'
_SETTINGS = {
    'steps_per_epoch': rf'{_NUMBER} iterations per epoch',
    'epochs': rf'max_epoch={_NUMBER}',
    'peak_rate': rf'init_lr={_NUMBER}',
    'warmup_steps': rf'warmup {_NUMBER} from',
    'warmup_start': rf'warmup \S+ from {_NUMBER}',
    'final_rate': rf'min_lr {_NUMBER}',
    'weight_decay': rf'weight decay {_NUMBER}',
}
"""Settings of the recorded steps -> where the description of `train.loss` says them."""


def work(case: Case) -> Work:
    """Return what there is to do; raises UserError when sizes, weights or settings do not fit."""
    c = stage1.model_of(case)
    table, (o, steps) = lavis.blip2(c), _settings(case)
    decays, rates, after = _decays(case), _rates(case), _after(case, table)
    recorded_decays = {name: np.array(list(by_name.values()), np.int32) for name, by_name in decays.items()}

    def function(params: Params, x: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
        found = {
            name: jax.vmap(optimizer.schedule(*given))(jnp.arange(len(want))) for name, (given, want) in rates.items()
        }
        found |= {name: _jax_decay(list(by_name)) for name, by_name in decays.items()}
        found['train.lr'] = jax.vmap(optimizer.schedule(o, steps))(jnp.arange(x[DRAWS[0]].shape[0]))
        trained, reported = _train(blip2.Blip2Module(c, dtype), params, x, o, steps)
        return found | reported | {f'{AFTER}: {path}': tensor for path, tensor in flatten(trained).items()}

    inputs = {name: case.home.array(name) for name in ('pixels', 'input_ids', 'attention_mask')}
    inputs |= {name: case.array(name) for name in DRAWS}
    derived = recorded_decays | {name: want for name, (_, want) in rates.items()} | after
    left_out = dict.fromkeys((name for name in derived if name.endswith('/key/bias')), KEY_BIAS)
    left_out['groups.json: not_in_optimizer'] = 'what is frozen is for a run to say'
    derived = {name: want for name, want in derived.items() if name not in left_out}
    params = params_of(case, table, blip2.shapes(c))
    return plan(case, params, inputs, function, left_out=left_out, derived=derived)


def _train(
    model: blip2.Blip2Module, params: Params, x: Arrays, o: config.Optimizer, steps: int
) -> tuple[Params, Arrays]:
    """Return the trained parameters and the losses before each step, with the recorded draws."""
    trainable, frozen = split(params, FROZEN)
    constants = optimizer.Constants.of(o)
    adamw = optimizer.make(constants, trainable)
    features = model.apply({'params': params}, method=lambda m: m.vit(x['pixels']).features)
    valid = jnp.ones(features.shape[:1], bool)
    batch = stage1.batch_of(x) | {'features': features, 'feature_mask': jnp.ones(features.shape[:2], bool)}
    objective = config.Objective(positives='diagonal')

    def loss(trainable: Params, image: Array, text: Array) -> tuple[Array, Arrays]:
        def run(model: blip2.Blip2Module) -> tuple[Array, Arrays]:
            negatives = Negatives(image, text, valid, valid)
            return losses.stage1(model, batch, LossContext(jax.random.key(0), objective, negatives=negatives))

        return model.apply({'params': merge(trainable, frozen)}, method=run)

    def step(carry: tuple, drawn: tuple[Array, Array]) -> tuple[tuple, Arrays]:
        trainable, state = carry
        gradients, metrics = jax.grad(loss, has_aux=True)(trainable, *drawn)
        updates, state = adamw.update(gradients, state, trainable)
        return (optax.apply_updates(trainable, updates), state), metrics

    start = trainable, optimizer.init(constants, trainable, optimizer.rates(o, steps))
    (trained, _), metrics = jax.lax.scan(step, start, tuple(x[name] for name in DRAWS))
    return trained, {name: metrics[metric] for name, metric in LOSSES.items()}


def _json(case: Case, file: str) -> dict:
    try:
        return json.loads((case.folder / file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'{case.folder / file}: missing or damaged ({error})') from error


def _settings(case: Case) -> tuple[config.Optimizer, int]:
    """Return the optimizer of the recorded steps and the length of the whole run."""
    described = str(case.entry('arrays', 'train.loss', 'what'))
    found = {}
    for name, pattern in _SETTINGS.items():
        value = re.search(pattern, described)
        if not value:
            raise UserError(f"{case.folder}: the description of 'train.loss' in meta.json lacks '{pattern}'")
        found[name] = float(value[1])
    counts = {name: int(found[name]) for name in ('steps_per_epoch', 'warmup_steps')}
    epochs, adam = int(found.pop('epochs')), next(iter(_json(case, GROUPS).values()))
    betas = dict(zip(('beta1', 'beta2'), adam['betas'], strict=True))
    return config.Optimizer(schedule='lavis', **(found | counts | betas)), epochs * counts['steps_per_epoch']


def _rates(case: Case) -> dict[str, tuple[tuple[config.Optimizer, int], np.ndarray]]:
    """Return for each recorded schedule its settings, and the rates."""
    out = {}
    for name, said in _json(case, RATES).items():
        given, length = said['args'], said['iters_per_epoch']
        o = config.Optimizer(
            schedule='lavis',
            peak_rate=given['init_lr'],
            final_rate=given['min_lr'],
            warmup_steps=given.get('warmup_steps', 0),
            warmup_start=given.get('warmup_start_lr', given['init_lr']),
            steps_per_epoch=length,
        )
        out[f'{RATES}: {name}'] = (o, given['max_epoch'] * length), np.array(said['lr'])
    return out


def _decays(case: Case) -> dict[str, dict[str, int]]:
    """Return for each recorded model its tensors, and whether they decay."""
    return {
        f'{GROUPS}: {model}': {
            name: int(group['weight_decay'] > 0) for group in said['groups'] for name in group['names']
        }
        for model, said in _json(case, GROUPS).items()
    }


def _jax_decay(names: list[str]) -> Array:
    """Return which of a model's tensors decay by our rules; 2 where we have several parameters and they differ."""
    paths = [_paths(name) for name in names]
    every = [path for found in paths for path in found]
    decays = match(optimizer.decay_rules(every), every)
    said = [{int(decays[path]) for path in found} for found in paths]
    return jnp.array([found.pop() if len(found) == 1 else 2 for found in said], jnp.int32)


def _paths(key: str) -> list[str]:
    """Return our parameters in a tensor of LAVIS, whichever tower or language model it is of."""
    for table in TABLES:
        found = row_of(table, key)
        if found and isinstance(found[0], Row):
            return [path.format(**found[1]) for path in found[0].paths]
    raise UserError(f"{GROUPS}: no table has a row for '{key}'")


def _after(case: Case, table: Table) -> dict[str, np.ndarray]:
    """Return the parameters after the recorded steps; raises UserError when there is not one file of them."""
    files = sorted(case.folder.glob('params_after_*_steps.safetensors'))
    if len(files) != 1:
        raise UserError(f'{case.folder}: one file params_after_N_steps.safetensors is needed, not {len(files)}')
    tensors = to_jax(table, in_memory(case.tensors(files[0].name)))
    return {f'{AFTER}: {path}': tensor.read() for path, tensor in tensors.items()}
