"""The families of language models, an entry each: its module, and what it does around its layers.

Every module has `embed(ids)`, `__call__(x, token_mask, cache)`, which reads on from a cache, and `word_logits(hidden)`.
The functions of an entry take it bound. A decoder-only family needs no more than its module: they default to this:

    a decoder            reads [prefix, prompt] and goes on from its last position; positions count in its cache
    an encoder-decoder   its encoder reads [prefix, prompt], its decoder begins with a token of its own
"""

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn

from ..config import LmConfig
from ..typing import Bool, Float, Int, Size
from . import kv_cache, t5
from .kv_cache import KVCache
from .llama import Llama
from .opt import Opt


def decoder_prompt(prompt: Int['B T'], prompt_mask: Bool['B T']) -> tuple[Int['B T'], Bool['B T']]:
    """Return the ids that the decoder itself reads before it writes, and which of them exist: all of the prompt."""
    return prompt, prompt_mask


def prefill_inputs(
    lm: nn.Module, x: Float['B S L'], token_mask: Bool['B S'], new: Size
) -> tuple[Float['B S L'], Bool['B S'], KVCache]:
    """Return what the decoder reads of [prefix, prompt], all of it, and a cache with room for `new` tokens behind."""
    slots = x.shape[1] + new - 1  # the last token is not read
    return x, token_mask, kv_cache.empty(lm.config, x.shape[0], slots, lm.dtype)


def target_hidden_states(
    lm: nn.Module, x: Float['B S L'], token_mask: Bool['B S'], text: Int['B T'], target: Bool['B T']
) -> Float['B T L']:
    """Return the hidden states that predict each token of `text`, given [prefix, text].

    Slot Q + t holds token t, so its prediction leaves slot Q + t - 1: with 3 queries and 4 tokens, slots 2..5.
    """
    count = x.shape[1] - text.shape[1]
    return lm(x, token_mask).hidden[:, count - 1 : -1]


@dataclass(frozen=True)
class Family:
    """What is particular to a family; the defaults are a decoder's."""

    module: type[nn.Module]
    """The network, made of its configuration and a dtype."""
    decoder_prompt: Callable = decoder_prompt
    """(prompt, its mask) -> what the decoder itself reads of it."""
    prefill_inputs: Callable = prefill_inputs
    """(bound module, [prefix, prompt], its mask, new tokens) -> what the decoder reads first, its mask, its cache."""
    target_hidden_states: Callable = target_hidden_states
    """(bound module, [prefix, text], its mask, text, which of it is target) -> what predicts each target."""


FAMILIES = {
    'opt': Family(Opt),
    'llama': Family(Llama),
    't5': Family(t5.T5, t5.decoder_prompt, t5.prefill_inputs, t5.target_hidden_states),
}


def family_of(c: LmConfig) -> Family:
    """Return the entry of a language model's family."""
    return FAMILIES[c.family]
