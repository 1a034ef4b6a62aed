"""Flamingo's Perceiver resampler (Alayrac et al. 2022, section 3.1.1 and appendix A.1.1)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ... import config
from ...typing import Bool, Float
from ..layers import Attention, Mlp, dense, layer_norm


class ResamplerLayer(nn.Module):
    """Latents read [features, latents], then a feed-forward network; pre-norm, residual."""

    config: config.ConnectorConfig
    dtype: DTypeLike

    def setup(self):
        c = self.config
        self.feature_norm, self.latent_norm, self.mlp_norm = (layer_norm(1e-5, self.dtype) for _ in range(3))
        self.attention = Attention(c.width, c.heads, dtype=self.dtype)
        self.mlp = Mlp(c.mlp_width, c.width, dtype=self.dtype)

    def __call__(self, x: Float['B Q D'], features: Float['B P D'], mask: Bool['B 1 1 M']) -> Float['B Q D']:
        latents = self.latent_norm(x)
        kv = self.attention.project(jnp.concatenate([self.feature_norm(features), latents], axis=1))
        x = x + self.attention(latents, kv, mask)
        return x + self.mlp(self.mlp_norm(x))


class Connector(nn.Module):
    """`tokens` latents that read the features `depth` times. Reads all fields."""

    config: config.ConnectorConfig
    dtype: DTypeLike

    def setup(self):
        c = self.config
        self.latent = self.param('latent', nn.initializers.normal(1.0), (c.tokens, c.width))
        self.input = dense(c.width, self.dtype)
        self.layer = [ResamplerLayer(c, self.dtype) for _ in range(c.depth)]
        self.norm = layer_norm(1e-5, self.dtype)

    def __call__(self, features: Float['B P V'], mask: Bool['B P']) -> tuple[Float['B Q D'], Bool['B Q']]:
        batch, c = features.shape[0], self.config
        x = jnp.broadcast_to(self.latent[None].astype(self.dtype), (batch, c.tokens, c.width))
        kv_mask = jnp.concatenate([mask, jnp.ones((batch, c.tokens), bool)], axis=1)[:, None, None, :]
        features = self.input(features)
        for layer in self.layer:
            x = layer(x, features, kv_mask)
        return self.norm(x), jnp.ones((batch, c.tokens), bool)
