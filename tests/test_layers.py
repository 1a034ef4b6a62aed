"""The dense layer's product: one row of bfloat16 takes the way of two, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qformer_jax.models.layers import Dense

DRAW = np.random.default_rng(0)
ROWS = jnp.asarray(DRAW.standard_normal((4, 1, 48)), jnp.float32)


@pytest.mark.parametrize('dtype, limit', [(jnp.float32, 1e-6), (jnp.bfloat16, 8e-3)])
def test_a_row_alone_is_that_row_among_others(dtype, limit):
    layer = Dense(32, dtype)
    params = layer.init(jax.random.key(0), ROWS)
    whole = layer.apply(params, ROWS)
    alone = jnp.concatenate([layer.apply(params, row[None]) for row in ROWS])
    assert alone.shape == whole.shape and alone.dtype == whole.dtype == dtype
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (alone, whole)), rtol=limit, atol=limit)


def test_one_row_of_bfloat16_makes_no_product_of_one_row():
    """XLA would make a sum down the columns of it, which is slow on GPUs; the other types are left as they are."""

    def products(dtype, rows):
        layer = Dense(32, dtype)
        x = jnp.ones((rows, 48))
        jaxpr = jax.make_jaxpr(layer.apply)(layer.init(jax.random.key(0), x), x)
        return [e.outvars[0].aval.shape[0] for e in jaxpr.jaxpr.eqns if e.primitive.name == 'dot_general']

    assert products(jnp.bfloat16, 1) == [2]
    assert products(jnp.bfloat16, 3) == [3] and products(jnp.float32, 1) == [1]
