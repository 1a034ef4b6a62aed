"""Drawn tokens: from the right distribution, by a key of their own, under the rules that greedy search obeys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qformer_jax.errors import UserError
from qformer_jax.inference.generate import (
    GenerationConfig,
    PrefillState,
    generate,
    init_state,
    row_keys,
    sample_token,
    warp_logits,
)

VOCAB, END = 6, 5
TABLE = np.random.default_rng(1).normal(0, 1.5, size=(VOCAB + 1, VOCAB)).astype(np.float32)  # the last row is the start
SETTINGS = GenerationConfig(2, temperature=0.7, top_k=4, top_p=0.8, end_ids=(END,))
CRITICAL = 25.74  # chi-square with 8 degrees of freedom, p = 0.0012; fewer degrees only make it stricter to miss


def step(cache, last):
    return jnp.asarray(TABLE)[last], cache


def start(rows: int) -> PrefillState:
    logits = jnp.tile(jnp.asarray(TABLE[-1:]), (rows, 1))
    return PrefillState(logits, jnp.int32(0), jnp.full((rows, 1), 1), jnp.ones((rows, 1), bool))


def draw(settings: GenerationConfig, rows: int, seed: int = 0):
    keys = row_keys(jax.random.key(seed), rows)
    return jax.jit(lambda start, keys: generate(step, start, settings, keys))(start(rows), keys)


def by_the_book(logits: np.ndarray, s: GenerationConfig) -> np.ndarray:
    """Return the probabilities to draw from, in float64: temperature, then top k, then top p."""
    logits = logits.astype(np.float64) / s.temperature
    order = np.argsort(-logits)
    kept = order[: s.top_k or None]
    p = np.exp(logits[kept] - logits[kept].max())
    p /= p.sum()
    kept = kept[: np.searchsorted(p.cumsum(), s.top_p) + 1]  # up to and with the token that reaches top_p
    out = np.zeros(len(logits))
    out[kept] = np.exp(logits[kept])
    return out / out.sum()


@pytest.mark.parametrize(
    'cut',
    [{}, {'top_k': 0, 'top_p': 1.0}, {'top_k': 2, 'top_p': 1.0}, {'top_k': 0, 'top_p': 0.6}, {'temperature': 2.0}],
)
def test_tokens_follow_the_distribution(cut):
    """First tokens, and second ones after each first: chi-square over 4000 rows."""
    s = dataclasses.replace(SETTINGS, **cut)
    tokens = np.asarray(draw(s, 4000).tokens[:, 0])
    for state, drawn in ((VOCAB, tokens[:, 0]), *((t, tokens[tokens[:, 0] == t, 1]) for t in range(END))):
        want = by_the_book(TABLE[state], s) * len(drawn)
        counts = np.bincount(drawn, minlength=VOCAB)
        assert not counts[want == 0].any()
        likely = want > 5
        assert (((counts - want) ** 2)[likely] / want[likely]).sum() < CRITICAL


def test_what_is_cut_is_what_transformers_cuts():
    transformers = pytest.importorskip('transformers', reason='the other library is Hugging Face')
    torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
    logits = np.random.default_rng(2).normal(0, 2, size=(50, 40)).astype(np.float32)
    expected = torch.tensor(logits)
    for warper in (
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(12),
        transformers.TopPLogitsWarper(0.8),
    ):
        expected = warper(None, expected)
    computed = warp_logits(jnp.asarray(logits), GenerationConfig(temperature=0.7, top_k=12, top_p=0.8))
    np.testing.assert_array_equal(np.isfinite(computed), np.isfinite(expected.numpy()))
    np.testing.assert_allclose(computed, expected.numpy(), rtol=1e-6)


def test_a_row_draws_alone():
    few, many = draw(SETTINGS, 3), draw(SETTINGS, 9)
    np.testing.assert_array_equal(few.tokens, many.tokens[:3])
    assert len({tuple(row) for row in np.asarray(many.tokens[:, 0]).tolist()}) > 1
    assert not np.array_equal(many.tokens, draw(SETTINGS, 9, seed=1).tokens)


def test_texts_of_a_row_differ_and_stand_best_first():
    s = dataclasses.replace(SETTINGS, num_return=40, top_k=0, top_p=1.0, max_new_tokens=4)
    found = draw(s, 2)
    assert found.tokens.shape == (2, 40, 4)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    texts = [{tuple(text) for text in row} for row in np.asarray(found.tokens).tolist()]
    assert min(map(len, texts)) > 20 and texts[0] != texts[1]


def test_scores_are_of_the_drawn_tokens():
    s = dataclasses.replace(SETTINGS, length_rule='generated', temperature=3.0)
    found = draw(s, 20)
    log_p = np.asarray(jax.nn.log_softmax(TABLE))
    for (text,), (score,) in zip(np.asarray(found.tokens), np.asarray(found.scores), strict=True):
        parts = [log_p[-1, text[0]], *([log_p[text[0], text[1]]] if text[0] != END else [])]
        np.testing.assert_allclose(score, np.mean(parts), rtol=1e-5)


def test_the_other_rules_hold_for_drawn_texts():
    ends = np.asarray(draw(dataclasses.replace(SETTINGS, temperature=5.0, top_k=0, top_p=1.0), 200).tokens[:, 0, 0])
    assert (ends == END).any()
    late = dataclasses.replace(SETTINGS, temperature=5.0, top_k=0, top_p=1.0, min_new_tokens=1)
    assert not (np.asarray(draw(late, 200).tokens[:, 0, 0]) == END).any()
    new = dataclasses.replace(SETTINGS, top_k=1, top_p=1.0, repetition_penalty=1e6)
    assert not (np.asarray(draw(new, 5).tokens) == 1).any(), 'the prompt says 1'


@pytest.mark.parametrize(
    'wrong, message',
    [
        ({'temperature': -1.0}, 'must be a number from 0 on'),
        ({'temperature': float('nan')}, 'must be a number from 0 on'),
        ({'temperature': float('inf')}, 'must be a number from 0 on'),
        ({'temperature': 1.0, 'top_k': -1}, 'top_k -1 must not be below 0'),
        ({'temperature': 1.0, 'top_p': float('nan')}, r'top_p \S+ must be in \(0, 1\]'),
        ({'temperature': 1.0, 'top_p': 0.0}, r'top_p \S+ must be in \(0, 1\]'),
        ({'top_k': 3}, 'give a temperature'),
        ({'temperature': 1.0, 'num_beams': 2}, 'drawn .* or searched'),
    ],
)
def test_settings_that_contradict_themselves_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**wrong)


def test_a_temperature_needs_a_key():
    for draw in (
        generate,
        lambda _, read, s: sample_token(init_state(read, s), read, s, None),
    ):  # at once, and token by token
        with pytest.raises(UserError, match=r'give a key, as jax\.random\.key\(0\)'):
            draw(step, start(1), SETTINGS)
