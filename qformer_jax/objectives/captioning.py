"""Next-token losses: ITG of stage 1 (BLIP-2, section 3.2) and the language-model loss of stages 2 and 3."""

import jax
import jax.numpy as jnp

from ..typing import Bool, Float, Int


def token_losses(logits: Float['B T N'], targets: Int['B T'], label_smoothing: float = 0.0) -> Float['B T']:
    """Return the cross-entropy (nats) of each token.

    Smoothed target = (1 - s) * one-hot + s / N, without making it:
    loss = lse - (1 - s) * logit[target] - s * mean(logits).
    """
    lse = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return lse - (1 - label_smoothing) * chosen - label_smoothing * logits.mean(axis=-1)


def token_mean(values: Float['B T'], counts: Bool['B T'], shards: int = 1) -> Float['']:
    """Return the mean of `values` where `counts`; with shards > 1, LAVIS's mean of each shard's mean.

    Worked example: rows with 1 and 3 tokens of loss 2 and 4 give 3.5 globally, and (2 + 4) / 2 = 3 over two shards.
    """
    counts = counts.astype(values.dtype)
    if len(values) % shards:  # too few rows to split (a small validation batch): each device has all of them
        shards = 1
    total = (values * counts).reshape(shards, -1).sum(axis=1)
    return (total / jnp.maximum(counts.reshape(shards, -1).sum(axis=1), 1)).mean()


def token_accuracy(logits: Float['B T N'], targets: Int['B T'], counts: Bool['B T']) -> Float['']:
    """Return the share of counted tokens that greedy decoding would get right."""
    return token_mean((logits.argmax(axis=-1) == targets).astype(jnp.float32), counts)
