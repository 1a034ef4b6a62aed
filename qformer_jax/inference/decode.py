"""Greedy decoding through the key-value cache, as one jitted loop.

Slots of the cache: [queries][left-padded prompt][new tokens]. The padding is a hole that positions do not count, so a
prompt gives the same tokens whatever else is in its batch.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..models.blip2 import Blip2
from ..models.opt import empty_cache
from ..typing import Array, Bool, Float, Int, Params


@partial(jax.jit, static_argnames=('model', 'max_new_tokens', 'end_id'))
def greedy(
    model: Blip2,
    params: Params,
    prefix: Float['B Q L'],
    prompt: Int['B T'],
    prompt_mask: Bool['B T'],
    *,
    max_new_tokens: int,
    end_id: int,
) -> Int['B G']:
    """Return the new tokens [B, max_new_tokens], each row filled with `end_id` from its end on.

    Stops as soon as every row has ended.
    """
    return nn.apply(_greedy, model)({'params': params}, prefix, prompt, prompt_mask, max_new_tokens, end_id)


def _greedy(
    model: Blip2, prefix: Float['B Q L'], prompt: Int['B T'], prompt_mask: Bool['B T'], limit: int, end_id: int
) -> Int['B G']:
    batch = prompt.shape[0]
    x = jnp.concatenate([prefix, model.lm.embed(prompt)], axis=1)
    exists = jnp.concatenate([jnp.ones(prefix.shape[:2], bool), prompt_mask], axis=1)
    cache = empty_cache(model.config.lm, batch, x.shape[1] + limit, model.dtype)
    out = model.lm(x, exists, cache)
    first = model.lm.word_logits(out.hidden[:, -1:])[:, 0].argmax(axis=-1)

    def running(carry) -> Array:
        count, _, _, ended, _ = carry
        return (count < limit) & ~ended.all()

    def write(carry):
        count, token, tokens, ended, cache = carry
        token = jnp.where(ended, end_id, token)
        tokens = tokens.at[:, count].set(token)
        ended = ended | (token == end_id)
        out = model.lm(model.lm.embed(token[:, None]), jnp.ones((batch, 1), bool), cache)
        following = model.lm.word_logits(out.hidden)[:, 0].argmax(axis=-1)
        return count + 1, following, tokens, ended, out.cache

    tokens = jnp.full((batch, limit), end_id, first.dtype)
    start = (jnp.int32(0), first, tokens, jnp.zeros(batch, bool), out.cache)
    return jax.lax.while_loop(running, write, start)[2]
