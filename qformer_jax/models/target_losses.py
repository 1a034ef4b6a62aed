"""How likely a language model takes given tokens to be, reading its output table no more often than it must."""

import itertools

import flax.linen as nn
import jax.numpy as jnp

from ..objectives import captioning
from ..typing import Array, Bool, Float, Int
from .blip2 import Blip2Module
from .layers import at_least_float32


def target_losses(
    model: Blip2Module, hidden: Float['B T L'], targets: Int['B T'], counts: Bool['B T']
) -> tuple[Float['B T'], Bool['B T']]:
    """Return the loss (nats) of each target that counts, and whether greedy decoding gets it right; zero elsewhere.

    The output table is the widest product of a language model, and prompts and padding need none of it. So each row's
    targets move to its front, and the table reads columns 0..3, 4..7, 8..15, ... only where some row has a target:
    of rows with 2 and 9 targets among 32 places, 16 columns are read.
    """
    order = jnp.argsort(~counts, axis=1, stable=True)
    front = [jnp.take_along_axis(x, order, axis=1) for x in (targets, counts)]
    front_hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    parts = []
    for start, end in _pieces(counts.shape[1]):
        h, t, c = (x[:, start:end] for x in (front_hidden, *front))
        parts.append(nn.cond(c.any(), _read_table, _leave_out, model.lm, h, t, c))
    back = jnp.argsort(order, axis=1)
    return tuple(jnp.take_along_axis(jnp.concatenate(x, axis=1), back, axis=1) for x in zip(*parts, strict=True))


def _pieces(length: int, first: int = 4) -> list[tuple[int, int]]:
    """Return `first` places, then as many again as stand before: of 20, 0..4, 4..8, 8..16 and 16..20."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(first, 2 * edges[-1])))
    return list(itertools.pairwise(edges))


def _read_table(lm: nn.Module, hidden: Array, targets: Array, counts: Array) -> tuple[Float['B T'], Bool['B T']]:
    logits = lm.word_logits(hidden)
    losses = captioning.token_losses(logits, targets)
    return jnp.where(counts, losses, 0), (logits.argmax(axis=-1) == targets) & counts


def _leave_out(lm: nn.Module, hidden: Array, targets: Array, counts: Array) -> tuple[Float['B T'], Bool['B T']]:
    return jnp.zeros(counts.shape, at_least_float32(hidden).dtype), jnp.zeros(counts.shape, bool)
