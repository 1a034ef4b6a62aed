"""One training step: gradients of the trainable dict only, metrics beside it, everything inside one `jit`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from .. import config
from ..models import nested
from ..models.blip2 import Blip2, applied
from ..parallel.mesh import replicated
from ..rules import merge
from ..typing import Array, Bool, Params
from . import losses
from .losses import Batch, Result


@struct.dataclass
class State:
    """What a step changes, and what a checkpoint holds; its leaves are arrays, or shapes when one is restored."""

    step: Any
    """Steps done, an int32 scalar."""
    trainable: Params
    optimizer: optax.OptState
    key: Any
    """A random key, folded with the step number for dropout and negatives; itself constant."""


def new_state(trainable: Params, optimizer: optax.GradientTransformation, seed: int) -> State:
    """Return the state before the first step."""
    return State(jnp.int32(0), trainable, optimizer.init(trainable), jax.random.key(seed))


Exists = Bool['Q'] | None


def stage_loss(run: config.Run, mesh: Mesh) -> Callable[[Blip2, Batch, Array, bool, Exists], Result]:
    """Return the stage's loss as a function of (bound model, batch, key, train, which queries exist)."""
    o = run.objective
    shards = mesh.size if o.token_mean == 'per_shard' else 1
    match run.stage:
        case 'vision':
            return lambda model, batch, key, train, exists: losses.vision(model, batch)
        case 'language':
            return lambda model, batch, key, train, exists: losses.language(model, batch, shards)
        case 'stage1':
            rules = {'shards': shards, 'share_image_keys': mesh.size == 1}
            return lambda model, batch, key, train, exists: losses.stage1(
                model, batch, key, o, **rules, train=train, exists=exists
            )
        case 'stage2' | 'instruct':
            return lambda model, batch, key, train, exists: losses.generation(model, batch, o, shards, train, exists)


def make_loss(run: config.Run, model: Blip2, mesh: Mesh) -> Callable[..., Result]:
    """Return `loss(trainable, frozen, batch, key, train)`; with nested queries, training draws how many exist."""
    call = nn.apply(stage_loss(run, mesh), model)

    def loss(trainable: Params, frozen: Params, batch: Batch, key: Array, train: bool) -> Result:
        dropout_key, draw_key = jax.random.split(key)
        variables = {'params': applied(merge(trainable, frozen), run.model)}
        exists = None
        if run.objective.nested_queries and train:
            exists = nested.draw(jax.random.fold_in(draw_key, 1), run.model.qformer.num_queries)
        loss, metrics = call(variables, batch, draw_key, train, exists, rngs={'dropout': dropout_key})
        return loss, metrics if exists is None else metrics | {'queries': exists.sum(dtype=jnp.float32)}

    return loss


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


def make_step(run: config.Run, model: Blip2, optimizer: optax.GradientTransformation, mesh: Mesh) -> Callable:
    """Return the jitted `step(state, frozen, batch) -> (state, metrics)`; the old state is donated.

    Metrics are scalars, but for `bad`: one flag a trainable tensor (in path order) whose gradient is not finite.
    """
    gradients = jax.grad(make_loss(run, model, mesh), has_aux=True)

    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        if run.training.accumulate > 1:
            grads, metrics = _accumulated(gradients, run.training.accumulate, state.trainable, frozen, batch, key)
        else:
            grads, metrics = gradients(state.trainable, frozen, batch, key, True)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
        new = State(state.step + 1, optax.apply_updates(state.trainable, updates), optimizer_state, state.key)
        metrics['gradient_norm'] = optax.tree.norm(grads)
        metrics['skipped'] = optimizer_state.total_notfinite
        metrics['bad'] = jnp.stack([~jnp.isfinite(g).all() for g in jax.tree.leaves(grads)])
        return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))


def make_evaluation(run: config.Run, model: Blip2, mesh: Mesh) -> Callable:
    """Return the jitted `evaluate(trainable, frozen, batch, key) -> metrics`, without dropout."""
    loss = make_loss(run, model, mesh)
    return jax.jit(lambda trainable, frozen, batch, key: loss(trainable, frozen, batch, key, False)[1])
