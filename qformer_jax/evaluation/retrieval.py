"""Retrieval between pictures and the different captions of a split: R@k both ways, and re-ranking by ITM."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..typing import Array, Bool, Float

OUTSIDE = -100.0  # score of what is not among the k candidates, below every other


def candidates(captions: Sequence[Sequence[str]]) -> tuple[list[str], Bool['I C']]:
    """Return the different captions, sorted, and which of them each picture has."""
    texts = sorted({text for row in captions for text in row})
    return texts, np.array([[text in row for text in texts] for row in captions])


def recall(similarity: Float['I C'], positive: Bool['I C'], k: int) -> float:
    """Return the share of rows with a positive among the k best columns."""
    best = np.argsort(-similarity, axis=1, kind='stable')[:, :k]
    return float(np.take_along_axis(positive, best, axis=1).any(axis=1).mean())


def rerank(similarity: Float['I C'], match: Callable[[Array, Array], Array], k: int) -> Float['I C']:
    """Return the scores by which BLIP-2 retrieves (section 4.4): of each row's k most similar columns, the ITM logit of
    "matched" plus the cosine; -100 elsewhere.

    `match(rows, columns)` returns the logits of that many pairs.
    """
    rows, k = similarity.shape[0], min(k, similarity.shape[1])
    cosine, best = jax.lax.top_k(jnp.asarray(similarity), k)
    row = jnp.repeat(jnp.arange(rows), k)
    scores = cosine + match(row, best.reshape(-1)).reshape(rows, k)
    return jnp.full(similarity.shape, OUTSIDE, scores.dtype).at[row, best.reshape(-1)].set(scores.reshape(-1))
