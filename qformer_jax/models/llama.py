"""The frozen decoder LM of InstructBLIP: Llama (Touvron et al. 2023), as Vicuna and SmolLM2.

RMSNorm, a gated MLP, no biases. Positions turn queries and keys (RoPE, Su et al. 2021), so attention sees distances
only; several attention heads may read the same keys and values (grouped heads, Ainslie et al. 2023).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .. import config
from ..errors import UserError
from ..typing import Array, Bool, Float, Int
from . import masks
from .kv_cache import KVCache, LmOutput, place, write
from .layers import GatedMlp, KeyValue, attend, dense, rms_norm, tied_logits, untied_head
from .quantized import weight


def rotations(position: Int['B T'], head_width: int, base: float, dtype: DTypeLike) -> Float['B T k 2']:
    """Return cosine and sine of the angles by which each pair of a head turns at a position, in float32 or wider.

    Pair j turns by position / base ** (2 j / head_width): the first by one radian a position, the last hardly at all.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    speed = base ** -(np.arange(0, head_width, 2) / head_width)
    angle = position[..., None].astype(wide) * jnp.asarray(speed, wide)[None, None]
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def turn(x: Float['B T H K'], rotation: Float['B T k 2']) -> Float['B T H K']:
    """Return `x` with each pair of a head turned; pair j is (j, j + K / 2), as Hugging Face stores the weights."""
    cosine, sine = rotation[:, :, None, :, 0], rotation[:, :, None, :, 1]
    first, second = jnp.split(x.astype(rotation.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


class LlamaAttention(nn.Module):
    """Attention over turned queries and keys; keys are kept turned, so a cache needs no positions.

    Raises UserError where heads of keys do not divide those of queries, or a head does not consist of pairs.
    """

    config: config.LlamaConfig
    dtype: DTypeLike

    def setup(self):
        c = self.config
        if c.heads % c.kv_heads or c.head_width % 2:
            raise UserError(
                f'{"/".join(self.path)}: {c.heads} heads of width {c.head_width} over {c.kv_heads} of keys: the width '
                'must be even, and each head of keys serve the same number'
            )
        self.query = dense(c.heads * c.head_width, self.dtype, use_bias=False)
        self.key = dense(c.kv_heads * c.head_width, self.dtype, use_bias=False)
        self.value = dense(c.kv_heads * c.head_width, self.dtype, use_bias=False)
        self.output = dense(c.width, self.dtype, use_bias=False)

    def _heads(self, x: Float['B T I']) -> Float['B T H K']:
        return x.reshape(*x.shape[:-1], -1, self.config.head_width)

    def project(self, x: Float['B T L'], rotation: Float['B T k 2']) -> KeyValue:
        """Return the turned keys, and the values, of `x`."""
        return KeyValue(turn(self._heads(self.key(x)), rotation), self._heads(self.value(x)))

    def __call__(
        self, x: Float['B T L'], rotation: Float['B T k 2'], kv: KeyValue, mask: Bool['B 1 T M']
    ) -> Float['B T L']:
        """Return what each position of `x` reads from `kv`."""
        query = turn(self._heads(self.query(x)), rotation)
        read = attend(query, kv, mask, scale=self.config.head_width**-0.5)
        return self.output(read.reshape(*x.shape[:-1], -1))


class LlamaBlock(nn.Module):
    """Causal self-attention and a gated MLP, both pre-norm."""

    config: config.LlamaConfig
    dtype: DTypeLike

    def setup(self):
        c = self.config
        self.attention_norm = rms_norm(c.norm_eps, self.dtype)
        self.attention = LlamaAttention(c, self.dtype)
        self.mlp_norm = rms_norm(c.norm_eps, self.dtype)
        self.mlp = GatedMlp(c.mlp_width, c.width, 'silu', self.dtype)

    def __call__(
        self,
        x: Float['B T L'],
        rotation: Float['B T k 2'],
        mask: Bool['B 1 T M'],
        cached: KeyValue | None,
        start: Array | int,
    ) -> tuple[Float['B T L'], KeyValue]:
        """Return the new hidden states and the keys and values seen (`cached` with this call's written at `start`)."""
        y = self.attention_norm(x)
        kv = self.attention.project(y, rotation)
        if cached is not None:
            kv = jax.tree.map(lambda old, new: write(old, new, start), cached, kv)
        x = x + self.attention(y, rotation, kv, mask)
        return x + self.mlp(self.mlp_norm(x)), kv


class Llama(nn.Module):
    """Llama, its output table tied or not; positions follow from the mask, so padding may stand anywhere."""

    config: config.LlamaConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        c = self.config
        table = nn.initializers.normal(c.width**-0.5)
        self.word_embedding = weight(self, 'word_embedding', table, (c.vocab_size, c.width))
        self.layer = [LlamaBlock(c, self.dtype) for _ in range(c.depth)]
        self.norm = rms_norm(c.norm_eps, self.dtype)
        if not c.tied:
            self.lm_head = untied_head(c.vocab_size, self.dtype)

    def embed(self, ids: Int['B T']) -> Float['B T L']:
        """Return the token vectors of `ids`."""
        return self.word_embedding[ids].astype(self.dtype)

    def __call__(
        self,
        x: Float['B T L'],
        token_mask: Bool['B T'],
        cache: KVCache | None = None,
        pre_block_hooks: Mapping[int, Callable[[Array], Array]] = MappingProxyType({}),
    ) -> LmOutput:
        """Run the decoder over token vectors (or a soft prefix); with a cache, after the positions that it holds.

        `pre_block_hooks` says what to do to the hidden states before which block (`gated_cross_attention.py`).
        """
        c, length = self.config, x.shape[1]
        slots, start = place(cache, token_mask)
        position = jax.lax.dynamic_slice_in_dim(masks.positions(slots), start, length, axis=1)
        rotation = rotations(position, c.head_width, c.rope_base, self.dtype)
        mask = masks.decoder(slots, start, length)
        x = x.astype(self.dtype)
        layers, hidden = [], [x]
        for i, layer in enumerate(self.layer):
            x = pre_block_hooks[i](x) if i in pre_block_hooks else x
            x, kv = layer(x, rotation, mask, cache.layers[i] if cache is not None else None, start)
            layers.append(kv)
            hidden.append(x)
        new = KVCache(tuple(layers), slots, start + length) if cache is not None else None
        return LmOutput(self.norm(x), new, tuple(hidden))

    def word_logits(self, hidden: Float['B T L']) -> Float['B T N']:
        """Return the logits of the next token (float32 or wider)."""
        return tied_logits(hidden, self.word_embedding) if self.config.tied else self.lm_head(hidden)
