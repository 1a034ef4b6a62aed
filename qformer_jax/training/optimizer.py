"""AdamW with a learning-rate multiple per parameter, and the two schedules by name (BLIP-2, section 3.4)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import config
from ..rules import flatten, match, unflatten
from ..typing import Float, Int, Params

DECAY_RULES = (
    (r'(.*[/_])?(bias|scale|temperature|gate)', False),  # what LAVIS leaves out: vectors, gains, biases, scalars
    ('.*', True),  # matrices and tables; query, class and position tokens too
)


def decay_rules(paths: Iterable[str]) -> tuple[tuple[str, bool], ...]:
    """Return the table of who decays; LAVIS goes by rank, and CLIP's class token is a vector there (EVA's is not)."""
    clip = ((r'vit/class_token', False),) if 'vit/pre_norm/scale' in paths else ()
    return (*clip, *DECAY_RULES)


def schedule(o: config.Optimizer, steps: int) -> optax.Schedule:
    """Return learning rate by step: the paper's per-step cosine, or LAVIS's."""
    if o.schedule == 'lavis':
        return lavis_schedule(o, steps)
    return optax.warmup_cosine_decay_schedule(o.warmup_start, o.peak_rate, o.warmup_steps, steps, o.final_rate)


def lavis_schedule(o: config.Optimizer, steps: int) -> optax.Schedule:
    """Return LAVIS's schedule: warm-up only within epoch 0, then a cosine that moves once an epoch.

    Worked example, 3 epochs: the cosine takes the values at 1/3 and 2/3 of its way, so `final_rate` is never reached.
    """
    epochs = -(-steps // o.steps_per_epoch)

    def rate(step):
        epoch = step // o.steps_per_epoch
        warm = o.warmup_start + (o.peak_rate - o.warmup_start) * jnp.minimum(step / max(o.warmup_steps, 1), 1)
        cosine = o.final_rate + (o.peak_rate - o.final_rate) * (1 + jnp.cos(jnp.pi * epoch / epochs)) / 2
        return jnp.where(epoch == 0, warm, cosine)

    return rate


class RatesState(NamedTuple):
    """Which update is next, and the rate of each."""

    count: Int['']
    rates: Float['N']


def scale_by_rates() -> optax.GradientTransformation:
    """Step against the gradient, by the rate of each update.

    The rates are data in the state, put there by `init`, and no part of the program: runs that differ in nothing else
    share one.
    """

    def update(updates, state, params=None):
        return optax.tree.scale(-state.rates[state.count], updates), RatesState(state.count + 1, state.rates)

    return optax.GradientTransformation(lambda params: RatesState(jnp.int32(0), jnp.zeros(0)), update)


@dataclass(frozen=True)
class Constants:
    """What of AdamW is part of the compiled step."""

    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float
    rate_rules: config.Rules

    @classmethod
    def of(cls, o: config.Optimizer) -> 'Constants':
        """Return them from a run's optimizer, without its learning rates."""
        return cls(o.beta1, o.beta2, o.weight_decay, o.clip_norm, o.rate_rules)


def make(c: Constants, trainable: Params) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer; a step whose gradients are not finite leaves parameters and moments as they were."""
    paths = flatten(trainable)
    decays = unflatten(match(decay_rules(paths), paths))
    multiples = unflatten(match(c.rate_rules, paths))
    adamw = optax.chain(
        optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        optax.scale_by_adam(c.beta1, c.beta2, eps=1e-8),
        optax.add_decayed_weights(c.weight_decay, mask=decays),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, multiple: u * multiple, updates, multiples)),
        scale_by_rates(),
    )
    return optax.apply_if_finite(adamw, max_consecutive_errors=2**31 - 2)  # the loop stops long before


def init(c: Constants, trainable: Params, rates: Float['N']) -> optax.OptState:
    """Return the state before the first update; `rates` are the learning rates of all of them."""
    return optax.tree.set(make(c, trainable).init(trainable), rates=rates)


def rates(o: config.Optimizer, steps: int) -> Float['N']:
    """Return the learning rate of each update."""
    return jax.vmap(schedule(o, steps))(jnp.arange(steps))
