"""Biases of keys, compared by the keys that they give.

Softmax does not see what is added to every score of a row, and a key's bias adds the same to all of them. So no result
depends on such a bias, and its gradient is zero, recorded as rounding noise. What can be compared is the projection
itself: fixed inputs through the recorded weight and bias, by LAVIS's names, against our layer.
"""

import re

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ...models.layers import Attention
from ...rules import flatten
from ...typing import Params
from .comparison import Arrays

ROWS = 3  # inputs that are projected

_PLACES = (
    (r'Qformer\.bert\.encoder\.layer\.(\d+)\.attention\.self\.key\.', r'qformer/layer_\1/self_attention'),
    (r'Qformer\.bert\.encoder\.layer\.(\d+)\.crossattention\.self\.key\.', r'qformer/layer_\1/cross_attention'),
    (r'opt_model\.model\.decoder\.layers\.(\d+)\.self_attn\.k_proj\.', r'lm/layer_\1/attention'),
    (r'(?:visual_encoder\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_', r'vit/layer_\1/attention'),
)
"""LAVIS's name of a key's projection up to `weight` or `bias`, and our attention layer."""


def recorded(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `keys of PATH` -> [rows, width] for every key's projection with a bias in a state dict."""
    out = {}
    for name, bias in state.items():
        for key, path in _PLACES:
            found = re.fullmatch(key + 'bias', name)
            if found:
                weight = state[name.removesuffix('bias') + 'weight']
                if 'in_proj' in name:  # query, key and value in one
                    weight, bias = np.split(weight, 3)[1], np.split(bias, 3)[1]
                x = _inputs(weight.shape[1]).astype(np.float64)
                out[f'keys of {found.expand(path)}'] = (x @ weight.T.astype(np.float64) + bias).astype(np.float32)
    return out


def computed(params: Params, dtype: DTypeLike) -> Arrays:
    """Return the same from our layers."""
    flat = flatten(params)
    out = {}
    for path in flat:
        layer, found, _ = path.partition('/key/bias')
        if found:
            own = {part: flat[f'{layer}/key/{part}'] for part in ('kernel', 'bias')}
            width, x = own['bias'].shape[0], _inputs(own['kernel'].shape[0])
            attention = Attention(width, heads=1, dtype=dtype)
            variables = {'params': {'key': own}}
            out[f'keys of {layer}'] = attention.apply(variables, jnp.asarray(x, dtype), method=lambda a, x: a.key(x))
    return out


def _inputs(width: int) -> np.ndarray:
    return np.random.default_rng(width).normal(size=(ROWS, width)).astype(np.float32)
