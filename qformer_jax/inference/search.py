"""Greedy and beam search as one compiled loop over an abstract step; knows no network.

    Start (logits, cache) --> choose --> step(cache, last tokens) --> choose --> ... until every row has ended

Two rules exist for what a text scores (total = the sum of log p of its tokens, the end token's included):

    'lavis'      total / (prompt ids + new ids, end token not counted) ** length_penalty   transformers 4.25 (LAVIS)
    'generated'  total / (new ids, end token counted) ** length_penalty                    transformers 5

They choose other beams from the same logits; greedy search is the same. A repetition penalty acts on log p in beam
search and on raw logits in greedy search, in either library, so that one beam and greedy search differ under it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from ..errors import UserError
from ..typing import Array, Bool, Float, Int

UNBORN = -1e9  # total of beams that do not exist yet: all start as copies of the first
Step = Callable[[Any, Int['R']], tuple[Float['R N'], Any]]
"""(cache, last token of each row) -> (logits of the next one, cache); cache leaves are [R, ...], or scalars of all."""


@dataclass(frozen=True)
class Settings:
    """How to write; the defaults are greedy."""

    max_new_tokens: int = 20
    """Longest text, in tokens."""
    min_new_tokens: int = 0
    """Tokens before a text may end."""
    num_beams: int = 1
    """Texts that are pursued at a time; 1: greedy."""
    num_return: int = 1
    """Texts to return for each row, best first; at most as many as beams."""
    length_penalty: float = 1.0
    """Exponent of the length in a text's score: above 0 favours long texts, below 0 short ones."""
    repetition_penalty: float = 1.0
    """Factor by which tokens of the prompt, or written before, become less likely; 1: none."""
    length_rule: Literal['lavis', 'generated'] = 'lavis'
    """What counts as the length: prompt and text without its end token, or the text with it."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end a text."""

    def __post_init__(self):
        if min(self.max_new_tokens, self.num_beams, self.num_return) < 1 or self.repetition_penalty <= 0:
            raise UserError(f'{self}: tokens, beams, returned texts and the repetition penalty must be above 0')
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f'min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}')
        if self.num_return > self.num_beams:
            raise UserError(f'{self.num_return} texts a row need as many beams, not {self.num_beams}: raise num_beams')

    @property
    def fill(self) -> int:
        """What stands behind the end of a text."""
        return self.end_ids[0] if self.end_ids else 0


@struct.dataclass
class Start:
    """A prompt that was read: what the search begins with."""

    logits: Float['B N']
    """Of the first new token."""
    cache: Any
    prompt: Int['B T']
    """Ids that penalties and lengths count as the prompt."""
    prompt_mask: Bool['B T']


@struct.dataclass
class Written:
    """What was written, best text first."""

    tokens: Int['B W G']
    """New tokens; from its end on, a text is filled with end tokens."""
    scores: Float['B W']
    """The sum of log p, divided as the length rule says (nats)."""


def search(step: Step, start: Start, settings: Settings) -> Written:
    """Write after a prompt: greedily with one beam, else with `num_beams`."""
    return (_greedy if settings.num_beams == 1 else beam_search)(step, start, settings)


def processed(scores: Float['R N'], start: Start, tokens: Int['R G'], count: Array | int, s: Settings) -> Float['R N']:
    """Return the scores of token number `count` under the repetition penalty and the smallest length."""
    if s.repetition_penalty != 1:
        rows = jnp.arange(len(tokens))[:, None]
        written = jnp.broadcast_to((jnp.arange(tokens.shape[1]) < count)[None], tokens.shape)
        said = jnp.zeros(scores.shape, bool).at[rows, start.prompt].max(start.prompt_mask)
        said = said.at[rows, tokens].max(written)
        less = jnp.where(scores < 0, scores * s.repetition_penalty, scores / s.repetition_penalty)
        scores = jnp.where(said, less, scores)
    if s.min_new_tokens:
        too_early = (count < s.min_new_tokens) & jnp.isin(jnp.arange(scores.shape[1]), jnp.array(s.end_ids, int))
        scores = jnp.where(too_early[None], -jnp.inf, scores)
    return scores


def step_scores(step: Step, start: Start, tokens: Int['B G'], settings: Settings) -> Float['B G N']:
    """Return the processed logits from which greedy search would choose each token, were it to write `tokens`."""

    def read(carry, count):
        scores = processed(carry[0], start, tokens, count, settings)
        return step(carry[1], tokens[:, count]), scores

    _, scores = jax.lax.scan(read, (start.logits, start.cache), jnp.arange(tokens.shape[1]))
    return scores.swapaxes(0, 1)


def _log_p(logits: Float['R N']) -> Float['R N']:
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


def _score(total: Float['B W'], start: Start, new: Array | int, ended: Array | bool, s: Settings) -> Float['B W']:
    """Return the scores of texts of `new` tokens, the end token of those that `ended` not among them."""
    if s.length_rule == 'lavis':
        length = start.prompt_mask.sum(axis=1, keepdims=True) + new
    else:
        length = jnp.asarray(new + ended)
    return total / length.astype(total.dtype) ** s.length_penalty


def _greedy(step: Step, start: Start, s: Settings) -> Written:
    batch = len(start.logits)
    ends = jnp.array(s.end_ids, int)

    def choose(count, tokens, total, ended, logits):
        token = processed(logits, start, tokens, count, s).argmax(axis=-1).astype(tokens.dtype)
        gain = jnp.take_along_axis(_log_p(logits), token[:, None], axis=1)[:, 0]
        tokens = tokens.at[:, count].set(jnp.where(ended, s.fill, token))
        return count + 1, tokens, total + jnp.where(ended, 0, gain), ended | jnp.isin(token, ends)

    def write(carry):
        (count, tokens, total, ended), cache = carry
        logits, cache = step(cache, tokens[:, count - 1])
        return choose(count, tokens, total, ended, logits), cache

    tokens = jnp.full((batch, s.max_new_tokens), s.fill, jnp.int32)
    first = choose(0, tokens, jnp.zeros(batch, _log_p(start.logits).dtype), jnp.zeros(batch, bool), start.logits)
    (_, tokens, total, ended), _ = jax.lax.while_loop(
        lambda carry: (carry[0][0] < s.max_new_tokens) & ~carry[0][3].all(), write, (first, start.cache)
    )
    new = (~jnp.isin(tokens, ends)).sum(axis=1, keepdims=True)
    return Written(tokens[:, None], _score(total[:, None], start, new, ended[:, None], s))


@struct.dataclass
class _Beams:
    """The texts that go on (W of them), and the best W that have ended."""

    count: Int['']
    tokens: Int['B W G']
    totals: Float['B W']
    parents: Int['B W']
    """Which beam each one continued last: its cache is that one's."""
    ended: Written
    """Scores are -inf where none has ended yet."""
    done: Bool['B']
    """Rows whose ended texts cannot be beaten any more; they change no more."""


def beam_search(step: Step, start: Start, settings: Settings) -> Written:
    """Pursue `num_beams` texts a row, until the best open one, were it to end here, beats none that has ended."""
    s, batch = settings, len(start.logits)
    wide = jax.tree.map(lambda x: jnp.repeat(x, s.num_beams, axis=0) if jnp.ndim(x) else x, start)

    def write(carry):
        beams, cache = carry
        rows = (jnp.arange(batch)[:, None] * s.num_beams + beams.parents).reshape(-1)
        cache = jax.tree.map(lambda x: x[rows] if jnp.ndim(x) else x, cache)
        logits, cache = step(cache, beams.tokens[:, :, beams.count - 1].reshape(-1))
        return _choose(beams, logits, start, wide, s), cache

    first = _choose(_unborn(batch, _log_p(start.logits).dtype, s), wide.logits, start, wide, s)
    beams, _ = jax.lax.while_loop(
        lambda carry: (carry[0].count < s.max_new_tokens) & ~carry[0].done.all(), write, (first, wide.cache)
    )
    cut = jnp.where(beams.done[:, None], -jnp.inf, _score(beams.totals, start, beams.count, False, s))
    return _best(s.num_return, beams.ended, Written(beams.tokens, cut))


def _unborn(batch: int, dtype, s: Settings) -> _Beams:
    tokens = jnp.full((batch, s.num_beams, s.max_new_tokens), s.fill, jnp.int32)
    totals = jnp.full((batch, s.num_beams), UNBORN, dtype).at[:, 0].set(0)
    none = Written(tokens, jnp.full(totals.shape, -jnp.inf, dtype))
    return _Beams(jnp.int32(0), tokens, totals, jnp.zeros(totals.shape, jnp.int32), none, jnp.zeros(batch, bool))


def _choose(beams: _Beams, logits: Float['R N'], start: Start, wide: Start, s: Settings) -> _Beams:
    """Continue each row's beams by one token: of the best continuations, some end, and W others go on."""
    (batch, width, _), vocab = beams.tokens.shape, logits.shape[1]
    flat = beams.tokens.reshape(batch * width, -1)
    log_p = processed(_log_p(logits), wide, flat, beams.count, s)
    totals = (beams.totals.reshape(-1, 1) + log_p).reshape(batch, -1)
    # enough to have W left if every end token of every beam is among them
    totals, place = jax.lax.top_k(totals, min(width * (1 + len(s.end_ids)), width * vocab))
    parents, token = jnp.divmod(place, vocab)
    tokens = _take(beams.tokens, parents).at[:, :, beams.count].set(token)

    ends = jnp.isin(token, jnp.array(s.end_ids, int))
    counts = ends & (jnp.arange(ends.shape[1]) < width)[None]  # an end that is not among the best W is dropped
    counts &= ~beams.done[:, None]
    scores = jnp.where(counts, _score(totals, start, beams.count, True, s), -jnp.inf)
    ended = _best(width, beams.ended, Written(tokens, scores))

    goes_on = jnp.argsort(ends, axis=1, stable=True)[:, :width]
    best = totals[:, :1] if s.length_rule == 'lavis' else _take(totals, goes_on)[:, :1]
    bound = _score(best, start, beams.count, True, s)[:, 0]
    return _Beams(
        beams.count + 1,
        _take(tokens, goes_on),
        _take(totals, goes_on),
        _take(parents, goes_on),
        ended,
        beams.done | (ended.scores.min(axis=1) >= bound),
    )


def _take(x: Array, beams: Int['B C']) -> Array:
    """Return the beams of each row that `beams` names."""
    return jnp.take_along_axis(x, beams.reshape(*beams.shape, *[1] * (x.ndim - 2)), axis=1)


def _best(width: int, these: Written, those: Written) -> Written:
    """Return the best `width` texts of each row, best first."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), these, those)
    scores, order = jax.lax.top_k(both.scores, width)
    return Written(_take(both.tokens, order), scores)
