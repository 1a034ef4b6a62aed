"""The windowed Q-Former: each window as if it were alone, and no token of a window in which nothing is."""

import dataclasses

import jax
import jax.export
import numpy as np
import pytest
import small
from reference import assert_close

from qformer_jax import config
from qformer_jax.errors import UserError
from qformer_jax.export.artifacts import artefact
from qformer_jax.export.functions import functions
from qformer_jax.models import blip2, connectors, masks
from qformer_jax.models.qformer import Qformer
from qformer_jax.rules import flatten, unflatten

C = config.ConnectorConfig('windowed', feature_width=6, tokens=2, width=16, depth=1, heads=2, mlp_width=32, window=3)
MODEL = config.Blip2Config(
    vit=None, qformer=None, connector=C, lm=dataclasses.replace(small.OPT, vocab_size=50, depth=1)
)
DRAW = np.random.default_rng(0)
WEIGHTS = {path: (DRAW.normal(size=x.shape) / 3).astype(np.float32) for path, x in flatten(blip2.shapes(MODEL)).items()}
PARAMS = unflatten(WEIGHTS)
FEATURES = DRAW.normal(size=(3, 7, 6)).astype(np.float32)
MASK = np.array([[1] * 7, [1, 1, 0, 0, 0, 0, 1], [1, 0, 1, 0, 0, 0, 0]], bool)


@jax.jit
def tokens(features, mask):
    return connectors.make(C, 'float32').apply({'params': PARAMS['connector']}, features, mask)


def test_each_window_is_read_as_if_it_were_alone():
    """By the Q-Former itself, over what exists of the window."""
    found, token_mask = tokens(FEATURES, MASK)
    assert found.shape == (3, 6, 16)
    np.testing.assert_array_equal(token_mask, [[1] * 6, [1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0]])
    layers = config.QformerConfig(
        feature_width=6, num_queries=2, width=16, depth=1, heads=2, mlp_width=32, cross_attention_freq=1,
        text_side='none',
    )  # fmt: skip

    def alone(q, x):
        memory = q.project_normalised(x[None], np.ones((1, len(x)), bool))
        return q(masks.bidirectional(2, np.ones((1, 0), bool)), image=memory).queries[0]

    for row in range(3):
        for window in range(3):
            at = slice(3 * window, 3 * window + 3)
            x = FEATURES[row, at][MASK[row, at]]
            if len(x):
                want = Qformer(layers).apply({'params': PARAMS['connector']['qformer']}, x, method=alone)
                assert_close(found[row, 2 * window : 2 * window + 2], want)


def test_a_token_depends_on_its_window_only():
    for token, visible in ((0, [1, 1, 1, 0, 0, 0, 0]), (3, [0, 0, 0, 1, 1, 1, 0]), (5, [0] * 6 + [1])):
        slope = jax.grad(lambda x, token=token: tokens(x, MASK)[0][0, token].sum())(FEATURES)
        np.testing.assert_array_equal(np.abs(slope[0]).max(axis=-1) > 0, np.array(visible, bool))


def test_padding_moves_nothing():
    """Two more windows of nothing: the same tokens, of which the language model reads those that exist."""
    longer = np.pad(FEATURES, ((0, 0), (0, 5), (0, 0)), constant_values=9.0)
    there = np.pad(MASK, ((0, 0), (0, 5)))
    (found, token_mask), (more, still) = tokens(FEATURES, MASK), tokens(longer, there)
    assert_close(more[:, :6][token_mask], found[token_mask])
    np.testing.assert_array_equal(still, np.pad(token_mask, ((0, 0), (0, 2))))
    prefix = jax.jit(lambda x, m: blip2.Blip2Module(MODEL).apply({'params': PARAMS}, x, m, method='soft_prefix'))
    short, long = prefix(FEATURES, MASK), prefix(longer, there)
    for row in range(3):
        assert_close(long.vectors[row][long.mask[row]], short.vectors[row][short.mask[row]])


def test_every_parameter_learns_and_none_is_idle():
    loss = lambda params: (connectors.make(C, 'float32').apply({'params': params}, FEATURES, MASK)[0] ** 2).sum()  # noqa: E731
    slope = flatten(jax.jit(jax.grad(loss))(PARAMS['connector']))
    still = {path for path, x in slope.items() if not np.abs(x).max() > 0}
    assert all(path.endswith('key/bias') for path in still), still
    assert not [path for path in slope if 'feature_norm' in path], 'the connector has been given normed features'


def test_an_artefact_takes_sequences_of_any_length():
    part = functions(config.Run('stage2', MODEL), WEIGHTS)[0]
    outside = jax.export.deserialize(bytearray(artefact(part).serialize()))
    weights = {path: WEIGHTS[path] for path in part.weights}
    for length in (2, 7):
        inputs = FEATURES[:2, :length], MASK[:2, :length]
        inside = jax.jit(part.call)(weights, *inputs)
        for found, want in zip(jax.jit(outside.call)(weights, *inputs), inside, strict=True):
            np.testing.assert_allclose(found, want, atol=1e-5)


def test_an_empty_window_is_refused():
    with pytest.raises(UserError, match=r'model\.connector\.window is 0'):
        dataclasses.replace(C, window=0)
