"""Pooling against torch's adaptive average pooling and a loop, and the grids that features may be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import assert_close

from qformer_jax.errors import UserError
from qformer_jax.models import pooling

DRAW = np.random.default_rng(0)
FEATURES = DRAW.normal(size=(3, 7, 5)).astype(np.float32)
ALL = np.ones((3, 7), bool)


@pytest.mark.parametrize('rows', [1, 3, 7, 10])
def test_a_sequence_is_pooled_as_torch_does(rows):
    want = torch.nn.AdaptiveAvgPool1d(rows)(torch.from_numpy(FEATURES).swapaxes(1, 2)).swapaxes(1, 2)
    assert_close(pooling.pool(FEATURES, ALL, rows), want)


def test_the_drawing_is_what_is_cut():
    rows = [line.ljust(30) for line in pooling.__doc__.splitlines() if line.startswith('    row')]
    drawn = [[row[15 + 2 * feature] == 'x' for feature in range(7)] for row in rows]
    np.testing.assert_array_equal(pooling.cut(jnp.arange(7)[None], jnp.full(1, 7), 3)[0], drawn)


def test_only_what_exists_is_pooled():
    """Holes anywhere, fewer features than rows, and none: each picture as if it were alone with what it has."""
    mask = np.array([[1, 0, 1, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0, 1], [0] * 7], bool)
    found = pooling.pool(FEATURES, mask, 3)
    for picture in range(2):
        has = FEATURES[picture][mask[picture]]
        assert_close(found[picture], pooling.pool(has[None], np.ones((1, len(has)), bool), 3)[0])
    np.testing.assert_array_equal(found[2], 0)
    slope = jax.grad(lambda x: jnp.square(pooling.pool(x, mask, 3)).sum())(FEATURES)
    np.testing.assert_array_equal(np.abs(slope).max(axis=-1) > 0, mask)


@pytest.mark.parametrize('first', [0, 1])
def test_a_grid_is_pooled_as_torch_does(first):
    features = DRAW.normal(size=(2, 25 + first, 3)).astype(np.float32)
    square = torch.from_numpy(features[:, first:]).reshape(2, 5, 5, 3).permute(0, 3, 1, 2)
    want = torch.nn.AdaptiveAvgPool2d(2)(square).permute(0, 2, 3, 1).reshape(2, 4, 3)
    assert_close(pooling.pool_grid(features, 2), want)


def test_what_is_a_grid():
    assert [pooling.grid(n) for n in (1, 2, 4, 5, 256, 257)] == [(1, 0), (1, 1), (2, 0), (2, 1), (16, 0), (16, 1)]
    for wrong in (0, 3, 7, 255, 258):
        with pytest.raises(UserError, match=f'{wrong} features are no square grid'):
            pooling.grid(wrong)
