"""FLOPs counted from shapes, against sums by hand and against XLA's count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qformer_jax import config
from qformer_jax.analysis.flops import compiled_flops, flops
from qformer_jax.models import blip2, connectors


def test_products_loops_branches_and_convolutions_by_hand():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5
    assert flops(jax.jit(lambda a: jax.lax.scan(lambda c, _: (c @ jnp.ones((4, 4)), None), a, length=7)[0]), a) == (
        7 * 2 * 3 * 4 * 4
    )
    branch = lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: a @ b, lambda a: jnp.zeros((3, 5)), a)  # noqa: E731
    assert flops(branch, a) == 2 * 3 * 4 * 5
    image, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 1, 6))  # a kernel a channel
    numbers = ('NHWC', 'HWIO', 'NHWC')
    conv = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), 'SAME', dimension_numbers=numbers, feature_group_count=6
    )
    assert flops(conv, image, kernel) == 2 * (2 * 8 * 8 * 6) * 9


@pytest.mark.parametrize('kind', ['qformer', *connectors.names()])
def test_the_count_is_near_that_of_xla(kind):
    """At a width of 192 what is elementwise is below a seventh; the count from shapes is never above XLA's."""
    qformer = config.QformerConfig(
        feature_width=384, num_queries=16, width=192, depth=4, heads=6, mlp_width=768, text_side='none'
    )
    other = config.ConnectorConfig(kind=kind, feature_width=384, tokens=16, width=192, depth=4, heads=6, mlp_width=768)
    between = {'qformer': qformer} if kind == 'qformer' else {'qformer': None, 'connector': other}
    model = blip2.Blip2Module(
        config.Blip2Config(vit=None, lm=dataclasses.replace(config.OptConfig(), depth=1, vocab_size=10), **between)
    )
    params = blip2.shapes(model.config)
    features = jax.ShapeDtypeStruct((4, 65, 384), jnp.float32), jax.ShapeDtypeStruct((4, 65), bool)
    run = lambda params, *x: model.apply({'params': params}, *x, method='soft_prefix').vectors  # noqa: E731
    counted, xla = flops(run, params, *features), compiled_flops(run, params, *features)
    assert 0.86 * xla < counted <= xla
