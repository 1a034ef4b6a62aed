"""Whether frozen weights are still what they were: a checksum computed on the device where they lie."""

import hashlib

import jax
import jax.numpy as jnp

from ..rules import flatten
from ..typing import Array, Params, UInt32

_LANES = (0x9E3779B1, 0x85EBCA77)  # odd: then no word times one of them loses a bit


def checksum(params: Params) -> str:
    """Return 64 hex digits of the arrays' paths, dtypes, shapes and bits; one changed bit changes them."""
    flat = flatten(params)
    total = hashlib.sha256()
    for (path, array), sums in zip(flat.items(), jax.device_get(_sums(list(flat.values()))), strict=True):
        total.update(f'{path} {array.dtype} {array.shape} {sums.tolist()}\n'.encode())
    return total.hexdigest()


@jax.jit
def _sums(arrays: list[Array]) -> list[UInt32['2']]:
    return [jnp.stack([_weighted_sum(array, lane) for lane in _LANES]) for array in arrays]


def _weighted_sum(array: Array, lane: int) -> UInt32['']:
    """Return the sum, modulo 2**32, of every element's bits times an odd weight that depends on its place.

    A place weighs odd, so a change of one element is always seen; sums of integers do not depend on their order, so the
    number of devices does not either. Places are counted without a reshape, which would gather a split array.
    """
    bits = jax.lax.bitcast_convert_type(array, f'uint{8 * array.dtype.itemsize}').astype(jnp.uint32)
    place, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    mixed = (place + 1) * jnp.uint32(lane)
    return (bits * ((mixed ^ (mixed >> 15)) | 1)).sum(dtype=jnp.uint32)
