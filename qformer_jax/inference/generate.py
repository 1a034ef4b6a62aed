"""Greedy search, sampling and beam search, each one compiled loop over an abstract step; knows no network.

    Start (logits, cache) --> choose --> step(cache, last tokens) --> choose --> ... until every row has ended

Two rules exist for what a text scores (total = the sum of log p of its tokens, the end token's included):

    'lavis'      total / (prompt ids + new ids, end token not counted) ** length_penalty   transformers 4.25 (LAVIS)
    'generated'  total / (new ids, end token counted) ** length_penalty                    transformers 5

They choose other beams from the same logits; greedy search is the same. A repetition penalty acts on log p in beam
search and on raw logits in greedy search, in either library, so that one beam and greedy search differ under it.

Sampling draws each token from softmax(logits / temperature), cut to the `top_k` likeliest and then to the likeliest
that together hold `top_p`. A row has a key of its own, and each of its tokens one of that: what a row draws depends on
no other row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from ..errors import UserError
from ..typing import Array, Bool, Float, Int, UInt32

NEG_INF = -1e9  # total of beams that do not exist yet: all start as copies of the first
Step = Callable[[Any, Int['R']], tuple[Float['R N'], Any]]
"""(cache, last token of each row) -> (logits of the next one, cache); cache leaves are [R, ...], or scalars of all."""


@dataclass(frozen=True)
class GenerationConfig:
    """How to write; the defaults are greedy."""

    max_new_tokens: int = 20
    """Longest text, in tokens."""
    min_new_tokens: int = 0
    """Tokens before a text may end."""
    num_beams: int = 1
    """Texts that are pursued at a time; 1: greedy."""
    num_return: int = 1
    """Texts to return for each row, best first; at most as many as beams, any number when tokens are drawn."""
    length_penalty: float = 1.0
    """Exponent of the length in a text's score: above 0 favours long texts, below 0 short ones."""
    repetition_penalty: float = 1.0
    """Factor by which tokens of the prompt, or written before, become less likely; 1: none."""
    length_rule: Literal['lavis', 'generated'] = 'lavis'
    """What counts as the length: prompt and text without its end token, or the text with it."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end a text."""
    temperature: float = 0.0
    """Above 0: draw tokens, from logits divided by it; 0: take the likeliest."""
    top_k: int = 0
    """Draw among so many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability (nucleus sampling); 1: all."""

    def __post_init__(self):
        for name in ('max_new_tokens', 'num_beams', 'num_return', 'repetition_penalty'):
            if not getattr(self, name) > 0:
                raise UserError(f'{name} {getattr(self, name)} must be above 0')
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f'min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}')
        if not 0 <= self.temperature < math.inf:
            raise UserError(f'temperature {self.temperature} must be a number from 0 on; 0: take the likeliest tokens')
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f'top_k {self.top_k} must not be below 0, and top_p {self.top_p} must be in (0, 1]')
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise UserError(
                'top_k and top_p cut what is drawn: give a temperature, 1 for the probabilities as they are'
            )
        if self.temperature and self.num_beams > 1:
            raise UserError(f'a text is drawn (temperature {self.temperature}) or searched ({self.num_beams} beams)')
        if not self.temperature and self.num_return > self.num_beams:
            raise UserError(f'{self.num_return} texts a row need as many beams, not {self.num_beams}, or a temperature')

    @property
    def fill(self) -> int:
        """What stands behind the end of a text."""
        return self.end_ids[0] if self.end_ids else 0


@struct.dataclass
class PrefillState:
    """What was read so far: at first the prompt."""

    logits: Float['B N']
    """Of the next token."""
    cache: Any
    prompt: Int['B T']
    """Ids that penalties and lengths count as the prompt."""
    prompt_mask: Bool['B T']


@dataclass(frozen=True)
class Text:
    """What was written."""

    text: str
    score: float
    """Sum of log p of its tokens, divided as the length rule of its settings says (nats)."""


@struct.dataclass
class GenerationOutput:
    """What was written, best text first."""

    tokens: Int['B W G']
    """New tokens; from its end on, a text is filled with end tokens."""
    scores: Float['B W']
    """The sum of log p, divided as the length rule says (nats)."""


def generate(
    step: Step, start: PrefillState, settings: GenerationConfig, keys: UInt32['B 2'] | None = None
) -> GenerationOutput:
    """Write after a prompt: drawn with a temperature (and `keys`), with `num_beams` beams, or greedily."""
    if settings.num_beams > 1:
        return beam_search(step, start, settings)
    return _sample(step, start, settings, keys)


def row_keys(key: jax.Array, rows: int) -> UInt32['B 2']:
    """Return a key (its data) for each row: row i has the same one whatever the number of rows."""
    return jax.random.key_data(jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows)))


def process_logits(
    scores: Float['R N'], start: PrefillState, tokens: Int['R G'], count: Array | int, s: GenerationConfig
) -> Float['R N']:
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


def step_scores(step: Step, start: PrefillState, tokens: Int['B G'], settings: GenerationConfig) -> Float['B G N']:
    """Return the processed logits from which greedy search would choose each token, were it to write `tokens`."""

    def read(carry, count):
        scores = process_logits(carry[0], start, tokens, count, settings)
        return step(carry[1], tokens[:, count]), scores

    _, scores = jax.lax.scan(read, (start.logits, start.cache), jnp.arange(tokens.shape[1]))
    return scores.swapaxes(0, 1)


def _log_p(logits: Float['R N']) -> Float['R N']:
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


def _score(
    total: Float['B W'], start: PrefillState, new: Array | int, ended: Array | bool, s: GenerationConfig
) -> Float['B W']:
    """Return the scores of texts of `new` tokens, the end token of those that `ended` not among them."""
    if s.length_rule == 'lavis':
        length = start.prompt_mask.sum(axis=1, keepdims=True) + new
    else:
        length = jnp.asarray(new + ended)
    return total / length.astype(total.dtype) ** s.length_penalty


@struct.dataclass
class DecodeState:
    """Texts on the way, one a row."""

    count: Int['']
    """Tokens written."""
    tokens: Int['B G']
    total: Float['B']
    """Sum of log p so far."""
    ended: Bool['B']


def init_state(start: PrefillState, s: GenerationConfig) -> DecodeState:
    """Return texts of which nothing is written."""
    batch, dtype = len(start.logits), _log_p(start.logits).dtype
    tokens = jnp.full((batch, s.max_new_tokens), s.fill, jnp.int32)
    return DecodeState(jnp.int32(0), tokens, jnp.zeros(batch, dtype), jnp.zeros(batch, bool))


def sample_token(
    texts: DecodeState, read: PrefillState, s: GenerationConfig, keys: UInt32['B 2'] | None
) -> DecodeState:
    """Write one token to each text that has not ended: a drawn one, or the likeliest.

    Raises UserError for a temperature without keys.
    """
    if s.temperature and keys is None:
        raise UserError(f'temperature {s.temperature} draws tokens: give a key, as jax.random.key(0)')
    scores = process_logits(read.logits, read, texts.tokens, texts.count, s)
    token = _draw(scores, texts.count, s, keys) if s.temperature else scores.argmax(axis=-1)
    token = token.astype(texts.tokens.dtype)
    gain = jnp.take_along_axis(_log_p(read.logits), token[:, None], axis=1)[:, 0]
    return DecodeState(
        texts.count + 1,
        texts.tokens.at[:, texts.count].set(jnp.where(texts.ended, s.fill, token)),
        texts.total + jnp.where(texts.ended, 0, gain),
        texts.ended | jnp.isin(token, jnp.array(s.end_ids, int)),
    )


def decode_step(
    step: Step, texts: DecodeState, read: PrefillState, s: GenerationConfig, keys: UInt32['B 2'] | None
) -> tuple[DecodeState, PrefillState]:
    """Read the last token of each text, and write the next one."""
    logits, cache = step(read.cache, texts.tokens[:, texts.count - 1])
    read = read.replace(logits=logits, cache=cache)
    return sample_token(texts, read, s, keys), read


def _sample(step: Step, start: PrefillState, s: GenerationConfig, keys: UInt32['B 2'] | None) -> GenerationOutput:
    if s.num_return > 1:  # text w of row b is row b * W + w
        start = _repeated(start, s.num_return)
        keys = jax.vmap(lambda key: row_keys(jax.random.wrap_key_data(key), s.num_return))(keys).reshape(-1, 2)
    texts, _ = jax.lax.while_loop(
        lambda carry: (carry[0].count < s.max_new_tokens) & ~carry[0].ended.all(),
        lambda carry: decode_step(step, *carry, s, keys),
        (sample_token(init_state(start, s), start, s, keys), start),
    )
    new = (~jnp.isin(texts.tokens, jnp.array(s.end_ids, int))).sum(axis=1, keepdims=True)
    scores = _score(texts.total[:, None], start, new, texts.ended[:, None], s)
    every = GenerationOutput(texts.tokens[:, None], scores)
    every = jax.tree.map(lambda x: x.reshape(-1, s.num_return, *x.shape[2:]), every)
    return _sorted(every, s.num_return)


def _repeated(start: PrefillState, times: int) -> PrefillState:
    """Return every row so many times, one beside the other; a scalar of the cache belongs to all rows."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0) if jnp.ndim(x) else x, start)


def _draw(scores: Float['B N'], count: Int[''], s: GenerationConfig, keys: UInt32['B 2']) -> Int['B']:
    """Draw a token a row, with the row's key for token number `count`."""
    each = jax.vmap(lambda key: jax.random.fold_in(jax.random.wrap_key_data(key), count))(keys)
    return jax.vmap(jax.random.categorical)(each, warp_logits(scores, s))


def warp_logits(scores: Float['R N'], s: GenerationConfig) -> Float['R N']:
    """Return the logits to draw from: divided by the temperature, -inf for what is cut."""
    scores = scores / s.temperature
    if s.top_k:
        smallest = jax.lax.top_k(scores, min(s.top_k, scores.shape[1]))[0][:, -1:]
        scores = jnp.where(scores < smallest, -jnp.inf, scores)
    if s.top_p < 1:  # a token stays if those before it hold less than top_p: 0.5, 0.3, 0.2 and 0.7 keep two
        likeliest = jnp.sort(scores, axis=1, descending=True)
        share = jax.nn.softmax(likeliest)
        stays = share.cumsum(axis=1) - share < s.top_p
        smallest = jnp.where(stays, likeliest, jnp.inf).min(axis=1, keepdims=True)
        scores = jnp.where(scores < smallest, -jnp.inf, scores)
    return scores


@struct.dataclass
class _Beams:
    """The texts that go on (W of them), and the best W that have ended."""

    count: Int['']
    tokens: Int['B W G']
    totals: Float['B W']
    parents: Int['B W']
    """Which beam each one continued last: its cache is that one's."""
    ended: GenerationOutput
    """Scores are -inf where none has ended yet."""
    done: Bool['B']
    """Rows whose ended texts cannot be beaten any more; they change no more."""


def beam_search(step: Step, start: PrefillState, settings: GenerationConfig) -> GenerationOutput:
    """Pursue `num_beams` texts a row, until the best open one, were it to end here, beats none that has ended."""
    s, batch = settings, len(start.logits)
    wide = _repeated(start, s.num_beams)

    def write(carry):
        beams, cache = carry
        rows = (jnp.arange(batch)[:, None] * s.num_beams + beams.parents).reshape(-1)
        cache = jax.tree.map(lambda x: x[rows] if jnp.ndim(x) else x, cache)
        logits, cache = step(cache, beams.tokens[:, :, beams.count - 1].reshape(-1))
        return _beam_step(beams, logits, start, wide, s), cache

    first = _beam_step(_init_beams(batch, _log_p(start.logits).dtype, s), wide.logits, start, wide, s)
    beams, _ = jax.lax.while_loop(
        lambda carry: (carry[0].count < s.max_new_tokens) & ~carry[0].done.all(), write, (first, wide.cache)
    )
    cut = jnp.where(beams.done[:, None], -jnp.inf, _score(beams.totals, start, beams.count, False, s))
    return _best(s.num_return, beams.ended, GenerationOutput(beams.tokens, cut))


def _init_beams(batch: int, dtype, s: GenerationConfig) -> _Beams:
    tokens = jnp.full((batch, s.num_beams, s.max_new_tokens), s.fill, jnp.int32)
    totals = jnp.full((batch, s.num_beams), NEG_INF, dtype).at[:, 0].set(0)
    none = GenerationOutput(tokens, jnp.full(totals.shape, -jnp.inf, dtype))
    return _Beams(jnp.int32(0), tokens, totals, jnp.zeros(totals.shape, jnp.int32), none, jnp.zeros(batch, bool))


def _beam_step(
    beams: _Beams, logits: Float['R N'], start: PrefillState, wide: PrefillState, s: GenerationConfig
) -> _Beams:
    """Continue each row's beams by one token: of the best continuations, some end, and W others go on."""
    (batch, width, _), vocab = beams.tokens.shape, logits.shape[1]
    flat = beams.tokens.reshape(batch * width, -1)
    log_p = process_logits(_log_p(logits), wide, flat, beams.count, s)
    totals = (beams.totals.reshape(-1, 1) + log_p).reshape(batch, -1)
    # enough to have W left if every end token of every beam is among them
    totals, place = jax.lax.top_k(totals, min(width * (1 + len(s.end_ids)), width * vocab))
    parents, token = jnp.divmod(place, vocab)
    tokens = _take(beams.tokens, parents).at[:, :, beams.count].set(token)

    ends = jnp.isin(token, jnp.array(s.end_ids, int))
    counts = ends & (jnp.arange(ends.shape[1]) < width)[None]  # an end that is not among the best W is dropped
    counts &= ~beams.done[:, None]
    scores = jnp.where(counts, _score(totals, start, beams.count, True, s), -jnp.inf)
    ended = _best(width, beams.ended, GenerationOutput(tokens, scores))

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


def _best(width: int, these: GenerationOutput, those: GenerationOutput) -> GenerationOutput:
    """Return the best `width` texts of each row, best first."""
    return _sorted(jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), these, those), width)


def _sorted(texts: GenerationOutput, width: int) -> GenerationOutput:
    scores, order = jax.lax.top_k(texts.scores, width)
    return GenerationOutput(_take(texts.tokens, order), scores)
