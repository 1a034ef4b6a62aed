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

from .. import config
from ..errors import UserError
from ..models.blip2 import Blip2Module, Prefix, prefix_length
from ..models.families import family_of
from ..models.kv_cache import KVCache, write
from ..typing import Array, Bool, Float, Int, Params, Size, UInt32
from .generate import GenerationConfig, GenerationOutput, PrefillState, Step, generate


@partial(jax.jit, static_argnames=('model', 'settings'))
def with_lm(
    model: Blip2Module,
    params: Params,
    prefix: Prefix,
    prompt: Int['B T'],
    prompt_mask: Bool['B T'],
    keys: UInt32['B 2'] | None = None,
    *,
    settings: GenerationConfig,
) -> GenerationOutput:
    """Return what the language model writes after [prefix, left-padded prompt]; a temperature needs `keys`."""
    return generate(*prefill_lm(model, params, prefix, prompt, prompt_mask, settings.max_new_tokens), settings, keys)


@partial(jax.jit, static_argnames=('model', 'settings'))
def with_qformer(
    model: Blip2Module,
    params: Params,
    features: Float['B P V'],
    feature_mask: Bool['B P'],
    keys: UInt32['B 2'] | None = None,
    *,
    settings: GenerationConfig,
) -> GenerationOutput:
    """Return what the Q-Former writes about features, as ITG taught it (BLIP-2, section 3.2)."""
    return generate(*prefill_qformer(model, params, features, feature_mask, settings.max_new_tokens), settings, keys)


def prefill_lm(
    model: Blip2Module, params: Params, prefix: Prefix, prompt: Int['B T'], prompt_mask: Bool['B T'], limit: Size
) -> tuple[Step, PrefillState]:
    """Let the language model read prefix and left-padded prompt; raises UserError if `limit` more tokens do not fit."""
    family = family_of(model.config.lm)
    _check_room(model.config, prefix_length(model.config, prefix), prompt.shape[1], limit)

    def begin(model: Blip2Module) -> tuple[Array, Any]:
        given = _given_prefix(model, prefix, prompt, prompt_mask)
        x, token_mask, cache = family.prefill_inputs(model.lm, *given, limit)
        cache = cache.replace(media=model.media(prefix)) if model.config.gates else cache
        return next_token_logits(model, x, token_mask, cache)

    logits, cache = nn.apply(begin, model)({'params': params})
    return make_decode_step(model, params), PrefillState(logits, cache, *family.decoder_prompt(prompt, prompt_mask))


def _check_room(c: config.Blip2Config, beside: Size, prompt: Size, new: Size) -> None:
    """Raise UserError when a picture, a prompt and new tokens exceed the language model's positions."""
    positions = c.lm.position_limit
    if positions is not None and beside + prompt + new - 1 > positions:  # the last token is not read
        raise UserError(
            f'a prompt of {prompt} tokens and {new} new ones do not fit the language model: '
            f"{positions} positions, {beside} of them the picture's"
        )


def _given_prefix(
    model: Blip2Module, prefix: Prefix, prompt: Int['B T'], prompt_mask: Bool['B T']
) -> tuple[Float['B S L'], Bool['B S']]:
    """Return what the language model reads, and which of it exists."""
    if model.config.gates:
        return model.lm.embed(prompt), prompt_mask
    return (
        jnp.concatenate([prefix.vectors, model.lm.embed(prompt)], axis=1),
        jnp.concatenate([prefix.mask, prompt_mask], axis=1),
    )


def next_token_logits(
    model: Blip2Module, x: Float['B T L'], token_mask: Bool['B T'], cache: KVCache | tuple
) -> tuple[Float['B N'], KVCache | tuple]:
    """Let the decoder read on; returns the logits that follow the last position that exists, and the cache.

    That is the last slot, but in a row whose prompt is empty beside longer ones: exists 1 1 0 0, two queries and two
    holes, is followed by what slot 1 says.
    """
    out = model.lm_forward(x, token_mask, cache)
    last = token_mask.shape[1] - 1 - token_mask[:, ::-1].argmax(axis=1)
    return model.lm.word_logits(jnp.take_along_axis(out.hidden, last[:, None, None], axis=1))[:, 0], out.cache


def make_decode_step(model: Blip2Module, params: Params) -> Step:
    """Return how the language model goes on, whatever it has read."""

    def go_on(model: Blip2Module, cache: Any, last: Int['R']) -> tuple[Array, Any]:
        return next_token_logits(model, model.lm.embed(last[:, None]), jnp.ones((last.shape[0], 1), bool), cache)

    return partial(nn.apply(go_on, model), {'params': params})


def prefill_qformer(
    model: Blip2Module, params: Params, features: Float['B P V'], feature_mask: Bool['B P'], limit: Size
) -> tuple[Step, PrefillState]:
    """Run the queries, whose keys and values the text then reads, and give the text its first token, [DEC].

    Raises UserError when this Q-Former has no word head, or `limit` new tokens exceed the positions of the text.
    """
    c = model.config.qformer
    if c.text_side != 'full':
        raise UserError(f"this Q-Former cannot write (its text side is '{c.text_side}'): take a stage-1 model with ITG")
    if limit > c.max_positions:
        raise UserError(f'{limit} new tokens do not fit the Q-Former: {c.max_positions} text positions')

    def begin(model: Blip2Module) -> KVCache:
        queries = model.query_features(features, feature_mask).cache
        layers = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, limit), (0, 0), (0, 0))), queries)
        valid = jnp.tile(jnp.arange(c.num_queries + limit)[None] < c.num_queries, (features.shape[0], 1))
        return KVCache(layers, valid, jnp.int32(c.num_queries))

    def go_on(model: Blip2Module, cache: KVCache, last: Int['R']) -> tuple[Array, KVCache]:
        own = jnp.ones((last.shape[0], 1), bool)
        visible = jnp.concatenate([cache.valid, own], axis=1)[:, None, None, :]
        text_start = cache.end - c.num_queries
        out = model.qformer(visible, text=last[:, None], prefix=cache.layers, text_start=text_start)
        layers, valid = jax.tree.map(
            lambda old, new: write(old, new, cache.end), (cache.layers, cache.valid), (out.cache, own)
        )
        return model.qformer.word_logits(out.text)[:, 0], KVCache(layers, valid, cache.end + 1)

    first = jnp.full((features.shape[0], 1), c.vocab_size)  # [DEC] is the row after the vocabulary
    step = partial(nn.apply(go_on, model), {'params': params})
    logits, cache = step(nn.apply(begin, model)({'params': params}), first[:, 0])
    return step, PrefillState(logits, cache, first, jnp.ones(first.shape, bool))
