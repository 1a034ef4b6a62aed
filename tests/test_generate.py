"""Search over a step that costs nothing: its logits are drawn from a table by everything that was written so far."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qformer_jax.errors import UserError
from qformer_jax.inference.generate import (
    GenerationConfig,
    GenerationOutput,
    PrefillState,
    beam_search,
    generate,
    step_scores,
)

VOCAB, STATES, END, LIMIT = 4, 61, 3, 4
TABLE = np.random.default_rng(0).normal(-9, 1, size=(STATES, VOCAB)).astype(np.float32)  # all negative
ROWS = 24
PROMPT = np.tile(np.array([[0, 0, 2], [0, 1, 2], [2, 1, 0]], np.int32), (ROWS // 3, 1))
PROMPT_MASK = np.tile(np.array([[0, 0, 1], [0, 1, 1], [1, 1, 1]], bool), (ROWS // 3, 1))
RULES = [(rule, penalty) for rule in ('lavis', 'generated') for penalty in (-1.0, 2.0)]


def follow(state, token):
    """Return the state after a token: a cache that goes to a wrong beam shows at once."""
    return (state * 7 + token + 11) % STATES


def step(cache, last):
    state = follow(cache['state'], last)
    return jnp.asarray(TABLE)[state], {'state': state, 'shared': cache['shared'] + 1}


def start(rows=slice(None)) -> PrefillState:
    state = jnp.arange(10, 10 + ROWS)[rows]
    cache = {'state': state, 'shared': jnp.int32(0)}  # a scalar belongs to all rows
    return PrefillState(jnp.asarray(TABLE)[state], cache, jnp.asarray(PROMPT[rows]), jnp.asarray(PROMPT_MASK[rows]))


def find(settings: GenerationConfig, rows=slice(None), method=generate) -> GenerationOutput:
    return jax.jit(lambda start: method(step, start, settings))(start(rows))


def text_score(row: int, tokens: tuple[int, ...], rule: str, penalty: float) -> float:
    """Return the score of a text by the book, one token after the other in float64."""
    state, total, new = 10 + row, 0.0, 0
    for token in tokens:
        logits = TABLE[state].astype(np.float64)
        total += logits[token] - np.log(np.exp(logits).sum())
        state, new = follow(state, token), new + (token != END)
    length = PROMPT_MASK[row].sum() + new if rule == 'lavis' else len(tokens)
    return total / length**penalty


def texts(tokens) -> list[tuple[int, ...]]:
    """Return rows of tokens up to their end token, which they keep."""
    rows = [tuple(row.tolist()) for row in np.asarray(tokens)]
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


def every_text() -> list[tuple[int, ...]]:
    """Return all texts of at most LIMIT tokens: ended, or of that length."""
    alive = range(END)
    ended = [(*words, END) for n in range(LIMIT) for words in itertools.product(alive, repeat=n)]
    return ended + list(itertools.product(alive, repeat=LIMIT))


@pytest.mark.parametrize('rule, penalty', RULES)
def test_with_as_many_beams_as_texts_the_best_of_all_are_found(rule, penalty):
    many = len(every_text())
    settings = GenerationConfig(
        LIMIT, num_beams=many, num_return=3, length_penalty=penalty, length_rule=rule, end_ids=(END,)
    )
    written = find(settings)
    for row in range(3):
        best = sorted(every_text(), key=lambda text: -text_score(row, text, rule, penalty))[:3]
        assert texts(written.tokens[row]) == best
        np.testing.assert_allclose(written.scores[row], [text_score(row, t, rule, penalty) for t in best], rtol=1e-5)


def by_the_book(row: int, s: GenerationConfig) -> list[tuple[tuple[int, ...], float]]:
    """Return texts and scores of a beam search written as its definition reads: lists, no cache, one row."""
    score = lambda text: text_score(row, text, s.length_rule, s.length_penalty)  # noqa: E731
    total = lambda text: text_score(row, text, 'generated', 0)  # noqa: E731
    ended, beams = [], [()]
    for count in range(s.max_new_tokens):
        tokens = range(VOCAB) if count >= s.min_new_tokens else range(END)
        grown = sorted(((*beam, token) for beam in beams for token in tokens), key=total, reverse=True)
        ended += [text for text in grown[: s.num_beams] if text[-1] == END]
        ended = sorted(ended, key=score, reverse=True)[: s.num_beams]
        beams = [text for text in grown[: 2 * s.num_beams] if text[-1] != END][: s.num_beams]
        # may the likeliest text still win? 4.25 asks about the likeliest of all, 5 about the likeliest that goes on
        likeliest = grown[0] if s.length_rule == 'lavis' else beams[0]
        length = PROMPT_MASK[row].sum() + count if s.length_rule == 'lavis' else count + 1
        if len(ended) == s.num_beams and score(ended[-1]) >= total(likeliest) / length**s.length_penalty:
            beams = []
            break
    best = sorted(ended + beams, key=score, reverse=True)[: s.num_return]
    return [(text, score(text)) for text in best]


@pytest.mark.parametrize('rule, penalty', RULES)
@pytest.mark.parametrize('beams, least', [(2, 0), (3, 2), (5, 0)])
def test_beams_are_what_the_definition_says(rule, penalty, beams, least):
    settings = GenerationConfig(9, least, beams, 2, penalty, length_rule=rule, end_ids=(END,))
    written = find(settings)
    for row in range(ROWS):
        want = by_the_book(row, settings)
        assert texts(written.tokens[row]) == [text for text, _ in want]
        np.testing.assert_allclose(written.scores[row], [score for _, score in want], rtol=1e-5)


@pytest.mark.parametrize('rule, penalty', RULES)
def test_one_beam_is_greedy(rule, penalty):
    settings = GenerationConfig(9, 2, length_penalty=penalty, length_rule=rule, end_ids=(END,))
    greedy, beam = find(settings), find(settings, method=beam_search)
    np.testing.assert_array_equal(greedy.tokens, beam.tokens)
    np.testing.assert_allclose(greedy.scores, beam.scores, rtol=1e-6)


@pytest.mark.parametrize('beams', [1, 3])
def test_a_row_is_written_as_if_it_were_alone(beams):
    """Rows end at different times: one that is done waits for the others and changes no more."""
    settings = GenerationConfig(12, num_beams=beams, num_return=beams, end_ids=(END,))
    batched = find(settings)
    assert len({len(rows[0]) for rows in map(texts, batched.tokens)}) > 1
    for row in range(3):
        alone = find(settings, slice(row, row + 1))
        np.testing.assert_array_equal(alone.tokens[0], batched.tokens[row])
        np.testing.assert_allclose(alone.scores[0], batched.scores[row], rtol=1e-6)


@pytest.mark.parametrize('beams', [1, 3])
def test_a_text_is_neither_too_short_nor_too_long(beams):
    short = GenerationConfig(8, 5, beams, beams, end_ids=(END,))
    lengths = [len(text) for row in find(short).tokens for text in texts(row)]
    assert min(lengths) >= 6 and max(lengths) <= 8  # five tokens, then the end token
    endless = find(GenerationConfig(8, 5, beams, beams))
    assert (np.asarray(endless.tokens) == END).any() and endless.tokens.shape == (ROWS, beams, 8)


def test_behind_its_end_a_text_is_filled():
    tokens = np.asarray(find(GenerationConfig(12, num_beams=3, num_return=3, end_ids=(END, 1))).tokens)
    ends = np.isin(tokens, (END, 1))
    first = ends.argmax(axis=2)
    behind = np.arange(12) > first[..., None]
    assert ends.any(axis=2).all() and (tokens[behind] == END).all()
    assert (np.take_along_axis(tokens, first[..., None], axis=2) == 1).any()  # the second kind of end ends texts too


def test_texts_come_best_first_and_differ():
    written = find(GenerationConfig(8, num_beams=4, num_return=4, end_ids=(END,)))
    assert (np.diff(written.scores, axis=1) <= 0).all()
    for row in written.tokens:
        assert len(set(texts(row))) == 4


@pytest.mark.parametrize('beams', [1, 3])
def test_under_a_large_penalty_no_token_comes_twice(beams):
    """Nor one of the prompt, as long as others are left; its padding, token 0, does not count."""
    for row in range(3):
        left = set(range(VOCAB)) - set(PROMPT[row][PROMPT_MASK[row]].tolist())
        settings = GenerationConfig(len(left), num_beams=beams, repetition_penalty=1e4)
        assert set(find(settings, slice(row, row + 1)).tokens[0, 0].tolist()) == left


def test_step_scores_are_what_greedy_search_saw():
    settings = GenerationConfig(8, 2, repetition_penalty=1.5, end_ids=(END,))
    tokens = find(settings).tokens[:, 0]
    scores = np.asarray(step_scores(step, start(), tokens, settings))
    for row, text in enumerate(texts(tokens)):
        assert tuple(scores[row].argmax(axis=-1)[: len(text)]) == text
    assert np.isneginf(scores[:, :2, END]).all() and np.isfinite(scores[:, 2:]).all()


@pytest.mark.parametrize('beams', [1, 2])
def test_float64_stays_float64(beams):
    def wide_step(cache, last):
        logits, cache = step(cache, last)
        return logits.astype(jnp.float64), cache

    with jax.enable_x64(True):
        wide = start()
        wide = wide.replace(logits=wide.logits.astype(jnp.float64))
        settings = GenerationConfig(num_beams=beams, end_ids=(END,))
        scores = jax.eval_shape(lambda x: generate(wide_step, x, settings).scores, wide)
        assert scores.dtype == jnp.float64


@pytest.mark.parametrize(
    'wrong, words',
    [
        ({'num_return': 2}, '2 texts a row need as many beams, not 1'),
        ({'num_beams': 0}, 'must be above 0'),
        ({'repetition_penalty': 0.0}, 'must be above 0'),
        ({'max_new_tokens': 3, 'min_new_tokens': 4}, 'min_new_tokens 4 exceeds max_new_tokens 3'),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        GenerationConfig(**wrong)
