"""What a variant costs: tokens, parameters, FLOPs counted from shapes, and the bytes and time of a training step."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from qformer_jax import config
from qformer_jax.analysis.flops import compiled_flops, flops
from qformer_jax.models import blip2
from qformer_jax.parallel.mesh import put_batch, replicated
from qformer_jax.rules import flatten, split
from qformer_jax.training import step
from qformer_jax.typing import Params

PATCHES = 65  # of a 112 px picture: a class token and 8 x 8
TEXT = 24  # tokens of a row, question and answer
_BATCH = 128
_STEPS = 10  # in a round
_SECONDS = 5.0  # of rounds


def of(run: config.Run) -> dict[str, float]:
    """Return the costs that shapes alone decide."""
    model, params = blip2.Blip2Module(run.model), blip2.shapes(run.model)
    trainable, _ = split(params, run.optimizer.rate_rules)
    features, text = _picture(run.model), _text(run)
    prefix = jax.eval_shape(lambda p, *x: _connect(model, p, *x), params, *features, *text)
    counted = flops(lambda p, *x: _connect(model, p, *x), params, *features, *text)
    xla = compiled_flops(lambda p, *x: _connect(model, p, *x).vectors, params, *features, *text)
    reading = flops(lambda p, x: _read(model, p, x), params, prefix)
    return {
        'LLM tokens': blip2.prefix_length(run.model, prefix),
        'trained parameters': sum(x.size for x in flatten(trainable).values()),
        'MFLOP, connector': counted / 1e6,
        'MFLOP, connector, XLA': xla / 1e6,
        'MFLOP, LLM': reading / 1e6,
    }


def measured(run: config.Run, params: Params) -> dict[str, float]:
    """Return what a training step takes on one device, alone: milliseconds, and the bytes that XLA reserves."""
    trainable, frozen = split(params, run.optimizer.rate_rules)
    state = step.new_state(trainable, run)
    mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    state, frozen = jax.device_put((state, frozen), replicated(mesh))
    batch = put_batch(mesh, _batch(run))
    with jax.set_mesh(mesh):
        advance = step.train_step.lower(step.Program.of(run), mesh, state, frozen, batch).compile()
        memory, seconds = advance.memory_analysis(), _fastest(advance, state, frozen, batch)
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {'ms a step': 1e3 * seconds, 'MiB a step': size / 2**20}


def _fastest(advance: Callable, state: step.State, frozen: Params, batch: dict[str, jax.Array]) -> float:
    """Return the seconds of a step in the fastest round: what else the host does only ever adds to them.

    A round takes its steps without waiting between them, as training does.
    """
    times, end = [], time.perf_counter() + _SECONDS
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(_STEPS):
            state, metrics = advance(state, frozen, batch)
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - began) / _STEPS)
    return min(times)


def _picture(c: config.Blip2Config) -> tuple[jax.ShapeDtypeStruct, ...]:
    return jax.ShapeDtypeStruct((1, PATCHES, c.feature_width), jnp.float32), jax.ShapeDtypeStruct((1, PATCHES), bool)


def _text(run: config.Run) -> tuple[jax.ShapeDtypeStruct, ...]:
    if not run.objective.instruction_aware:
        return ()
    shape = 1, run.data.max_text
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)


def _connect(model: blip2.Blip2Module, params, *arrays) -> blip2.Prefix:
    return model.apply({'params': params}, *arrays, method='soft_prefix')


def _read(model: blip2.Blip2Module, params, prefix: blip2.Prefix):
    text, text_mask = jnp.zeros((1, TEXT), jnp.int32), jnp.ones((1, TEXT), bool)
    return model.apply({'params': params}, prefix, text, text_mask, text_mask, method='target_hidden_states')


def _batch(run: config.Run) -> dict[str, np.ndarray]:
    length, texts = run.data.max_lm_text, {'text': run.data.max_text, 'lm_text': run.data.max_lm_text}
    rows = {name: np.ones((_BATCH, size), np.int32) for name, size in texts.items()}
    rows |= {'text_mask': rows['text'] > 0, 'lm_mask': rows['lm_text'] > 0}
    rows['lm_target'] = rows['lm_mask'] & (np.arange(length) > length // 2)[None]
    rows['features'] = (
        np.random.default_rng(0).normal(size=(_BATCH, PATCHES, run.model.feature_width)).astype(np.float32)
    )
    return rows | {'feature_mask': np.ones((_BATCH, PATCHES), bool), 'image_id': np.arange(_BATCH, dtype=np.int32)}
