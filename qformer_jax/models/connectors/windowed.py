"""A Q-Former over windows of a long sequence, such as sound (SALMONN, Tang et al. 2023, 2310.13289; our name).

What an audio encoder gives is cut into windows (of 0.33 s there), and the same queries read each. Of 7 features and
windows of 3, three windows give `tokens` tokens each, the last one from one feature:

    feature    0 1 2 | 3 4 5 | 6 . .        So the number of tokens grows with the sequence, and stays in its order.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ... import config
from ...typing import Bool, Float
from .. import masks
from ..qformer import Qformer


class Connector(nn.Module):
    """`tokens` queries that read `window` features at a time, in every layer. Reads all fields."""

    config: config.ConnectorConfig
    dtype: DTypeLike

    def setup(self):
        c = self.config
        layers = config.QformerConfig(
            feature_width=c.feature_width,
            num_queries=c.tokens,
            width=c.width,
            depth=c.depth,
            heads=c.heads,
            mlp_width=c.mlp_width,
            cross_attention_freq=1,
            text_side='none',
        )
        self.qformer = Qformer(layers, self.dtype)

    def __call__(self, features: Float['B P V'], mask: Bool['B P']) -> tuple[Float['B Q D'], Bool['B Q']]:
        """Return the tokens, and which exist: those of windows in which a feature does."""
        c, batch = self.config, features.shape[0]
        windows = (features.shape[1] + c.window - 1) // c.window
        more = windows * c.window - features.shape[1]
        mask = jnp.pad(mask, ((0, 0), (0, more))).reshape(batch * windows, c.window)
        features = jnp.pad(features, ((0, 0), (0, more), (0, 0))).reshape(batch * windows, c.window, -1)
        memory = self.qformer.project_normalised(features, mask)
        read = masks.bidirectional(c.tokens, jnp.ones((batch * windows, 0), bool))
        tokens = self.qformer(read, image=memory).queries
        token_mask = jnp.repeat(mask.any(axis=1), c.tokens)
        return tokens.reshape(batch, windows * c.tokens, -1), token_mask.reshape(batch, windows * c.tokens)
