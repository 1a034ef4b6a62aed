"""Dialogue about pictures: what was read stays read, as far as the model allows.

    decoder, queries that read no question    one cache for the whole dialogue: a turn reads its own words only;
                                              gated layers read the latest picture (Flamingo, section 3.1.3)
    T5                                        queries are kept, the dialogue so far is read again
    queries that read the question            features are kept; queries and the dialogue so far are read again

A turn is the run's prompt for a question and the answer to it; turns are joined by blanks. The cache holds
`[queries][start, prompt][answer][prompt][answer]...`; a turn's words are padded at their left to a multiple of 8, and
the cache grows by multiples of 128 slots, so that few shapes are compiled. Padding is a hole that no position counts.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..data.tokenizers import prompt_ids
from ..errors import UserError
from ..models import blip2, kv_cache
from ..models.kv_cache import KVCache, Media
from ..typing import Array, Bool, Float, Int, Params
from . import decode, stream
from .blip2 import Blip2
from .generate import GenerationConfig, PrefillState, row_keys
from .inputs import ImageFeatures, Picture, QueryOutputs
from .prompts import left_padded, with_eos

SLOTS = 128


@dataclass(frozen=True)
class Dialogue:
    """A dialogue so far; every token of an answer makes a new one, from which the dialogue may go on."""

    encoded: ImageFeatures | QueryOutputs
    """The pictures, in the order in which they came."""
    turns: tuple[tuple[str, str], ...] = ()
    """(question, answer)."""
    cache: KVCache | None = None
    """What the language model has read, where that is kept."""
    read: tuple[int, ...] = ()
    """The ids in the cache, in their order."""
    unread: tuple[int, ...] = ()
    """The last word of the answer, which the language model has not read yet."""
    pictures_encoded: int = 0
    """Pictures that went through the networks, or were found in the model's cache."""
    words_read: int = 0
    """Ids that the language model was given to read at a time, answers not among them."""


def start(model: Blip2, picture: Picture) -> Dialogue:
    """Begin a dialogue about a picture; raises UserError when the run has no language model."""
    encoded = model.encode_queries([picture])
    return _show(model, Dialogue(encoded, pictures_encoded=1), encoded)


def add_picture(model: Blip2, dialogue: Dialogue, picture: Picture) -> Dialogue:
    """Show one more picture; its queries follow what was said."""
    new = model.encode_queries([picture])
    encoded, count = new.join([dialogue.encoded, new]), dialogue.pictures_encoded + 1
    return _show(model, replace(dialogue, encoded=encoded, pictures_encoded=count), new)


def say(
    model: Blip2, dialogue: Dialogue, question: str, settings: GenerationConfig, key: jax.Array | None = None
) -> Iterator[tuple[str, Dialogue]]:
    """Yield the answer piece by piece, each with the dialogue up to there.

    The answer ends where the language model's positions do, if that is before `settings.max_new_tokens`; raises
    UserError when they leave no room for one. A repetition penalty counts the whole dialogue, as in one long prompt.
    """
    tokenizer = model.lm_tokenizer
    settings = with_eos(settings, tokenizer.end_id)
    read, dialogue, limit = (_go_on if keeps_cache(model) else _read_again)(model, dialogue, question, settings)
    keys = None if key is None else row_keys(key, 1)
    said, ids = '', []
    for row, now in itertools.islice(stream.tokens(model.model, model.params, read, settings, keys), limit):
        token = int(row[0])
        ended = token in settings.end_ids
        ids += [] if ended else [token]
        piece = stream.piece(tokenizer, ids, said, last=ended or len(ids) == limit)
        said += piece
        yield (
            piece,
            replace(
                dialogue,
                turns=(*dialogue.turns, (question, said)),
                cache=now.cache if keeps_cache(model) else None,
                read=(*dialogue.read, *(ids if ended else ids[:-1])) if keeps_cache(model) else (),
                unread=() if ended else (token,),
            ),
        )


def keeps_cache(model: Blip2) -> bool:
    """Whether a turn need not read what the turns before it have read."""
    return not model.run.model.lm.encoder_decoder and not model.run.objective.instruction_aware


def _show(model: Blip2, dialogue: Dialogue, new: ImageFeatures | QueryOutputs) -> Dialogue:
    if not keeps_cache(model):
        return dialogue
    if dialogue.unread:
        dialogue = _read_ids(model, dialogue, list(dialogue.unread), 0)[1]
    prefix = model.soft_prefix(new, [''])
    if model.run.model.gates:
        media = _media(model.model, model.params, prefix)
        return replace(dialogue, cache=_grown(model, dialogue.cache, 1).replace(media=media), unread=())
    _left(model, _used(dialogue.cache) + int(prefix.mask.sum()))
    cache = _grown(model, dialogue.cache, prefix.mask.shape[1])
    _, cache = _read(model.model, model.params, cache, prefix.vectors, prefix.mask)
    return replace(dialogue, cache=cache, unread=())


def _go_on(
    model: Blip2, dialogue: Dialogue, question: str, settings: GenerationConfig
) -> tuple[PrefillState, Dialogue, int]:
    """Read the last word of the answer before, and the new prompt; returns how long the answer may be, too."""
    (prompt,), tokenizer = model.question_prompts([question]), model.lm_tokenizer
    ids = prompt_ids(tokenizer, prompt)
    if dialogue.turns:
        ids = [*tokenizer.ids(tokenizer.special_tokens.blank + prompt.rstrip()), *tokenizer.special_tokens.close]
    ids = [*dialogue.unread, *ids]
    limit = min(settings.max_new_tokens, _left(model, _used(dialogue.cache) + len(ids)))
    return *_read_ids(model, dialogue, ids, settings.max_new_tokens), limit


def _read_ids(model: Blip2, dialogue: Dialogue, ids: list[int], more: int) -> tuple[PrefillState, Dialogue]:
    row, token_mask = left_padded([ids], model.lm_tokenizer.pad_id)
    cache = _grown(model, dialogue.cache, row.shape[1] + more)
    logits, cache = _read(model.model, model.params, cache, row, token_mask)
    said, count = (*dialogue.read, *ids), dialogue.words_read + len(ids)
    slots = cache.valid.shape[1]  # as many words as these it may have read: one shape for all dialogues until it grows
    words = np.pad(np.array([said], np.int32), [(0, 0), (slots - len(said), 0)])
    read = PrefillState(logits, cache, words, np.arange(slots)[None] >= slots - len(said))
    return read, replace(dialogue, cache=cache, read=said, unread=(), words_read=count)


def _read_again(
    model: Blip2, dialogue: Dialogue, question: str, settings: GenerationConfig
) -> tuple[PrefillState, Dialogue, int]:
    """Read the whole dialogue, and each picture's queries for this question."""
    said = [f'{prompt} {answer}' for prompt, answer in _prompted(model, dialogue)]
    (prompt,) = model.question_prompts([question])
    encoded = dialogue.encoded.take([-1]) if model.run.model.gates else dialogue.encoded
    prefix = model.soft_prefix(encoded, [prompt] * len(encoded))
    prefix = blip2.Prefix(prefix.vectors.reshape(1, -1, prefix.vectors.shape[-1]), prefix.mask.reshape(1, -1))
    beside = blip2.prefix_length(model.run.model, prefix)
    ids, prompt_mask = model.padded_prompts([' '.join([*said, prompt])], beside)
    limit = min(settings.max_new_tokens, _left(model, beside + ids.shape[1]))
    settings = replace(settings, max_new_tokens=limit)
    read = stream.begin(model.model, model.params, prefix, ids, prompt_mask, settings=settings)
    return read, replace(dialogue, words_read=dialogue.words_read + int(prompt_mask.sum())), limit


def _prompted(model: Blip2, dialogue: Dialogue) -> Iterator[tuple[str, str]]:
    questions, answers = [q for q, _ in dialogue.turns], [a for _, a in dialogue.turns]
    return zip(model.question_prompts(questions), answers, strict=True)


def _used(cache: KVCache | None) -> int:
    return 0 if cache is None else int(cache.valid.sum())


def _left(model: Blip2, used: int) -> int:
    """Return how long an answer may be once `used` positions are read: its last word needs none before the next turn.

    Raises UserError when that is nothing.
    """
    positions = model.run.model.lm.position_limit
    if positions is None:
        return sys.maxsize
    if used > positions:
        raise UserError(f'the dialogue is full: it would have {used} positions of {positions}; begin another one')
    return positions - used + 1


def _grown(model: Blip2, cache: KVCache | None, more: int) -> KVCache:
    """Return the cache with room for `more` slots.

    20 slots used of 128, 72 more: nothing grows. 100 used: 172 are needed, so 256 there are.
    """
    wanted = -(-((0 if cache is None else int(cache.end)) + more) // SLOTS) * SLOTS
    if cache is None:
        return kv_cache.empty(model.run.model.lm, 1, wanted, model.model.dtype)
    missing = max(0, wanted - cache.valid.shape[1])
    grow = partial(jax.tree.map, lambda x: jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)))
    return cache if not missing else cache.replace(layers=grow(cache.layers), valid=grow(cache.valid))


@partial(jax.jit, static_argnames=('model',))
def _read(
    model: blip2.Blip2Module,
    params: Params,
    cache: KVCache,
    given: Int['B T'] | Float['B T L'],
    token_mask: Bool['B T'],
) -> tuple[Array, KVCache]:
    """Let the decoder read ids, or queries as they are."""

    def go_on(model: blip2.Blip2Module) -> tuple[Array, KVCache]:
        x = given if given.ndim == 3 else model.lm.embed(given)
        return decode.next_token_logits(model, x, token_mask, cache)

    return nn.apply(go_on, model)({'params': params})


@partial(jax.jit, static_argnames=('model',))
def _media(model: blip2.Blip2Module, params: Params, prefix: blip2.Prefix) -> Media:
    """Return what gated layers read of a picture."""
    return model.apply({'params': params}, prefix, method='media')
