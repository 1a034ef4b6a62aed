"""When each frame of a video is, as a learned vector on all its features (Flamingo, section 3.1.1 and figure 5).

A video's features are one long sequence, frame after frame, so whatever reads them reads every patch of every frame:

    frames [B,F,S,S,3] -> features [B, F * patches, V]     + [ t0 .. t0 | t1 .. t1 | t2 .. t2 ]
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from .. import config
from ..typing import Bool, Float


class TemporalEmbedding(nn.Module):
    """A table of times; of features `width` wide."""

    config: config.TimeConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self):
        # As large as features often are: of 0.02 a norm leaves next to nothing, and order is learned late or never.
        self.frame = self.param('frame', nn.initializers.normal(1.0), (self.config.frames, self.width))

    def __call__(self, features: Float['B P V'], mask: Bool['B P']) -> Float['B P V']:
        """Return the features with the vector of their frame's time added.

        Frame f has row f. The frames of a longer video than the table's lie evenly between its first and last row, as
        Flamingo reads more frames than it was trained on: 4 rows, 7 frames -> places 0, 0.5, 1, ... 3.
        """
        rows, patches = self.config.frames, self.config.patches
        frames = -(-features.shape[1] // patches)
        exist = mask.sum(axis=1, keepdims=True) / patches
        stretch = jnp.where(exist > rows, (rows - 1) / jnp.maximum(exist - 1, 1), 1)
        place = jnp.minimum(jnp.arange(frames)[None] * stretch, rows - 1)  # what lies behind does not exist
        low = jnp.floor(place).astype(int)
        share = (place - low)[..., None]
        times = self.frame[low] * (1 - share) + self.frame[jnp.minimum(low + 1, rows - 1)] * share
        every = jnp.repeat(times, patches, axis=1)[:, : features.shape[1]]
        return features + every.astype(self.dtype)
