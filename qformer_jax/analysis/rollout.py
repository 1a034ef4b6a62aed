"""Attention rollout (Abnar and Zuidema 2020, section 3) through a Q-Former: how much of each patch reaches each query.

The paper's rule is for self-attention: a position keeps half of what it is (the residual) and takes the other half
from where it attends, by the mean over heads. Here the positions are queries (and the text that instruction-aware
queries read), and patches are further sources: a patch stays what it is, as features are frozen. A row of shares R
follows each position through the layers, [of the S positions at the start | of the P patches]:

    at the start                     R   = [I | 0]
    self-attention A [S, S]          R   <- (R + A R) / 2
    cross-attention A [Q, P]         R_q <- (R_q + [0 | A]) / 2    the queries, in a layer that reads features
    feed-forward network             no position mixes with another: as it was

Each row sums to 1; what patches lack of it is of the learned queries themselves (and of the text). As the paper's, it
is an estimate: it knows neither values nor norms, and takes a residual for as strong as what is added to it. Pooled
features that a gate adds to the queries' output go past it.
"""

from collections.abc import Sequence

import numpy as np

from ..typing import Float


def rollout(
    self_attention: Sequence[Float['H S S']], attention: Sequence[Float['H Q P'] | None]
) -> tuple[Float['Q P'], Float['Q S']]:
    """Return the shares of patches, and of positions at the start, in each query at the end.

    One entry a layer; `attention` is None where the layer reads no features. Worked example: one layer, two queries
    that attend to themselves, the first reading patch 0 alone: its row is patch 0 one half, query 0 one half.
    """
    positions = self_attention[0].shape[-1]
    queries, patches = next(layer.shape[1:] for layer in attention if layer is not None)
    shares = np.eye(positions, positions + patches)
    for self_attention_weights, cross_attention_weights in zip(self_attention, attention, strict=True):
        shares = (shares + np.asarray(self_attention_weights).mean(axis=0) @ shares) / 2
        if cross_attention_weights is not None:
            shares[:queries] /= 2
            shares[:queries, positions:] += np.asarray(cross_attention_weights).mean(axis=0) / 2
    return shares[:queries, positions:], shares[:queries, :positions]
