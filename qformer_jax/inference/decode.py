"""How each writer starts and steps: the language model after a soft prefix, and the Q-Former itself.

Slots of a cache: [queries][left-padded prompt][new tokens]. The padding is a hole that positions do not count, so a
prompt gives the same tokens whatever else is in its batch.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import UserError
from ..models.blip2 import Blip2
from ..models.cache import Cache
from ..models.opt import empty_cache
from ..typing import Array, Bool, Float, Int, Params
from .search import Settings, Start, Step, Written, search


@partial(jax.jit, static_argnames=('model', 'settings'))
def with_lm(
    model: Blip2,
    params: Params,
    prefix: Float['B Q L'],
    prompt: Int['B T'],
    prompt_mask: Bool['B T'],
    *,
    settings: Settings,
) -> Written:
    """Return what the language model writes after [prefix, left-padded prompt]."""
    step, start = start_lm(model, params, prefix, prompt, prompt_mask, settings.max_new_tokens)
    return search(step, start, settings)


@partial(jax.jit, static_argnames=('model', 'settings'))
def with_qformer(
    model: Blip2, params: Params, features: Float['B P V'], feature_mask: Bool['B P'], *, settings: Settings
) -> Written:
    """Return what the Q-Former writes about features, as ITG taught it (BLIP-2, section 3.2)."""
    step, start = start_qformer(model, params, features, feature_mask, settings.max_new_tokens)
    return search(step, start, settings)


def start_lm(
    model: Blip2,
    params: Params,
    prefix: Float['B Q L'],
    prompt: Int['B T'],
    prompt_mask: Bool['B T'],
    limit: int,
) -> tuple[Step, Start]:
    """Read prefix and prompt; raises UserError when they and `limit` new tokens exceed the model's positions."""
    c = model.config.lm
    slots = prefix.shape[1] + prompt.shape[1] + limit - 1  # the last token is not read
    if slots > c.max_positions:
        raise UserError(
            f'a prompt of {prompt.shape[1]} tokens and {limit} new ones do not fit the language model: '
            f'{c.max_positions} positions, {prefix.shape[1]} of them queries'
        )

    def read(model: Blip2, x: Float['B T L'], exists: Bool['B T'], cache: Cache) -> tuple[Array, Cache]:
        out = model.lm(x, exists, cache)
        return model.lm.word_logits(out.hidden[:, -1:])[:, 0], out.cache

    def begin(model: Blip2) -> tuple[Array, Cache]:
        x = jnp.concatenate([prefix, model.lm.embed(prompt)], axis=1)
        exists = jnp.concatenate([jnp.ones(prefix.shape[:2], bool), prompt_mask], axis=1)
        return read(model, x, exists, empty_cache(c, len(x), slots, model.dtype))

    def go_on(model: Blip2, cache: Cache, last: Int['R']) -> tuple[Array, Cache]:
        return read(model, model.lm.embed(last[:, None]), jnp.ones((len(last), 1), bool), cache)

    logits, cache = nn.apply(begin, model)({'params': params})
    return partial(nn.apply(go_on, model), {'params': params}), Start(logits, cache, prompt, prompt_mask)


def start_qformer(
    model: Blip2, params: Params, features: Float['B P V'], feature_mask: Bool['B P'], limit: int
) -> tuple[Step, Start]:
    """Run the queries, whose keys and values the text then reads, and give the text its first token, [DEC].

    Raises UserError when `limit` new tokens exceed the positions of the text.
    """
    c = model.config.qformer
    if limit > c.max_positions:
        raise UserError(f'{limit} new tokens do not fit the Q-Former: {c.max_positions} text positions')

    def begin(model: Blip2) -> Cache:
        queries = model.ask_queries(features, feature_mask).cache
        layers = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, limit), (0, 0), (0, 0))), queries)
        exists = jnp.tile(jnp.arange(c.num_queries + limit)[None] < c.num_queries, (len(features), 1))
        return Cache(layers, exists, jnp.int32(c.num_queries))

    def go_on(model: Blip2, cache: Cache, last: Int['R']) -> tuple[Array, Cache]:
        own = jnp.ones((len(last), 1), bool)
        seen = jnp.concatenate([cache.exists, own], axis=1)[:, None, None, :]
        text_start = cache.end - c.num_queries
        out = model.qformer(seen, text=last[:, None], prefix=cache.layers, text_start=text_start)
        layers, exists = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cache.end, axis=1),
            (cache.layers, cache.exists),
            (out.cache, own),
        )
        return model.qformer.word_logits(out.text)[:, 0], Cache(layers, exists, cache.end + 1)

    step = partial(nn.apply(go_on, model), {'params': params})
    prompt = jnp.full((len(features), 1), c.vocab_size)  # [DEC] is the row after the vocabulary
    logits, cache = step(nn.apply(begin, model)({'params': params}), prompt[:, 0])
    return step, Start(logits, cache, prompt, jnp.ones(prompt.shape, bool))
