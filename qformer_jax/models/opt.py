"""The frozen decoder LM: OPT (Zhang et al. 2022) over embeddings, with an explicit key-value cache."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .. import config
from ..errors import UserError
from ..typing import Array, Bool, Float, Int
from . import masks
from .kv_cache import KVCache, LmOutput, place, write
from .layers import Attention, KeyValue, Mlp, dense, layer_norm, tied_logits
from .quantized import weight

POSITION_OFFSET = 2  # OPT's table has two rows before position 0
NORM_EPS = 1e-5


class OptBlock(nn.Module):
    """Causal self-attention and a ReLU MLP, each with its norm before it (OPT-350M: after it)."""

    config: config.OptConfig
    dtype: DTypeLike

    def setup(self):
        c = self.config
        self.attention_norm = layer_norm(NORM_EPS, self.dtype)
        self.attention = Attention(c.width, c.heads, dtype=self.dtype)
        self.mlp_norm = layer_norm(NORM_EPS, self.dtype)
        self.mlp = Mlp(c.mlp_width, c.width, 'relu', self.dtype)

    def __call__(
        self, x: Float['B T L'], mask: Bool['B 1 T M'], cached: KeyValue | None, start: Array | int
    ) -> tuple[Float['B T L'], KeyValue]:
        """Return the new hidden states and the keys and values seen (`cached` with this call's written at `start`)."""
        first = self.config.norm_first
        y = self.attention_norm(x) if first else x
        kv = self.attention.project(y)
        if cached is not None:
            kv = jax.tree.map(lambda old, new: write(old, new, start), cached, kv)
        x = x + self.attention(y, kv, mask)
        if first:
            return x + self.mlp(self.mlp_norm(x)), kv
        x = self.attention_norm(x)
        return self.mlp_norm(x + self.mlp(x)), kv


class Opt(nn.Module):
    """OPT with a tied token table; positions follow from the mask, so padding may stand anywhere."""

    config: config.OptConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        c = self.config
        table = nn.initializers.normal(c.input_width**-0.5)
        self.word_embedding = weight(self, 'word_embedding', table, (c.vocab_size, c.input_width))
        rows = c.max_positions + POSITION_OFFSET
        self.position_embedding = self.param('position_embedding', nn.initializers.normal(0.02), (rows, c.width))
        self.layer = [OptBlock(c, self.dtype) for _ in range(c.depth)]
        if c.norm_first:
            self.norm = layer_norm(NORM_EPS, self.dtype)
        if c.input_width != c.width:
            self.input_projection = dense(c.width, self.dtype, use_bias=False)
            self.output_projection = dense(c.input_width, self.dtype, use_bias=False)

    def embed(self, ids: Int['B T']) -> Float['B T L']:
        """Return the token vectors of `ids`, without positions."""
        return self.word_embedding[ids].astype(self.dtype)

    def __call__(
        self,
        x: Float['B T L'],
        token_mask: Bool['B T'],
        cache: KVCache | None = None,
        pre_block_hooks: Mapping[int, Callable[[Array], Array]] = MappingProxyType({}),
    ) -> LmOutput:
        """Run the decoder over token vectors (or a soft prefix); with a cache, after the positions that it holds.

        `pre_block_hooks` says what to do to the hidden states before which block (`gated_cross_attention.py`). Raises
        UserError for rows longer than the table of positions: a lookup past its end would take its last row, and say
        nothing.
        """
        c, length = self.config, x.shape[1]
        if cache is None and length > c.max_positions:
            raise UserError(
                f'rows of {length} tokens, the picture among them, do not fit the language model: it has '
                f'{c.max_positions} positions (model.lm.max-positions; data.max-lm-text cuts texts)'
            )
        slots, start = place(cache, token_mask)
        position = jax.lax.dynamic_slice_in_dim(masks.positions(slots), start, length, axis=1)
        x = x.astype(self.dtype)
        x = self.input_projection(x) if c.input_width != c.width else x
        x = x + self.position_embedding[position + POSITION_OFFSET].astype(self.dtype)
        mask = masks.decoder(slots, start, length)
        layers, hidden = [], [x]
        for i, layer in enumerate(self.layer):
            x = pre_block_hooks[i](x) if i in pre_block_hooks else x
            x, kv = layer(x, mask, cache.layers[i] if cache is not None else None, start)
            layers.append(kv)
            hidden.append(x)
        new = KVCache(tuple(layers), slots, start + length) if cache is not None else None
        x = self.norm(x) if c.norm_first else x
        x = self.output_projection(x) if c.input_width != c.width else x
        return LmOutput(x, new, tuple(hidden))

    def word_logits(self, hidden: Float['B T L']) -> Float['B T N']:
        """Return the logits of the next token (float32)."""
        return tied_logits(hidden, self.word_embedding)
