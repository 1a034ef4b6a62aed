"""Contrastive regularizers beside ITC: geometry that pictures and texts should share, and views that should agree.

CyCLIP (Goel et al. 2022, section 3) asks that similarities be the same both ways round and within both sides. It has
one vector a picture; ours has one a query, so across sides a similarity is ITC's (the best query's), and within
pictures it is that of the queries' mean. Intra-modal contrast takes two passes with other dropout as two views of one
input (SimCSE, Gao et al. 2021, section 3). Queries that do not exist count for nothing.
"""

import jax.numpy as jnp

from ..typing import Array, Bool, Float
from .contrastive import QueryEmbedding, cross_entropy, similarity


def mean_query(image: QueryEmbedding) -> Float['B E']:
    """Return the unit vector in the direction of the mean of a picture's queries."""
    mean = jnp.mean(image.vectors, axis=1, where=None if image.mask is None else image.mask[..., None])
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def cross_modal_consistency(image: QueryEmbedding, text: Float['B E']) -> Float['']:
    """Return 1/B sum_jk (<image_j, text_k> - <image_k, text_j>)^2 (CyCLIP, equation 3)."""
    across = similarity(image.vectors, text, image.mask)
    return jnp.square(across - across.T).sum() / across.shape[0]


def in_modal_consistency(image: QueryEmbedding, text: Float['B E']) -> Float['']:
    """Return 1/B sum_jk (<image_j, image_k> - <text_j, text_k>)^2 (CyCLIP, equation 4)."""
    within = _cosines(mean_query(image)) - _cosines(text)
    return jnp.square(within).sum() / within.shape[0]


def intra_modal(one: Float['B E'], other: Float['B E'], temperature: Array, positive: Bool['B B']) -> Float['']:
    """Return InfoNCE (nats) between two views of the same inputs, the mean of both directions (SimCSE, equation 1).

    `positive` are the pairs of inputs that belong together, as ITC counts them.
    """
    logits = jnp.einsum('ie,je->ij', one, other, precision='highest') / temperature
    there, back = cross_entropy(logits, positive, 0.0), cross_entropy(logits.T, positive.T, 0.0)
    return (there.mean() + back.mean()) / 2


def _cosines(x: Float['B E']) -> Float['B B']:
    return jnp.einsum('ie,je->ij', x, x, precision='highest')
