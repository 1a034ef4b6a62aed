"""Retrieval between pictures and the different captions of a split: R@k both ways."""

from collections.abc import Sequence

import numpy as np

from ..typing import Bool, Float


def candidates(captions: Sequence[Sequence[str]]) -> tuple[list[str], Bool['I C']]:
    """Return the different captions, sorted, and which of them each picture has."""
    texts = sorted({text for row in captions for text in row})
    return texts, np.array([[text in row for text in texts] for row in captions])


def recall(similarity: Float['I C'], positive: Bool['I C'], k: int) -> float:
    """Return the share of rows with a positive among the k best columns."""
    best = np.argsort(-similarity, axis=1, kind='stable')[:, :k]
    return float(np.take_along_axis(positive, best, axis=1).any(axis=1).mean())
