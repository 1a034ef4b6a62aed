"""Every variant: a step on 8 devices is the step of one, a state that was saved goes on to the bit, and it exports."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import small

from qformer_jax import config
from qformer_jax.inference.export import artefact
from qformer_jax.inference.functions import functions
from qformer_jax.models import blip2, connectors
from qformer_jax.models.quantized import apart
from qformer_jax.rules import flatten

LM = config.Opt(vocab_size=40, width=16, depth=1, heads=2, mlp_width=32, max_positions=64)
QFORMER = dataclasses.replace(small.QFORMER, feature_width=6, vocab_size=40, depth=1, dropout=0.0, text_side='reads')
OTHER = config.Connector(feature_width=6, tokens=4, width=16, depth=1, heads=2, mlp_width=32, window=4)
GATES = config.Gates(every=1, heads=2, mlp_width=32)


def _of(qformer=None, connector=None, **parts) -> config.Blip2:
    return config.Blip2(vit=None, qformer=qformer, connector=connector, lm=LM, **parts)


MODELS = {
    'qformer': _of(QFORMER),
    'nested': _of(QFORMER),
    'dynamic': _of(dataclasses.replace(QFORMER, query_bank=2)),
    'gated residual': _of(dataclasses.replace(QFORMER, gated_residual=True)),
    'local queries': _of(dataclasses.replace(QFORMER, local_queries=1)),
    'beside patches': _of(QFORMER, dataclasses.replace(OTHER, kind='mlp')),
    'gates': _of(None, dataclasses.replace(OTHER, kind='resampler'), gates=GATES),
    'time': _of(QFORMER, time=config.Time(2, patches=5)),
    'words for boxes': _of(QFORMER, grounding=config.Grounding(grid=2)),
    **{kind: _of(None, dataclasses.replace(OTHER, kind=kind)) for kind in connectors.names()},
}
NEED_A_TOWER = ('average_pool', 'c_abstractor', 'local queries')
"""A grid of patches has a known size: exported for feature arrays of any length, they are refused."""

STEPS = """
import dataclasses, json, sys
from pathlib import Path

import grain, jax, numpy as np
from jax.sharding import AxisType

sys.path.insert(0, 'tests')
from test_every_variant import MODELS
from qformer_jax import config
from qformer_jax.models import blip2
from qformer_jax.parallel.mesh import data_mesh, put_batch, replicated
from qformer_jax.rules import flatten, split
from qformer_jax.training import optimizer, step
from qformer_jax.training.checkpoint import Checkpoints


def place():
    return iter(grain.MapDataset.source([0]).to_iter_dataset())


def batch(rows=16, patches=10, text=8):
    draw = np.random.default_rng(0)
    ids = draw.integers(4, 40, (rows, text)).astype(np.int32)
    exists = np.arange(text)[None] < draw.integers(4, text + 1, (rows, 1))
    features = draw.normal(size=(rows, patches, 6)).astype(np.float32)
    some = {'features': features, 'feature_mask': np.ones((rows, patches), bool), 'text': ids, 'text_mask': exists}
    return some | {'lm_text': ids, 'lm_mask': exists, 'lm_target': exists & (np.arange(text) > 1)[None],
                   'image_id': np.arange(rows, dtype=np.int32)}


def run_of(name):
    rules = (('lm/.*', None), ('.*', 1.0))
    o = config.Optimizer(peak_rate=1e-2, warmup_steps=1, rate_rules=rules)
    objective = config.Objective(nested_queries=name == 'nested', instruction_aware=name == 'qformer')
    return config.Run('instruct', MODELS[name], objective=objective, optimizer=o,
                      training=config.Training(steps=3, batch_size=16))


def start(run, params, mesh):
    trainable, frozen = split(params, run.optimizer.rate_rules)
    transform = optimizer.make(run.optimizer, 3, trainable)
    state = jax.device_put(step.new_state(trainable, transform, 0), replicated(mesh))
    advance = step.make_step(run, blip2.Blip2(run.model), transform, mesh)
    return advance, state, jax.device_put(frozen, replicated(mesh))


def values(metrics):
    return {name: float(metrics[name]) for name in ('loss', 'gradient_norm')}


found = {}
for name in MODELS:
    run, meshes = run_of(name), (data_mesh(), jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,)))
    seen, params = {}, jax.device_get(blip2.init(blip2.Blip2(run.model), jax.random.key(0)))
    for mesh in meshes:
        with jax.set_mesh(mesh):
            advance, state, frozen = start(run, params, mesh)
            rows = put_batch(mesh, batch())
            state, metrics = advance(state, frozen, rows)
            seen[str(mesh.size)] = values(metrics)
            if mesh.size == 1:
                continue
            kept = Checkpoints(Path(sys.argv[1]) / name.replace(' ', '_'))
            kept.save(1, state, place(), {'step': 1, 'validation_loss': None})
            kept.wait()
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            again, at, _ = kept.restore(shapes, place())
            kept.close()
            pair = [flatten(advance(s, frozen, rows)[0].trainable) for s in (state, again)]
            seen['same'] = at == 1 and all(np.array_equal(pair[0][p], pair[1][p]) for p in pair[0])
    found[name] = seen
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def stepped(tmp_path_factory) -> dict:
    """What a process that simulates 8 devices saw of each variant."""
    command = [sys.executable, '-c', STEPS, str(tmp_path_factory.mktemp('states'))]
    done = subprocess.run(command, cwd=small.ROOT, env=small.eight_devices(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('name', MODELS)
def test_a_step_on_eight_devices_is_that_of_one_and_a_saved_state_goes_on_to_the_bit(stepped, name):
    seen = stepped[name]
    assert seen['8']['gradient_norm'] > 1e-3
    for metric in ('loss', 'gradient_norm'):
        np.testing.assert_allclose(seen['8'][metric], seen['1'][metric], rtol=1e-5)
    assert seen['same']


@pytest.mark.parametrize('name', [name for name in MODELS if name not in NEED_A_TOWER])
def test_what_it_makes_of_features_exports(name):
    """For features of any length and rows of any number; the artefact gives what the function gives."""
    model = MODELS[name]
    run = config.Run('instruct', model, objective=config.Objective(instruction_aware=name == 'qformer'))
    draw = np.random.default_rng(0)
    shapes = flatten(blip2.shapes(model))
    weights = {path: draw.normal(size=x.shape).astype(np.float32) / 4 for path, x in shapes.items()}
    encode = functions(run, apart(weights))[0]
    given = [draw.normal(size=(3, 10, 6)).astype(np.float32), np.ones((3, 10), bool)]
    if 'text' in encode.inputs:
        given += [draw.integers(4, 40, (3, 5)).astype(np.int32), np.ones((3, 5), bool)]
    used = {path: weights[path] for path in encode.weights}
    outside = jax.export.deserialize(bytearray(artefact(encode, ['cpu']).serialize())).call
    both = (jax.tree.leaves(jax.jit(call)(used, *given)) for call in (encode.call, outside))
    for inside, exported in zip(*both, strict=True):
        np.testing.assert_array_equal(inside, exported)
