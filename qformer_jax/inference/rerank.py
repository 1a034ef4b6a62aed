"""Retrieval in two steps (BLIP-2, section 4.4): the most similar by ITC, ranked again by ITM."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..typing import Array, Float

RERANK_TOP_K = 128  # candidates that the paper ranks again
EXCLUDED = -100.0  # score of what is not among the k candidates, below every other


def rerank(similarity: Float['I C'], match: Callable[[Array, Array], Array], k: int) -> Float['I C']:
    """Return the scores by which BLIP-2 retrieves (section 4.4): of each row's k most similar columns, the ITM logit of
    "matched" plus the cosine; -100 elsewhere.

    `match(rows, columns)` returns the logits of that many pairs.
    """
    rows, k = similarity.shape[0], min(k, similarity.shape[1])
    cosine, best = jax.lax.top_k(jnp.asarray(similarity), k)
    row = jnp.repeat(jnp.arange(rows), k)
    scores = cosine + match(row, best.reshape(-1)).reshape(rows, k)
    return jnp.full(similarity.shape, EXCLUDED, scores.dtype).at[row, best.reshape(-1)].set(scores.reshape(-1))
