"""The frozen vision encoder: a pre-norm ViT (EVA ViT-g, CLIP ViT-L or DINOv2, by the options of `config.VitConfig`).

Features leave before BLIP-2's `ln_vision`, which is trained and therefore belongs to the Q-Former.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from .. import config
from ..typing import Array, Float, UInt8
from .grid_embedding import grid_embedding
from .layers import Attention, Mlp, at_least_float32, layer_norm

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training set; every tower of BLIP-2 uses it
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(image: UInt8['B S S 3']) -> Float['B S S 3']:
    """Return pixels 0..255 as the zero-mean, unit-variance numbers that the towers were trained on."""
    mean, std = (np.asarray(x, np.float32).reshape(1, 1, 1, 3) for x in (PIXEL_MEAN, PIXEL_STD))
    return (image.astype(jnp.float32) / 255 - mean) / std


def bicubic_matrix(old: int, new: int, rule: str) -> Float['new old']:
    """Return the weights of torch's bicubic resize (a = -0.75, edges repeated) along one axis (float64).

    `half_pixel` puts new pixel i at (i + 0.5) * old / new - 0.5 (align_corners=False), `align_corners` at
    i * (old - 1) / (new - 1).
    """
    i = np.arange(new, dtype=np.float64)
    where = (i + 0.5) * old / new - 0.5 if rule == 'half_pixel' else i * (old - 1) / max(new - 1, 1)
    base = np.floor(where).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        x = np.abs(where - (base + tap))
        near = (1.25 * x - 2.25) * x * x + 1
        far = -0.75 * (((x - 5) * x + 8) * x - 4)
        np.add.at(matrix, (np.arange(new), np.clip(base + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return matrix


def resize_positions(table: Float['P V'], grid: tuple[int, int], rule: str) -> Float['P2 V']:
    """Return the position table (class token first, then a square grid) resized to `grid` patches, bicubic."""
    old = round((table.shape[0] - 1) ** 0.5)
    if (old, old) == grid:
        return table
    table = at_least_float32(table)
    rows, columns = (jnp.asarray(bicubic_matrix(old, new, rule), table.dtype) for new in grid)
    square = table[1:].reshape(old, old, -1)
    resized = jnp.einsum('yi,xj,ijv->yxv', rows, columns, square)
    return jnp.concatenate([table[:1], resized.reshape(grid[0] * grid[1], -1)])


def _waves(key: Array, shape: tuple[int, int]) -> Float['P V']:
    """Return a fresh position table that tells places from the first step; the class token has none."""
    square = grid_embedding(round((shape[0] - 1) ** 0.5), shape[1], *jax.random.split(key))
    return jnp.concatenate([jnp.zeros((1, shape[1])), square])


class VitBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); DINOv2 scales both branches."""

    config: config.VitConfig
    dtype: DTypeLike

    def setup(self):
        c = self.config
        self.attention_norm = layer_norm(c.norm_eps, self.dtype)
        self.attention = Attention(c.width, c.heads, key_bias=c.attention_bias == 'all', dtype=self.dtype)
        self.mlp_norm = layer_norm(c.norm_eps, self.dtype)
        self.mlp = Mlp(c.mlp_width, c.width, c.activation, self.dtype)
        if c.layer_scale:
            self.attention_scale = self.param('attention_scale', nn.initializers.ones, (c.width,))
            self.mlp_scale = self.param('mlp_scale', nn.initializers.ones, (c.width,))

    def _scaled(self, branch: Array, scale_name: str) -> Array:
        if not self.config.layer_scale:
            return branch
        return branch * getattr(self, scale_name).astype(self.dtype).reshape(1, 1, -1)

    def __call__(self, x: Float['B P V']) -> Float['B P V']:
        y = self.attention_norm(x)
        x = x + self._scaled(self.attention(y, self.attention.project(y), None), 'attention_scale')
        return x + self._scaled(self.mlp(self.mlp_norm(x)), 'mlp_scale')


@struct.dataclass
class VitOutput:
    """What a tower sees; class token first."""

    features: Float['B P V']
    embedded: Float['B P I']
    """What enters the first block."""
    hidden_states: tuple[Array, ...]
    """[B, P, I], output of each block that was needed."""


class Vit(nn.Module):
    """A vision transformer over normalised pixels, of any size that the patches tile."""

    config: config.VitConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        c = self.config
        patch = (c.patch_size, c.patch_size)
        self.patch_projection = nn.Conv(
            c.width, patch, strides=patch, padding='VALID', use_bias=c.patch_bias, dtype=self.dtype
        )
        tokens = (c.image_size // c.patch_size) ** 2 + 1
        self.class_token = self.param('class_token', nn.initializers.normal(0.02), (c.width,))
        start = nn.initializers.normal(0.02) if c.positions == 'noise' else _waves
        self.position_embedding = self.param('position_embedding', start, (tokens, c.width))
        if c.pre_norm:
            self.pre_norm = layer_norm(c.norm_eps, self.dtype)
        self.layer = [VitBlock(c, self.dtype) for _ in range(c.depth)]
        if c.final_norm:
            self.norm = layer_norm(c.norm_eps, self.dtype)

    def __call__(self, pixels: Float['B S W 3']) -> VitOutput:
        """Return features [B, 1 + patches, V], of the last block or of the taps (DenseConnector's, Yao et al. 2024).

        Blocks after the last tap are not computed, but have parameters: a tower is the same one whatever is tapped.
        """
        patches = self.patch_projection(pixels.astype(self.dtype))
        batch, *grid, width = patches.shape
        x = patches.reshape(batch, -1, width)
        first = jnp.broadcast_to(self.class_token.astype(self.dtype).reshape(1, 1, -1), (batch, 1, width))
        positions = resize_positions(self.position_embedding, tuple(grid), self.config.position_resize)
        x = jnp.concatenate([first, x], axis=1) + positions.astype(self.dtype)[None]
        embedded = x = self.pre_norm(x) if self.config.pre_norm else x
        hidden, taps = [], self.config.taps or (self.config.depth - 1,)
        for layer in self.layer if self.is_initializing() else self.layer[: max(taps) + 1]:
            x = layer(x)
            hidden.append(x)
        tapped = [self.norm(hidden[tap]) if self.config.final_norm else hidden[tap] for tap in taps]
        return VitOutput(jnp.concatenate(tapped, axis=-1), embedded, tuple(hidden))
