"""Depth, width, frequency of cross-attention and number of queries at unusual values, over the whole line, by shape."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import reference
import small
from reference import EVA, OPT, QFORMER

from qformer_jax import config
from qformer_jax.convert import lavis_config
from qformer_jax.models import blip2
from qformer_jax.parallel.mesh import data_mesh
from qformer_jax.training import step

UNUSUAL = {
    'every third layer of 4': {'depth': 4, 'cross_attention_freq': 3},
    'the first layer alone': {'depth': 2, 'cross_attention_freq': 5},
    'one layer': {'depth': 1},
    'one query': {'num_queries': 1},
    '64 queries': {'num_queries': 64},
    'narrow': {'width': 12, 'heads': 3},
}
READS = {'every third layer of 4': [0, 3], 'the first layer alone': [0], 'one layer': [0]}


def unusual(name: str) -> config.QformerConfig:
    return dataclasses.replace(QFORMER, **UNUSUAL[name])


@pytest.mark.parametrize('name', UNUSUAL)
@pytest.mark.parametrize('stage', ['stage1', 'instruct'])
def test_a_loss_has_gradients_of_the_parameters_shapes(stage, name):
    c = config.Blip2Config(None, unusual(name), lm=OPT if stage == 'instruct' else None)
    run = dataclasses.replace(small.recipe(stage, 'nowhere'), model=c)
    run = small.change(run, 'objective', nested_queries=True, instruction_aware=stage == 'instruct')
    shapes, text, mask = blip2.shapes(c), jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 5), bool)
    batch = {'features': jnp.zeros((2, 4, 48)), 'feature_mask': jnp.ones((2, 4), bool), 'image_id': jnp.arange(2)}
    batch |= {'text': text, 'text_mask': mask, 'lm_text': text, 'lm_mask': mask, 'lm_target': mask}
    gradients = jax.grad(functools.partial(step.loss, step.Program.of(run), data_mesh(1)), has_aux=True)
    key = jax.eval_shape(lambda: jax.random.key(0))
    found, metrics = jax.eval_shape(lambda p, b, k: gradients(p, {}, b, k, True), shapes, batch, key)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f'{a} {b}'), found, shapes)
    assert metrics['loss'].shape == ()


@pytest.mark.parametrize('name', READS)
def test_which_layers_read_features(name):
    shapes = blip2.shapes(config.Blip2Config(None, unusual(name), lm=None))['qformer']
    assert [i for i in range(unusual(name).depth) if 'cross_attention' in shapes[f'layer_{i}']] == READS[name]


@pytest.mark.parametrize('name', UNUSUAL)
def test_lavis_state_dict_tells_them(name):
    """Where only layer 0 reads, every frequency from the depth on is the same network, and the depth is taken."""
    c = unusual(name)
    found = lavis_config.model_of(
        reference.outlines(config.Blip2Config(EVA, c, lm=None)), config.Blip2Config(EVA, c, lm=None)
    ).qformer
    expected = dataclasses.replace(c, cross_attention_freq=min(c.cross_attention_freq, c.depth))
    assert found == expected
    shapes = [blip2.shapes(config.Blip2Config(None, x, lm=None)) for x in (found, c)]
    assert shapes[0] == shapes[1]
