"""How likely given answers are: prefix and prompt are read once a picture, then every candidate goes on from there.

The score of a candidate is log p(candidate, end | picture, prompt) in nats, summed over its tokens, as LAVIS ranks:
InstructBLIP with T5 adds up the losses of the tokens and of the end token; with Vicuna it adds up the tokens' without
the end, over the length of the padded row, which is the same for all candidates. A sum favours short candidates; the
rule 'mean' divides by the number of tokens, end included.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..data.tokenizers import LmTokenizer, lm_row, pad
from ..errors import UserError
from ..models.blip2 import Blip2Module, Prefix
from ..objectives import captioning
from ..typing import Array, Bool, Float, Int, Params
from . import decode

Rule = Literal['sum', 'mean']


def rows(
    tokenizer: LmTokenizer, prompts: Sequence[str], candidates: Sequence[Sequence[str]]
) -> tuple[Int['N C G'], Bool['N C G']]:
    """Return the ids that each candidate adds to its prompt, end token included, and which of them exist.

    G is a power of two above 1, C the longest list's; of what a shorter list lacks, nothing exists. Raises UserError
    for an empty list.
    """
    if not all(candidates):
        raise UserError('no candidate given: name at least one answer for every question')
    pairs = zip(prompts, candidates, strict=True)
    ids = [[_target(tokenizer, prompt, text) for text in texts] for prompt, texts in pairs]
    longest = max(len(target) for row in ids for target in row)
    length = max(2, 1 << (longest - 1).bit_length())
    shape = len(ids), max(map(len, ids)), length
    tokens, token_mask = np.full(shape, tokenizer.pad_id, np.int32), np.zeros(shape, bool)
    for n, row in enumerate(ids):
        for c, target in enumerate(row):
            tokens[n, c], token_mask[n, c] = pad(target, length, tokenizer.pad_id)
    return tokens, token_mask


def _target(tokenizer: LmTokenizer, prompt: str, text: str) -> list[int]:
    ids, begin = lm_row(tokenizer, prompt, text)
    return ids[begin:]


@partial(jax.jit, static_argnames=('model', 'rows_at_once'))
def scores(
    model: Blip2Module,
    params: Params,
    prefix: Prefix,
    prompt: Int['B T'],
    prompt_mask: Bool['B T'],
    candidates: Int['B C G'],
    candidate_mask: Bool['B C G'],
    *,
    rows_at_once: int,
) -> Float['B C']:
    """Return the summed log p of each candidate's tokens after [prefix, left-padded prompt].

    Candidate c of all rows goes through together, and as many candidates side by side as `rows_at_once` rows allow;
    all continue the same cache.
    """
    _, start = decode.prefill_lm(model, params, prefix, prompt, prompt_mask, candidates.shape[2])
    go_on = partial(nn.apply(_read_on, model), {'params': params}, start.cache)

    def score(candidate: tuple[Int['B G'], Bool['B G']]) -> Float['B']:
        tokens, real = candidate
        later = go_on(tokens[:, :-1], real[:, :-1])
        logits = jnp.concatenate([start.logits[:, None], later], axis=1)
        return -(captioning.token_losses(logits, tokens) * real).sum(axis=1)

    each = jax.tree.map(lambda x: x.swapaxes(0, 1), (candidates, candidate_mask))
    return jax.lax.map(score, each, batch_size=max(1, rows_at_once // len(prompt))).T


def _read_on(model: Blip2Module, cache, tokens: Int['B T'], token_mask: Bool['B T']) -> Array:
    """Return the logits after each token of a text that goes on where the cache ends."""
    return model.lm.word_logits(model.lm_forward(model.lm.embed(tokens), token_mask, cache).hidden)
