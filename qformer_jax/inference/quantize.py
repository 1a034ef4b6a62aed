"""Frozen towers in fewer bits, for use: which parameter gets how many, and what each lost.

Small are the products of the towers, which are nearly all of a model's bytes, and the token table. The Q-Former and
its projection are a twentieth of them, and everything that the language model knows of a picture passes through: they
stay as they are, as do norms, biases, positions and the first projection of the pixels.
"""

from collections.abc import Iterable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from ..config import BETWEEN
from ..errors import UserError
from ..models import quantized
from ..models.quantized import Quantized
from ..rules import match, unflatten
from ..typing import Array, Params

Weights = Literal['int8', 'int4', 'bfloat16', 'float16']

_OURS = (rf'({"|".join(BETWEEN)}|gates|word_head)/.*', None)
_REST = (r'(vit|lm)/.*', None)
RULES: dict[Weights, tuple[tuple[str, Weights | None], ...]] = {
    'int8': (_OURS, (r'vit/patch_projection/.*', None), (r'(vit|lm)/.*/kernel|lm/word_embedding', 'int8'), _REST),
    'int4': (
        _OURS,
        (r'vit/patch_projection/.*', None),
        (r'lm/(word_embedding|lm_head/kernel)', 'int8'),  # an error here moves the choice of the word itself
        (r'(vit|lm)/.*/kernel', 'int4'),
        _REST,
    ),
    'bfloat16': (_OURS, (r'(vit|lm)/.*', 'bfloat16')),
    'float16': (_OURS, (r'(vit|lm)/.*', 'float16')),
}
"""Kind of weights -> ordered rules over parameter paths; None: as it is."""


@partial(jax.jit, static_argnames=('kind', 'transposed'))
def smaller(array: Array, kind: Weights, *, transposed: bool) -> Array | Quantized:
    """Return a parameter in fewer bits; the rows of a kernel are its outputs, so it is transposed."""
    if kind in ('bfloat16', 'float16'):
        return array.astype(kind)
    return quantized.quantize(array.T if transposed else array, 8 if kind == 'int8' else 4)


def on_device(tensors: Iterable[tuple[str, Array | Quantized]], weights: Weights | None) -> Params:
    """Return parameters by path as a nested dict on the device, in fewer bits by `RULES[weights]` (None: as they are).

    They are taken one at a time, so the device never holds more than one of them as it was. Raises UserError for
    weights that are quantized already, and for numbers that the kind cannot hold.
    """
    return unflatten({path: _placed(path, array, weights) for path, array in tensors})


def _placed(path: str, array: Array | Quantized, weights: Weights | None) -> Array | Quantized:
    kind = match(RULES[weights], [path])[path] if weights else None
    if weights and isinstance(array, Quantized):
        raise UserError(f"'{path}' is quantized already: take the run that these weights were made from")
    if kind is None:
        return jax.device_put(array)
    if kind == 'int4' and array.shape[0] % 2:
        raise UserError(f"'{path}' has {array.shape[0]} inputs, and 4 bits need an even number: take int8")
    small = smaller(jnp.asarray(array), kind, transposed=is_kernel(path))
    floats = [x for x in jax.tree.leaves(small) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not all(bool(jnp.isfinite(x).all()) for x in floats):
        raise UserError(f"'{path}' holds numbers that {kind} cannot: infinite ones, or too large")
    return small


def is_kernel(path: str) -> bool:
    """Return whether a parameter is [in, out], so that its rows are columns."""
    return path.endswith('/kernel')


def size(params: Params) -> int:
    """Return the bytes of parameters, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def error(path: str, before: Array, after: Array | Quantized) -> float:
    """Return the root mean square of what a parameter lost, relative to its own."""
    wide = jnp.asarray(before, jnp.float32)
    if isinstance(after, Quantized):
        lost = after.dequantize(jnp.float32) - (wide.T if is_kernel(path) else wide)
    else:
        lost = after.astype(jnp.float32) - wide
    return float(jnp.sqrt(jnp.square(lost).sum() / jnp.maximum(jnp.square(wide).sum(), jnp.finfo(jnp.float32).tiny)))
