"""How sure a model is of a text about a picture, in nats, and the gradient of that by where the queries look.

A run with a language model is asked for log p(text | picture, prompt); a stage-1 run for the log odds of ITM, its logit
of "matched" minus that of "not matched": training moves nothing but this difference.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import config
from ..inference.forward import bound
from ..models.blip2 import Blip2Module
from ..models.target_losses import target_losses
from ..typing import Array, Bool, Float, Int, Params


def reading_layers(c: config.QformerConfig) -> tuple[int, ...]:
    """Return the numbers of the layers that read features, from 0."""
    return tuple(range(0, c.depth, c.cross_attention_freq))


def _odds_each(
    model: Blip2Module, features: Float['B P V'], mask: Bool['B P'], text: Int['B T'], text_mask: Bool['B T']
) -> Float['B Q']:
    """Each query's log odds of a match, after queries and text saw each other; ITM's are their mean."""
    queries = model.query_features(features, mask, text, text_mask).queries
    logits = model.qformer.match(queries.reshape(-1, 1, queries.shape[-1])).reshape(*queries.shape[:2], 2)
    return logits[..., 1] - logits[..., 0]


odds_each = bound(_odds_each)


def odds(model: Blip2Module, *arrays: Array) -> Float['B']:
    """Return ITM's log odds of a match; the arrays are those of `odds_each`."""
    return _odds_each(model, *arrays).mean(axis=1)


def log_p(
    model: Blip2Module,
    features: Float['B P V'],
    mask: Bool['B P'],
    read: tuple[Array, ...],
    text: Int['B T'],
    text_mask: Bool['B T'],
    target: Bool['B T'],
) -> Float['B']:
    """Return log p of the target tokens under the language model; queries read `read`: ids and mask, or nothing."""
    prefix = model.soft_prefix(features, mask, *read)
    hidden = model.target_hidden_states(prefix, text, text_mask, target)
    return -target_losses(model, hidden, text, target)[0].sum(axis=1)


@partial(jax.jit, static_argnames=('model', 'score'))
def gradient(
    model: Blip2Module, params: Params, score: Callable, features: Float['B P V'], *arrays
) -> Float['B C H Q P']:
    """Return how a score of the bound model changes with each weight of the cross-attention, softmax left aside.

    `score` is one of the above, called with the arrays.
    """
    c = model.config.qformer
    names = [f'layer_{i}' for i in reading_layers(c)]
    nothing = jnp.zeros((len(features), c.heads, c.num_queries, features.shape[1]))

    def moved(perturbation: Params) -> Float['']:
        return nn.apply(score, model)(
            {'params': params, 'attention_perturbation': perturbation}, features, *arrays
        ).sum()

    by = jax.grad(moved)({'qformer': {name: {'cross_attention': {'weights': nothing}} for name in names}})
    return jnp.stack([by['qformer'][name]['cross_attention']['weights'] for name in names], axis=1)
