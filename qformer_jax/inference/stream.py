"""Text while it is being written: the loop of `search` with its body called from outside, a token at a time.

Reading the prompt and going on by a token are one compilation each, per shape; the ids are those of `search`.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import jax
import numpy as np

from ..data.tokenizers import LmTokenizer
from ..models.blip2 import Blip2Module
from ..typing import Params, UInt32
from . import decode
from .generate import DecodeState, GenerationConfig, PrefillState, decode_step, init_state, sample_token

_CUT = '\ufffd'  # what a tokenizer writes for the first bytes of a character


@partial(jax.jit, static_argnames=('model', 'settings'))
def begin(model: Blip2Module, params: Params, *prompt, settings: GenerationConfig) -> PrefillState:
    """Let the language model read (prefix, left-padded prompt, its mask)."""
    return decode.prefill_lm(model, params, *prompt, settings.max_new_tokens)[1]


@partial(jax.jit, static_argnames=('settings',))
def _first(read: PrefillState, keys: UInt32['B 2'] | None, *, settings: GenerationConfig) -> DecodeState:
    return sample_token(init_state(read, settings), read, settings, keys)


@partial(jax.jit, static_argnames=('model', 'settings'))
def _next(
    model: Blip2Module,
    params: Params,
    texts: DecodeState,
    read: PrefillState,
    keys: UInt32['B 2'] | None,
    *,
    settings: GenerationConfig,
) -> tuple[DecodeState, PrefillState]:
    return decode_step(decode.make_decode_step(model, params), texts, read, settings, keys)


def tokens(
    model: Blip2Module,
    params: Params,
    read: PrefillState,
    settings: GenerationConfig,
    keys: UInt32['B 2'] | None = None,
) -> Iterator[tuple[np.ndarray, PrefillState]]:
    """Yield the next token of each row [B], and what was read before it; ends when every text has."""
    texts = _first(read, keys, settings=settings)
    while True:
        count = int(texts.count)
        yield np.asarray(texts.tokens[:, count - 1]), read
        if count == settings.max_new_tokens or texts.ended.all():
            return
        texts, read = _next(model, params, texts, read, keys, settings=settings)


def pieces(tokenizer: LmTokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield text as its ids come; joined, the pieces are the whole text without blanks at its ends."""
    said, written = '', []
    for token in ids:
        written.append(token)
        yield (new := piece(tokenizer, written, said))
        said += new
    yield piece(tokenizer, written, said, last=True)


def piece(tokenizer: LmTokenizer, ids: Sequence[int], said: str, last: bool = False) -> str:
    """Return what can be said of a text beyond what was said, perhaps nothing.

    A character of several tokens comes with its last one, and a blank with the word behind it; what is half there at
    the end comes with `last`.
    """
    text = tokenizer.decode(ids).strip()
    return text[len(said) :] if last or not text.endswith(_CUT) else ''
