"""How each writer starts and steps: a language model after a soft prefix, and the Q-Former itself.

Slots of a decoder's cache: [queries][left-padded prompt][new tokens]. The padding is a hole that positions do not
count, so a prompt gives the same tokens whatever else is in its batch. The Q-Former's cache is [queries][[DEC], new
tokens], T5's is [start token, new tokens] beside what its encoder made of queries and prompt.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import UserError
from ..models import llama, opt, t5
from ..models.blip2 import Blip2, Prefix, in_front
from ..models.cache import Cache, write
from ..typing import Array, Bool, Float, Int, Params, Size, UInt32
from .search import Settings, Start, Step, Written, search


@partial(jax.jit, static_argnames=('model', 'settings'))
def with_lm(
    model: Blip2,
    params: Params,
    prefix: Prefix,
    prompt: Int['B T'],
    prompt_mask: Bool['B T'],
    keys: UInt32['B 2'] | None = None,
    *,
    settings: Settings,
) -> Written:
    """Return what the language model writes after [prefix, left-padded prompt]; a temperature needs `keys`."""
    return search(*start_lm(model, params, prefix, prompt, prompt_mask, settings.max_new_tokens), settings, keys)


@partial(jax.jit, static_argnames=('model', 'settings'))
def with_qformer(
    model: Blip2,
    params: Params,
    features: Float['B P V'],
    feature_mask: Bool['B P'],
    keys: UInt32['B 2'] | None = None,
    *,
    settings: Settings,
) -> Written:
    """Return what the Q-Former writes about features, as ITG taught it (BLIP-2, section 3.2)."""
    return search(*start_qformer(model, params, features, feature_mask, settings.max_new_tokens), settings, keys)


def start_lm(
    model: Blip2, params: Params, prefix: Prefix, prompt: Int['B T'], prompt_mask: Bool['B T'], limit: Size
) -> tuple[Step, Start]:
    """Let the language model read prefix and left-padded prompt; raises UserError if `limit` more tokens do not fit."""
    begin = start_t5 if model.config.lm.family == 't5' else start_decoder
    return begin(model, params, prefix, prompt, prompt_mask, limit)


def _given_prefix(
    model: Blip2, prefix: Prefix, prompt: Int['B T'], prompt_mask: Bool['B T']
) -> tuple[Float['B S L'], Bool['B S']]:
    """Return what the language model reads, and which of it exists."""
    if model.config.gates:
        return model.lm.embed(prompt), prompt_mask
    return (
        jnp.concatenate([prefix.vectors, model.lm.embed(prompt)], axis=1),
        jnp.concatenate([prefix.exists, prompt_mask], axis=1),
    )


def start_decoder(
    model: Blip2,
    params: Params,
    prefix: Prefix,
    prompt: Int['B T'],
    prompt_mask: Bool['B T'],
    limit: Size,
) -> tuple[Step, Start]:
    """Read prefix and prompt; raises UserError when they and `limit` new tokens exceed the model's positions."""
    c = model.config.lm
    beside = in_front(model.config, prefix)
    slots = beside + prompt.shape[1] + limit - 1  # the last token is not read
    if slots > c.max_positions:
        raise UserError(
            f'a prompt of {prompt.shape[1]} tokens and {limit} new ones do not fit the language model: '
            f"{c.max_positions} positions, {beside} of them the picture's"
        )

    empty_cache = {'opt': opt, 'llama': llama}[c.family].empty_cache

    def begin(model: Blip2) -> tuple[Array, Cache]:
        x, exists = _given_prefix(model, prefix, prompt, prompt_mask)
        cache = empty_cache(c, x.shape[0], slots, model.dtype).replace(media=model.media(prefix))
        return read(model, x, exists, cache)

    logits, cache = nn.apply(begin, model)({'params': params})
    return lm_step(model, params), Start(logits, cache, prompt, prompt_mask)


def read(model: Blip2, x: Float['B T L'], exists: Bool['B T'], cache: Cache) -> tuple[Float['B N'], Cache]:
    """Let a decoder read on; returns the logits that follow the last position that exists, and the cache.

    That is the last slot, but in a row whose prompt is empty beside longer ones: exists 1 1 0 0, two queries and two
    holes, is followed by what slot 1 says.
    """
    out = model.read(x, exists, cache)
    last = exists.shape[1] - 1 - exists[:, ::-1].argmax(axis=1)
    return model.lm.word_logits(jnp.take_along_axis(out.hidden, last[:, None, None], axis=1))[:, 0], out.cache


def lm_step(model: Blip2, params: Params) -> Step:
    """Return how the language model goes on, whatever it has read."""

    def decoder(model: Blip2, cache: Cache, last: Int['R']) -> tuple[Array, Cache]:
        return read(model, model.lm.embed(last[:, None]), jnp.ones((last.shape[0], 1), bool), cache)

    def encoder_decoder(model: Blip2, cache: tuple[t5.Memory, Cache], last: Int['R']) -> tuple[Array, tuple]:
        memory, written = cache
        out = model.lm(model.lm.embed(last[:, None]), jnp.ones((last.shape[0], 1), bool), memory, written)
        return model.lm.word_logits(out.hidden)[:, 0], (memory, out.cache)

    go_on = encoder_decoder if model.config.lm.family == 't5' else decoder
    return partial(nn.apply(go_on, model), {'params': params})


def start_t5(
    model: Blip2,
    params: Params,
    prefix: Prefix,
    prompt: Int['B T'],
    prompt_mask: Bool['B T'],
    limit: Size,
) -> tuple[Step, Start]:
    """Let the encoder read prefix and prompt, and give the decoder its first token; that is the search's prompt."""

    def begin(model: Blip2) -> tuple[t5.Memory, Cache]:
        memory = model.lm.encode(*_given_prefix(model, prefix, prompt, prompt_mask))
        memory = memory.replace(hidden_states=())  # beams would carry them along
        return memory, t5.empty_cache(model.config.lm, prompt.shape[0], limit, model.dtype)

    first = jnp.full((prompt.shape[0], 1), t5.START_ID)
    return _after_first(lm_step(model, params), nn.apply(begin, model)({'params': params}), first)


def start_qformer(
    model: Blip2, params: Params, features: Float['B P V'], feature_mask: Bool['B P'], limit: Size
) -> tuple[Step, Start]:
    """Run the queries, whose keys and values the text then reads, and give the text its first token, [DEC].

    Raises UserError when this Q-Former has no word head, or `limit` new tokens exceed the positions of the text.
    """
    c = model.config.qformer
    if c.text_side != 'full':
        raise UserError(f"this Q-Former cannot write (its text side is '{c.text_side}'): take a stage-1 model with ITG")
    if limit > c.max_positions:
        raise UserError(f'{limit} new tokens do not fit the Q-Former: {c.max_positions} text positions')

    def begin(model: Blip2) -> Cache:
        queries = model.ask_queries(features, feature_mask).cache
        layers = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, limit), (0, 0), (0, 0))), queries)
        exists = jnp.tile(jnp.arange(c.num_queries + limit)[None] < c.num_queries, (features.shape[0], 1))
        return Cache(layers, exists, jnp.int32(c.num_queries))

    def go_on(model: Blip2, cache: Cache, last: Int['R']) -> tuple[Array, Cache]:
        own = jnp.ones((last.shape[0], 1), bool)
        seen = jnp.concatenate([cache.exists, own], axis=1)[:, None, None, :]
        text_start = cache.end - c.num_queries
        out = model.qformer(seen, text=last[:, None], prefix=cache.layers, text_start=text_start)
        layers, exists = jax.tree.map(
            lambda old, new: write(old, new, cache.end), (cache.layers, cache.exists), (out.cache, own)
        )
        return model.qformer.word_logits(out.text)[:, 0], Cache(layers, exists, cache.end + 1)

    first = jnp.full((features.shape[0], 1), c.vocab_size)  # [DEC] is the row after the vocabulary
    step = partial(nn.apply(go_on, model), {'params': params})
    return _after_first(step, nn.apply(begin, model)({'params': params}), first)


def _after_first(step: Step, cache: Any, first: Int['B 1']) -> tuple[Step, Start]:
    """Return the step, and the start for a writer whose prompt is one token."""
    logits, cache = step(cache, first[:, 0])
    return step, Start(logits, cache, first, jnp.ones(first.shape, bool))
