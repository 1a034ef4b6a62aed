"""What a decoder keeps between calls, keys and values in a fixed number of slots, and what a call returns."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from ..config import LmConfig
from ..typing import Array, Bool, Float, Int, Size
from .layers import KeyValue


@struct.dataclass
class Media:
    """What gated layers read of pictures (`gated_cross_attention.py`): the keys and values of M vectors, and which of
    these exist."""

    layers: tuple[KeyValue, ...]
    mask: Bool['B M']


@struct.dataclass
class KVCache:
    """Keys and values of a fixed number of slots (M); slots from `end` on are still empty."""

    layers: tuple[KeyValue, ...]
    valid: Bool['B M']
    """Which slots hold a real token (padding and empty slots do not)."""
    end: Int['']
    """Slots written so far, the same for every row."""
    media: Media | None = None
    """What gated layers read, where there are some."""


def empty(c: LmConfig, batch: Size, slots: Size, dtype: DTypeLike) -> KVCache:
    """Return a cache of `slots` empty slots for `batch` rows of a language model's decoder."""
    depth, heads, head_width = c.cache_shape
    zeros = jnp.zeros((batch, slots, heads, head_width), dtype)
    return KVCache(tuple(KeyValue(zeros, zeros) for _ in range(depth)), jnp.zeros((batch, slots), bool), jnp.int32(0))


def write(old: Array, new: Array, start: Array | int) -> Array:
    """Return `old` [B, M, ...] with `new` [B, T, ...] in the slots from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)


def place(cache: KVCache | None, token_mask: Bool['B T']) -> tuple[Bool['B M'], Array | int]:
    """Return which slots exist once this call's positions stand after the cache's, and the first slot of the call."""
    if cache is None:
        return token_mask, 0
    return write(cache.valid, token_mask, cache.end), cache.end


@struct.dataclass
class LmOutput:
    """What a language model makes of its positions, and what a later call or a curious reader may want."""

    hidden: Float['B T L']
    """Last hidden states, ready for the output table: after the final norm (and projection) that a family has."""
    cache: KVCache | tuple | None
    """The cache with this call's positions in it (T5's: behind its encoder's output); None without one."""
    hidden_states: tuple[Array, ...]
    """[B, T, L] entering the first layer, and after each."""
