"""Rows of a batch, with prompts of drawn lengths: each is written as if it were alone, in every family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_stream import LMS, drawn

from qformer_jax.inference import decode
from qformer_jax.inference.generate import GenerationConfig, generate, step_scores
from qformer_jax.models import blip2

DRAW = np.random.default_rng(7)
LENGTHS = np.array([0, 1, *DRAW.integers(2, 9, size=4)])
"""Tokens of each row's prompt: none, one, and drawn ones."""
ROWS = [DRAW.integers(4, 40, size=length).astype(np.int32) for length in LENGTHS]
PREFIX = DRAW.standard_normal((6, 2, 16), dtype=np.float32)
NEW = 6


def padded(rows: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts at the right end of `width` places, and which places they take."""
    ids = np.stack([np.pad(row, (width - len(row), 0)) for row in rows])
    return ids, np.arange(width)[None] >= width - np.array([len(row) for row in rows])[:, None]


@functools.partial(jax.jit, static_argnames=('model', 'settings'))
def written(model, params, prefix, ids, prompt_mask, settings):
    """Return what is written, and the scores of every word at each step of the first text."""
    given = blip2.Prefix.whole(prefix), ids, prompt_mask
    step, start = decode.prefill_lm(model, params, *given, settings.max_new_tokens)
    found = generate(step, start, settings)
    return found, step_scores(step, start, found.tokens[:, 0], settings)


@pytest.mark.parametrize('beams', [1, 3])
@pytest.mark.parametrize('lm', LMS, ids=lambda lm: lm.family)
def test_a_row_is_what_it_is_alone_however_it_is_padded(lm, beams):
    """Scores to 1e-5; words wherever the best is ahead of the second by more than 1e-4."""
    model, params = drawn(lm)
    settings = GenerationConfig(NEW, 2, beams, end_ids=(3, 9))
    batched, scores = written(model, params, PREFIX, *padded(ROWS, max(LENGTHS)), settings)
    for row, prompt in enumerate(ROWS):
        alone, same = written(model, params, PREFIX[row : row + 1], *padded([prompt], max(LENGTHS) + 5), settings)
        best = jnp.sort(same[0], axis=-1)
        sure = np.cumprod(best[:, -1] - best[:, -2] > 1e-4).astype(bool)
        np.testing.assert_array_equal(np.asarray(batched.tokens[row, 0])[sure], np.asarray(alone.tokens[0, 0])[sure])
        if sure.all():
            finite = np.isfinite(same[0])
            np.testing.assert_allclose(scores[row][finite], same[0][finite], rtol=1e-5, atol=1e-5)
        assert sure[0]


def end_of(found, ends: tuple[int, ...]) -> np.ndarray:
    """Return where the first end token of each row stands."""
    return np.argmax(np.isin(found.tokens[:, 0], ends), axis=1)


@pytest.mark.parametrize('lm', LMS[1:], ids=lambda lm: lm.family)
def test_texts_are_as_long_as_asked_and_stop_where_asked(lm):
    model, params = drawn(lm)
    ids, prompt_mask = padded(ROWS, max(LENGTHS))
    free, _ = written(model, params, PREFIX, ids, prompt_mask, GenerationConfig(NEW))
    ends = tuple(map(int, np.unique(free.tokens[:, 0, 1])))  # each row's second word ends it, if it may
    soon, _ = written(model, params, PREFIX, ids, prompt_mask, GenerationConfig(NEW, end_ids=ends))
    late, _ = written(model, params, PREFIX, ids, prompt_mask, GenerationConfig(NEW, min_new_tokens=4, end_ids=ends))
    assert (end_of(soon, ends) <= 1).all() and np.isin(soon.tokens[:, 0, 2:], ends).all()
    assert not np.isin(late.tokens[:, 0, :4], ends).any()
