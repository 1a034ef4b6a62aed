"""Float64 in, float64 all the way: verification measures rounding by running the same code in both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qformer_jax import config
from qformer_jax.models import blip2
from qformer_jax.models.vit import resize_positions
from qformer_jax.training import losses
from qformer_jax.training.loss_context import LossContext

MODEL = config.Blip2Config(
    config.VitConfig(image_size=28, width=12, depth=1, heads=2, mlp_width=16),
    config.QformerConfig(
        feature_width=12,
        num_queries=2,
        width=8,
        depth=2,
        heads=2,
        mlp_width=12,
        vocab_size=20,
        max_positions=8,
        embed_width=4,
    ),
    config.OptConfig(vocab_size=20, width=8, depth=1, heads=2, mlp_width=12, max_positions=16),
)
LLAMA = config.LlamaConfig(
    vocab_size=20, width=8, depth=1, heads=2, kv_heads=1, head_width=4, mlp_width=12, max_positions=16
)
T5 = config.T5Config(
    vocab_size=20, width=8, depth=1, decoder_depth=1, heads=2, head_width=4, mlp_width=12, buckets=4, max_distance=8
)
BATCH = {
    'image': np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3)).astype(np.uint8),
    'text': np.array([[2, 5, 6, 3], [2, 7, 3, 0], [2, 8, 9, 3]], np.int32),
    'text_mask': np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], bool),
    'image_id': np.arange(3),
    'lm_text': np.array([[2, 5, 6], [2, 7, 1], [2, 8, 9]], np.int32),
    'lm_mask': np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], bool),
    'lm_target': np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1]], bool),
}


def stage1(model, batch):
    return losses.stage1(model, batch, LossContext(jax.random.key(0), config.Objective(gather_grad='global')))[0]


def stage2(model, batch):
    return losses.generation(model, batch, LossContext(jax.random.key(0), config.Objective()))[0]


@pytest.mark.parametrize(
    'loss, lm',
    [(stage1, MODEL.lm), (stage2, MODEL.lm), (stage2, LLAMA), (stage2, T5)],
    ids=['stage1', 'opt', 'llama', 't5'],
)
def test_nothing_rounds_to_float32_on_the_way(loss, lm):
    """A nudge of 1e-11, which float32 cannot hold, moves the float64 loss as its gradient says."""
    c = dataclasses.replace(MODEL, lm=lm)
    with jax.enable_x64(True):
        params = blip2.init(blip2.Blip2Module(c), jax.random.key(1))
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        batch = jax.tree.map(jnp.asarray, BATCH)

        @jax.jit
        @jax.value_and_grad
        def value_and_slope(params):
            return blip2.Blip2Module(c, jnp.float64).apply({'params': params}, batch, method=loss)

        here, slope = value_and_slope(params)
        assert here.dtype == jnp.float64
        step = 1e-11 / max(float(jnp.abs(g).max()) for g in jax.tree.leaves(slope))
        there, _ = value_and_slope(jax.tree.map(lambda x, g: x + step * jnp.sign(g), params, slope))
        expected = step * sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(slope))
        np.testing.assert_allclose(float(there - here), expected, rtol=1e-3)


def test_the_position_resize_is_exact_in_float64():
    with jax.enable_x64(True):
        table = jnp.asarray(np.random.default_rng(0).normal(size=(17, 4)))
        wide = resize_positions(table, (5, 5), 'half_pixel')
        assert wide.dtype == jnp.float64
        assert 1e-9 < np.abs(wide - resize_positions(table.astype(jnp.float32), (5, 5), 'half_pixel')).max() < 1e-5
