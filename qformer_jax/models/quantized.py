"""Weights of 8 or 4 bits in place of an array of parameters, and products with them.

Only the weights are small: a product widens them as it reads them and computes in the precision of its input. 8 bits
have one scale a row, the largest entry / 127.5 (absmax, Dettmers et al. 2022, section 2.1; with 127.5 in place of 127
the largest is as far off as any other may be); 4 bits one for every 64 entries of a row, the largest / 7.5.

A row is what one output reads, so that a product with few rows is a sum along each: a kernel [I, O] lies as [O, I],
a token table [N, D] as it is.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from ..rules import flatten
from ..typing import Array, Float, Int, Params
from .lora import Adapted
from .vocab_extension import Extended

GROUP = 64  # entries of a row that share a scale, where they have 4 bits
# Up to so many rows a product reads the weights as they are; above, they are widened for a matrix product. Measured on
# an H100 (experiments/quantization): 8 bits cross between 1 row and 2, 4 bits at 5.
FEW_ROWS = 2


@struct.dataclass
class Quantized:
    """Rows of small integers in groups, each with a scale; the type of `values` tells 8 bits from 4."""

    values: Any
    """int8 [O, groups, I / groups]; or uint8 [O, groups, I / groups / 2], a group's first half in the low 4 bits."""
    scale: Any
    """float32 [O, groups]: the size of a step."""

    @property
    def bits(self) -> int:
        """Bits of an entry."""
        return 8 if self.values.dtype == jnp.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (O) and entries of each (I)."""
        return self.values.shape[0], math.prod(self.values.shape[1:]) * (8 // self.bits)

    def __getitem__(self, rows: Int['*R']) -> Float['*R I']:
        """Return the rows of these numbers (float32), as an array gives them."""
        taken = Quantized(self.values[rows], self.scale[rows])
        return taken.dequantize(jnp.float32)

    def dequantize(self, dtype: DTypeLike) -> Float['*R I']:
        """Return the rows as an array of floats."""
        entries = jnp.concatenate(_entries(self.values), axis=-1)
        wide = entries.astype(jnp.float32) * self.scale[..., None]
        return wide.reshape(*wide.shape[:-2], -1).astype(dtype)


def quantize(rows: Float['O I'], bits: Literal[8, 4]) -> Quantized:
    """Return the rows in steps of a scale: no entry moves by more than half a step.

    With 4 bits a group is 64 entries, or the largest power of two that divides a shorter row; I must be even.
    """
    group = rows.shape[1] if bits == 8 else math.gcd(rows.shape[1], GROUP)
    wide = jnp.asarray(rows, jnp.float32).reshape(rows.shape[0], -1, group)
    top = 2 ** (bits - 1) - 1
    step = jnp.abs(wide).max(axis=-1) / (top + 0.5)
    step = jnp.where(step == 0, 1, step)
    values = jnp.clip(jnp.round(wide / step[..., None]), -top - 1, top).astype(jnp.int8)
    if bits == 4:
        low, high = jnp.split(values, 2, axis=-1)
        values = jax.lax.bitcast_convert_type((low & 15) | (high << 4), jnp.uint8)
    return Quantized(values, step)


def to_flat(flat: dict[str, Array | Quantized]) -> dict[str, Array]:
    """Return parameters by path as arrays only, as they lie on the disk: `PATH/values` and `PATH/scale`."""
    held = {}
    for path, leaf in flat.items():
        if isinstance(leaf, Quantized):
            held |= {f'{path}/values': leaf.values, f'{path}/scale': leaf.scale}
        else:
            held[path] = leaf
    return held


def from_flat(flat: dict[str, Array]) -> dict[str, Array | Quantized]:
    """Undo `to_flat`."""
    paths = [path.removesuffix('/values') for path in flat if path.endswith('/values')]
    parts = {f'{path}/{name}' for path in paths for name in ('values', 'scale')}
    rest = {path: array for path, array in flat.items() if path not in parts}
    return rest | {path: Quantized(flat[f'{path}/values'], flat[f'{path}/scale']) for path in paths}


def any_in(params: Params) -> bool:
    """Return whether something of the parameters is quantized."""
    return any(isinstance(leaf, Quantized) for leaf in flatten(params).values())


def _entries(values: Array) -> list[Array]:
    """Return the entries of each group as int8, those of 4 bits in two halves."""
    if values.dtype == jnp.int8:
        return [values]
    pair = jax.lax.bitcast_convert_type(values, jnp.int8)
    return [(pair << 4) >> 4, pair >> 4]  # a shift to the right copies the sign


def quantized_matmul(x: Float['R I'], rows: Quantized) -> Float['R O']:
    """Return the products of each row of `x` with each row of weights, summed in float32 or wider.

    A matrix product would first write wide weights to memory, or at least wait for them; for a few rows of `x`, a
    multiply-and-add over the small ones as they stream in is faster.
    """
    # or else XLA widens the weights before a loop that decodes, once, and keeps them wide
    x, rows = jax.lax.optimization_barrier((x, rows))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if isinstance(x.shape[0], int) and x.shape[0] <= FEW_ROWS:  # an exported function has any number
        return jnp.stack([_sums(row.astype(wide), rows) for row in x])
    contract = (((1,), (1,)), ((), ()))
    if rows.bits == 4:
        return jax.lax.dot_general(x, rows.dequantize(x.dtype), contract, preferred_element_type=wide)
    whole = rows.values.reshape(len(rows.values), -1).astype(x.dtype)  # exact: integers up to 127
    return jax.lax.dot_general(x, whole, contract, preferred_element_type=wide) * rows.scale.T


def _sums(row: Float['I'], rows: Quantized) -> Float['O']:
    """Return the product of one row with every row of weights, without a matrix product."""
    parts = _entries(rows.values)
    pieces = row.reshape(rows.scale.shape[1], len(parts), -1)
    groups = sum(part * pieces[None, :, i] for i, part in enumerate(parts)).sum(axis=-1)
    return (groups * rows.scale).sum(axis=-1)


def weight(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]) -> Any:
    """Return a parameter of `module`, which may have been quantized, adapted or extended since it was made."""
    held = module.get_variable('params', name)
    return held if isinstance(held, Quantized | Adapted | Extended) else module.param(name, init, shape, jnp.float32)
