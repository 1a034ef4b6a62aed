"""ITM, image-text matching (BLIP-2, section 3.2) with hard negatives (ALBEF, section 3.2), drawn on the device."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from ..typing import Array, Bool, Float, Int


@struct.dataclass
class Negatives:
    """A wrong picture for each text, a wrong text for each picture, and whether the batch had one to offer."""

    image: Int['B']
    text: Int['B']
    image_exists: Bool['B']
    text_exists: Bool['B']


def draw_negatives(key: Array, image_to_text: Float['B B'], text_to_image: Float['B B'], positive: Bool['B B']):
    """Return `Negatives`, drawn in proportion to how well the wrong partner fits (softmax + 1e-4), never a positive."""
    image_key, text_key = jax.random.split(key)  # pictures first, as LAVIS draws them
    image, image_exists = _draw(image_key, text_to_image, positive.T)
    text, text_exists = _draw(text_key, image_to_text, positive)
    return Negatives(image, text, image_exists, text_exists)


def weights(logits: Float['B B'], positive: Bool['B B']) -> Float['B B']:
    """Return how often each candidate is drawn, in proportion: its softmax + 1e-4, positives never."""
    return jnp.where(positive, 0, jax.nn.softmax(logits, axis=1) + 1e-4)


def _draw(key: Array, logits: Float['B B'], positive: Bool['B B']) -> tuple[Int['B'], Bool['B']]:
    weight = jax.lax.stop_gradient(weights(logits, positive))
    chosen = jax.random.categorical(key, jnp.log(weight), axis=1)
    return chosen, (~positive).any(axis=1)


def itm(logits: Float['R 2'], matched: Int['R'], counts: Bool['R']) -> tuple[Float[''], Float['']]:
    """Return loss (nats) and accuracy over the rows that count; always answering "no" gives 2/3."""
    weight = counts.astype(logits.dtype) / counts.sum()
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, matched)
    right = (logits.argmax(axis=1) == matched).astype(jnp.float32)
    return (weight * loss).sum(), (weight * right).sum()
