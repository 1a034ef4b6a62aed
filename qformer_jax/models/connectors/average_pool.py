"""DeCo's connector (Yao et al. 2024, 2405.20985): patches averaged on their grid, then two layers on each average."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ... import config
from ...typing import Bool, Float
from ..layers import dense, gelu
from ..pooling import pool_grid


class Connector(nn.Module):
    """`tokens` (a square number) averages of a square grid of patches; a class token is left out. Reads `width`."""

    config: config.ConnectorConfig
    dtype: DTypeLike

    def setup(self):
        self.up = dense(self.config.width, self.dtype)

    def __call__(self, features: Float['B P V'], mask: Bool['B P']) -> tuple[Float['B Q D'], Bool['B Q']]:
        tokens = gelu(self.up(pool_grid(features, math.isqrt(self.config.tokens))))
        return tokens, jnp.ones(tokens.shape[:2], bool)
