"""One training step: gradients of the trainable dict only, metrics beside it, everything inside one `jit`.

`train_step` and `evaluation_step` are compiled once a `Program`: runs that differ only in paths, seeds, learning rates
or data share them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from .. import config
from ..models import nested
from ..models.blip2 import Blip2Module, effective_params
from ..parallel.mesh import replicated
from ..rules import merge
from ..typing import Array, Float, Params
from . import optimizer
from .loss_context import LossContext
from .losses import Batch, Result
from .stages import STAGES


@dataclass(frozen=True)
class Program:
    """What a step is compiled from, beside the shapes of its arrays."""

    stage: config.Stage
    model: config.Blip2Config
    objective: config.Objective
    optimizer: optimizer.Constants
    dtype: str
    """Compute dtype."""
    accumulate: int
    """Micro-batches a step."""

    @classmethod
    def of(cls, run: config.Run) -> 'Program':
        """Return what of a run its step depends on."""
        constants = optimizer.Constants.of(run.optimizer)
        return cls(run.stage, run.model, run.objective, constants, run.training.dtype, run.training.accumulate)


@struct.dataclass
class State:
    """What a step changes, and what a checkpoint holds; its leaves are arrays, or shapes when one is restored."""

    step: Any
    """Steps done, an int32 scalar."""
    trainable: Params
    optimizer: optax.OptState
    key: Any
    """A random key, folded with the step number for dropout and negatives; itself constant."""


def new_state(trainable: Params, run: config.Run) -> State:
    """Return the state before the first step."""
    constants = optimizer.Constants.of(run.optimizer)
    moments = optimizer.init(constants, trainable, optimizer.rates(run.optimizer, run.training.steps))
    return State(jnp.int32(0), trainable, moments, jax.random.key(run.training.seed))


@functools.partial(jax.jit, static_argnames=('program', 'mesh'), donate_argnames='state')
def train_step(
    program: Program, mesh: Mesh, state: State, frozen: Params, batch: Batch
) -> tuple[State, dict[str, Array]]:
    """Return the next state and the step's metrics; the old state is donated.

    Metrics are scalars, but for `bad`: one flag a trainable tensor (in path order) whose gradient is not finite.
    """
    key = jax.random.fold_in(state.key, state.step)
    gradients = jax.grad(functools.partial(loss, program, mesh), has_aux=True)
    if program.accumulate > 1:
        grads, metrics = _accumulated(gradients, program.accumulate, state.trainable, frozen, batch, key)
    else:
        grads, metrics = gradients(state.trainable, frozen, batch, key, True)
    transform = optimizer.make(program.optimizer, state.trainable)
    updates, optimizer_state = transform.update(grads, state.optimizer, state.trainable)
    new = State(state.step + 1, optax.apply_updates(state.trainable, updates), optimizer_state, state.key)
    metrics['gradient_norm'] = optax.tree.norm(grads)
    metrics['skipped'] = optimizer_state.total_notfinite
    metrics['bad'] = jnp.stack([~jnp.isfinite(g).all() for g in jax.tree.leaves(grads)])
    return jax.lax.with_sharding_constraint((new, metrics), replicated(mesh))


@functools.partial(jax.jit, static_argnames=('program', 'mesh'))
def evaluation_step(
    program: Program, mesh: Mesh, trainable: Params, frozen: Params, batch: Batch, key: Array
) -> dict[str, Float['']]:
    """Return the metrics of a batch, without dropout."""
    return loss(program, mesh, trainable, frozen, batch, key, False)[1]


def loss(
    program: Program, mesh: Mesh, trainable: Params, frozen: Params, batch: Batch, key: Array, train: bool
) -> Result:
    """Return the stage's loss and metrics; with nested queries, training draws how many exist."""
    dropout_key, draw_key = jax.random.split(key)
    o, query_mask = program.objective, None
    if o.nested_queries and train:
        query_mask = nested.draw(jax.random.fold_in(draw_key, 1), program.model.qformer.num_queries)
    shards = mesh.size if o.token_mean == 'per_shard' else 1
    context = LossContext(draw_key, o, train, shards, share_image_keys=mesh.size == 1, query_mask=query_mask)
    value, metrics = Blip2Module(program.model, jnp.dtype(program.dtype)).apply(
        {'params': effective_params(merge(trainable, frozen), program.model)},
        batch,
        context,
        method=STAGES[program.stage].loss,
        rngs={'dropout': dropout_key},
    )
    return value, metrics if query_mask is None else metrics | {'queries': query_mask.sum(dtype=jnp.float32)}


def _accumulated(grad_of: Callable, parts: int, trainable: Params, frozen: Params, batch: Batch, key: Array):
    """Return gradients and metrics of the whole batch, a micro-batch at a time.

    Micro-batch m holds rows m, m + parts, ... (so each device keeps its own rows) and weighs as much as its share of
    the tokens that count: the sum is the gradient of the mean over all tokens.
    """
    micro = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    counts = micro['lm_target'].sum(axis=(1, 2)) if 'lm_target' in micro else jnp.ones(parts)
    weights = counts / counts.sum()

    def add(total, xs):
        rows, weight, i = xs
        part = grad_of(trainable, frozen, rows, jax.random.fold_in(key, i), True)
        return jax.tree.map(lambda t, p: t + weight * p, total, part), None

    one = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: grad_of(trainable, frozen, one, key, True))
    )
    return jax.lax.scan(add, zeros, (micro, weights, jnp.arange(parts)))[0]
