"""Every variant: a step on 8 devices is the step of one, a state that was saved goes on to the bit, and it exports."""

import contextlib
import dataclasses
import functools

import grain
import jax
import numpy as np
import pytest
import small
from jax.sharding import Mesh

from qformer_jax import config
from qformer_jax.export.artifacts import artefact
from qformer_jax.export.functions import functions
from qformer_jax.models import blip2, connectors
from qformer_jax.models.quantized import to_flat
from qformer_jax.parallel.mesh import data_mesh, put_batch, replicated
from qformer_jax.rules import flatten, split
from qformer_jax.training import step
from qformer_jax.training.checkpoint import Checkpoints
from qformer_jax.typing import Params

LM = config.OptConfig(vocab_size=40, width=16, depth=1, heads=2, mlp_width=32, max_positions=64)
QFORMER = dataclasses.replace(small.QFORMER, feature_width=6, vocab_size=40, depth=1, dropout=0.0, text_side='reads')
OTHER = config.ConnectorConfig(feature_width=6, tokens=4, width=16, depth=1, heads=2, mlp_width=32, window=4)
GATES = config.GatesConfig(every=1, heads=2, mlp_width=32)


def _of(qformer=None, connector=None, **parts) -> config.Blip2Config:
    return config.Blip2Config(vit=None, qformer=qformer, connector=connector, lm=LM, **parts)


MODELS = {
    'qformer': _of(QFORMER),
    'nested': _of(QFORMER),
    'dynamic': _of(dataclasses.replace(QFORMER, query_bank=2)),
    'gated residual': _of(dataclasses.replace(QFORMER, gated_residual=True)),
    'local queries': _of(dataclasses.replace(QFORMER, local_queries=1)),
    'beside patches': _of(QFORMER, dataclasses.replace(OTHER, kind='mlp')),
    'gates': _of(None, dataclasses.replace(OTHER, kind='resampler'), gates=GATES),
    'time': _of(QFORMER, time=config.TimeConfig(2, patches=5)),
    'words for boxes': _of(QFORMER, grounding=config.GroundingConfig(grid=2)),
    **{kind: _of(None, dataclasses.replace(OTHER, kind=kind)) for kind in connectors.names()},
}
NEED_A_TOWER = ('average_pool', 'c_abstractor', 'local queries')
"""A grid of patches has a known size: exported for feature arrays of any length, they are refused."""


def _place() -> grain.DatasetIterator:
    return iter(grain.MapDataset.source([0]).to_iter_dataset())


def _batch(rows: int = 16, patches: int = 10, text: int = 8) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    ids = draw.integers(4, 40, (rows, text)).astype(np.int32)
    text_mask = np.arange(text)[None] < draw.integers(4, text + 1, (rows, 1))
    features = draw.normal(size=(rows, patches, 6)).astype(np.float32)
    some = {'features': features, 'feature_mask': np.ones((rows, patches), bool), 'text': ids, 'text_mask': text_mask}
    target = text_mask & (np.arange(text) > 1)[None]
    image_id = np.arange(rows, dtype=np.int32)
    return some | {'lm_text': ids, 'lm_mask': text_mask, 'lm_target': target, 'image_id': image_id}


def _run_of(name: str) -> config.Run:
    rules = (('lm/.*', None), ('.*', 1.0))
    o = config.Optimizer(peak_rate=1e-2, warmup_steps=1, rate_rules=rules)
    objective = config.Objective(nested_queries=name == 'nested', instruction_aware=name == 'qformer')
    training = config.Training(steps=3, batch_size=16)
    return config.Run('instruct', MODELS[name], objective=objective, optimizer=o, training=training)


def _begin(run: config.Run, mesh: Mesh) -> tuple[step.State, Params, dict[str, jax.Array]]:
    """Return state, frozen parameters and batch on the devices of the mesh."""
    params = jax.device_get(blip2.init(blip2.Blip2Module(run.model), jax.random.key(0)))
    trainable, frozen = split(params, run.optimizer.rate_rules)
    state, frozen = jax.device_put((step.new_state(trainable, run), frozen), replicated(mesh))
    return state, frozen, put_batch(mesh, _batch())


@pytest.mark.parametrize('name', MODELS)
def test_a_step_on_eight_devices_is_that_of_one_and_a_saved_state_goes_on_to_the_bit(name, tmp_path):
    run = _run_of(name)
    results = {}
    for devices in (1, 8):
        with jax.set_mesh(mesh := data_mesh(devices)):
            advance = functools.partial(step.train_step, step.Program.of(run), mesh)
            state, frozen, rows = _begin(run, mesh)
            state, results[devices] = advance(state, frozen, rows)
    assert results[8]['gradient_norm'] > 1e-3
    for metric in ('loss', 'gradient_norm'):
        np.testing.assert_allclose(results[8][metric], results[1][metric], rtol=1e-5)
    with jax.set_mesh(mesh), contextlib.closing(Checkpoints(tmp_path)) as kept:
        kept.save(1, state, _place(), {'step': 1, 'validation_loss': None})
        kept.wait()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        again, at, _ = kept.restore(shapes, _place())
        assert at == 1
        one, other = (flatten(advance(s, frozen, rows)[0].trainable) for s in (state, again))
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)


@pytest.mark.parametrize('name', [name for name in MODELS if name not in NEED_A_TOWER])
def test_what_it_makes_of_features_exports(name):
    """For features of any length and rows of any number; the artefact gives what the function gives."""
    model = MODELS[name]
    run = config.Run('instruct', model, objective=config.Objective(instruction_aware=name == 'qformer'))
    draw = np.random.default_rng(0)
    shapes = flatten(blip2.shapes(model))
    weights = {path: draw.normal(size=x.shape).astype(np.float32) / 4 for path, x in shapes.items()}
    encode = functions(run, to_flat(weights))[0]
    given = [draw.normal(size=(3, 10, 6)).astype(np.float32), np.ones((3, 10), bool)]
    if 'text' in encode.inputs:
        given += [draw.integers(4, 40, (3, 5)).astype(np.int32), np.ones((3, 5), bool)]
    used = {path: weights[path] for path in encode.weights}
    outside = jax.export.deserialize(bytearray(artefact(encode, ['cpu']).serialize())).call
    both = (jax.tree.leaves(jax.jit(call)(used, *given)) for call in (encode.call, outside))
    for inside, exported in zip(*both, strict=True):
        np.testing.assert_array_equal(inside, exported)
