"""Honeybee's C-Abstractor (Cha et al. 2024, 2312.06742, section 4.2): convolutions, averages, convolutions."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ... import config
from ...typing import Bool, Float
from ..layers import dense, layer_norm
from ..pooling import grid, pool_grid


class BottleneckBlock(nn.Module):
    """A bottleneck with a 3 x 3 convolution a channel, and a gate a channel (squeeze and excitation); residual."""

    width: int
    dtype: DTypeLike

    def setup(self):
        self.norm = layer_norm(1e-6, self.dtype)
        self.input, self.output = dense(self.width, self.dtype), dense(self.width, self.dtype)
        self.convolution = nn.Conv(self.width, (3, 3), feature_group_count=self.width, dtype=self.dtype)
        self.squeeze, self.excite = dense(self.width // 4, self.dtype), dense(self.width, self.dtype)

    def __call__(self, x: Float['B y x D']) -> Float['B y x D']:
        y = nn.silu(self.convolution(nn.silu(self.input(self.norm(x)))))
        gate = self.excite(nn.silu(self.squeeze(y.mean(axis=(1, 2), keepdims=True))))
        return x + self.output(y * jax.nn.sigmoid(gate))


class Connector(nn.Module):
    """`depth` blocks on the grid of patches, `tokens` (a square number) averages, `depth` blocks. Reads `width` too."""

    config: config.ConnectorConfig
    dtype: DTypeLike

    def setup(self):
        c = self.config
        self.input = dense(c.width, self.dtype)
        self.before = [BottleneckBlock(c.width, self.dtype) for _ in range(c.depth)]
        self.after = [BottleneckBlock(c.width, self.dtype) for _ in range(c.depth)]

    def __call__(self, features: Float['B P V'], mask: Bool['B P']) -> tuple[Float['B Q D'], Bool['B Q']]:
        batch, width = features.shape[0], self.config.width
        old, first = grid(features.shape[1])
        side = math.isqrt(self.config.tokens)
        x = self.input(features[:, first:]).reshape(batch, old, old, width)
        for block in self.before:
            x = block(x)
        x = pool_grid(x.reshape(batch, old * old, width), side).reshape(batch, side, side, width)
        for block in self.after:
            x = block(x)
        return x.reshape(batch, side * side, width), jnp.ones((batch, side * side), bool)
