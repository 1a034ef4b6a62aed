"""A vision tower alone: every block, the features, resized position tables, gradients (cases `eva_vit`, `clip_vit`)."""

import re

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ... import config
from ...convert import lavis
from ...models import blip2
from ...models.vit import Vit, resize_positions
from ...rules import flatten
from ...typing import Array, Params
from . import sizes
from .case import Case, gradients_of, named, params_of
from .collect import plan
from .comparison import Arrays, Work

_RESIZED = re.compile(r'pos_interp_(\d+)x(\d+)')
GRADS = 'grads.safetensors'


def work(case: Case) -> Work:
    """Return what there is to do; raises UserError when sizes and weights do not fit."""
    c = sizes.vit(case)
    table = lavis.vit(c)
    params = params_of(case, table, blip2.shapes(config.Blip2Config(vit=c, qformer=None, lm=None)))
    case.array('pixels')
    inputs = {name: case.arrays[name] for name in ('pixels', 'loss_weight') if name in case.arrays}
    resized = {name: x.shape for name, x in case.arrays.items() if _RESIZED.fullmatch(name)}

    def function(params: Params, x: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
        tables = {name: _resized(c, params, name).reshape(shape) for name, shape in resized.items()}
        return _forward(c, params, x, dtype) | tables | _loss(c, params, x, dtype, gradients)

    return plan(case, params, inputs, function, gradients_of(case, GRADS, table))


def _forward(c: config.VitConfig, params: Params, x: Arrays, dtype: DTypeLike) -> Arrays:
    def run(tower: Vit) -> Arrays:
        out = tower(x['pixels'])
        patches = tower.patch_projection(x['pixels'].astype(dtype))
        return {
            'patch_embed': patches.reshape(len(patches), -1, c.width),
            'ln_pre': out.embedded,
            'block_outputs': jnp.stack(out.hidden_states),
            'features': out.features,
        }

    return Vit(c, dtype).apply({'params': params['vit']}, method=run)


def _resized(c: config.VitConfig, params: Params, name: str) -> Array:
    grid = tuple(map(int, _RESIZED.fullmatch(name).groups()))
    return resize_positions(params['vit']['position_embedding'], grid, c.position_resize)


def _loss(c: config.VitConfig, params: Params, x: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
    """Return sum(loss_weight * features) and its gradients if asked, where the case has weights for it."""
    if 'loss_weight' not in x:
        return {}

    def loss(params: Params) -> Array:
        features = Vit(c, dtype).apply({'params': params['vit']}, x['pixels']).features
        return (features * x['loss_weight']).sum()

    if not gradients:
        return {'loss': loss(params)}
    value, found = jax.value_and_grad(loss)(params)
    return {'loss': value} | {named(GRADS, path): g for path, g in flatten(found).items()}
