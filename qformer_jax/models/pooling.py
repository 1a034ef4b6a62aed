"""Averages of neighbouring features: a sequence, or a grid of patches, made shorter without parameters.

The cut is that of torch's adaptive average pooling: of n features, row i of R averages those from floor(i n / R) up to,
not including, ceil((i + 1) n / R). With 7 features and 3 rows:

    feature    0 1 2 3 4 5 6        Neighbouring rows share a feature where R does not divide n, and several
    row 0      x x x                rows are the same one where there are more rows than features.
    row 1          x x x
    row 2              x x x
"""

import math

import jax.numpy as jnp

from ..errors import UserError
from ..typing import Bool, Float, Int, Size
from .layers import at_least_float32


def cut(position: Int['B P'], count: Int['B'], rows: int) -> Bool['B R P']:
    """Return which of the positions 0 to `count` - 1 each row takes, as drawn above."""
    row, n = jnp.arange(rows)[None, :, None], count[:, None, None]
    at = position[:, None, :]
    return (at >= row * n // rows) & (at < -(-(row + 1) * n // rows))


def pool(features: Float['B P V'], mask: Bool['B P'], rows: int) -> Float['B R V']:
    """Return `rows` averages of the features that exist, in their order; zeros where none exists.

    Holes do not count: of mask 1 0 1 1 1, two rows average positions 0, 2 and 3, 4.
    """
    taken = cut(jnp.cumsum(mask, axis=1) - 1, mask.sum(axis=1), rows) & mask[:, None, :]
    weights = taken / jnp.maximum(taken.sum(axis=-1, keepdims=True), 1)
    wide = at_least_float32(features)
    return jnp.einsum('brp,bpv->brv', weights.astype(wide.dtype), wide).astype(features.dtype)


def pool_grid(features: Float['B P V'], side: int) -> Float['B R V']:
    """Return `side` x `side` averages of a square grid of patches, row by row; a class token is left out.

    Every patch exists. Raises UserError as `grid` does.
    """
    old, first = grid(features.shape[1])
    taken = cut(jnp.arange(old)[None], jnp.full(1, old), side)[0]
    wide = at_least_float32(features)
    weights = (taken / taken.sum(axis=-1, keepdims=True)).astype(wide.dtype)
    square = wide[:, first:].reshape(wide.shape[0], old, old, wide.shape[2])
    pooled = jnp.einsum('iy,jx,byxv->bijv', weights, weights, square)
    return pooled.reshape(wide.shape[0], side * side, wide.shape[2]).astype(features.dtype)


def grid(features: Size) -> tuple[int, int]:
    """Return the side of the square grid that so many features are, and how many class tokens (0, 1) stand before it.

    257 are a class token and 16 x 16, 256 are 16 x 16 alone. Raises UserError for a number that is neither, and while a
    function of feature arrays of any length is exported.
    """
    if not isinstance(features, int):
        raise UserError('a grid of patches has a known size, and feature arrays have any: this needs a vision tower')
    side = math.isqrt(features)
    first = features - side**2
    if side < 1 or first not in (0, 1):
        raise UserError(
            f'{features} features are no square grid of patches, with or without a class token: '
            f'the nearest are {side**2} or {side**2 + 1}'
        )
    return side, first
