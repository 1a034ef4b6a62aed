"""Gated cross-attention between the blocks of a frozen decoder (Flamingo, Alayrac et al. 2022, section 3.1.2).

Before every k-th block, x being the text's hidden states and media what a picture gives:

    x = x + tanh(a) * attention(norm(x), media)
    x = x + tanh(b) * mlp(norm(x))

Both gates begin at zero: before the first step the decoder is, to the last bit, what it was. Media are as wide as the
decoder's input, by the projection that makes a soft prefix elsewhere; Flamingo projects to keys and values at once.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from .. import config
from ..typing import Bool, Float
from .kv_cache import Media
from .layers import Attention, KeyValue, Mlp, layer_norm


class GatedCrossAttention(nn.Module):
    """What stands before one block, `width` wide."""

    config: config.GatesConfig
    width: int
    dtype: DTypeLike

    def setup(self):
        c = self.config
        self.attention_norm, self.mlp_norm = (layer_norm(1e-5, self.dtype) for _ in range(2))
        self.attention = Attention(self.width, c.heads, dtype=self.dtype)
        self.mlp = Mlp(c.mlp_width, self.width, dtype=self.dtype)
        self.attention_gate, self.mlp_gate = (
            self.param(name, nn.initializers.zeros, ()) for name in ('attention_gate', 'mlp_gate')
        )

    def __call__(self, kv: KeyValue, kv_mask: Bool['b 1 t M'], x: Float['B T L']) -> Float['B T L']:
        """Return the hidden states with what they read; a position that sees nothing reads 0."""
        read = self.attention(self.attention_norm(x), kv, kv_mask)
        read = jnp.where(kv_mask.any(axis=-1)[:, 0, :, None], read, 0)
        x = x + jnp.tanh(self.attention_gate).astype(x.dtype) * read
        return x + jnp.tanh(self.mlp_gate).astype(x.dtype) * self.mlp(self.mlp_norm(x))


class Gates(nn.Module):
    """The layers before blocks 0, k, 2 k, ... of a decoder of `depth` blocks; `layer_I` stands before block I."""

    config: config.GatesConfig
    depth: int
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self):
        blocks = range(0, self.depth, self.config.every)
        self.layer = {str(block): GatedCrossAttention(self.config, self.width, self.dtype) for block in blocks}

    def project(self, media: Float['B M L'], media_mask: Bool['B M']) -> Media:
        """Return the media's keys and values, once for all tokens that will read them."""
        return Media(tuple(layer.attention.project(media) for layer in self.layer.values()), media_mask)

    def pre_block_hooks(self, media: Media, kv_mask: Bool['b 1 t M']) -> dict[int, Callable]:
        """Return what to do to the hidden states before which block."""
        pairs = zip(self.layer.items(), media.layers, strict=True)
        return {int(block): partial(layer, kv, kv_mask) for (block, layer), kv in pairs}
