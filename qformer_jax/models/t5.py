"""The frozen encoder-decoder LM: T5 (Raffel et al. 2020), in the form of T5 1.1 and Flan-T5.

The encoder reads the soft prefix and the prompt, the decoder writes. No scaling in attention, RMSNorm, a gated MLP, an
untied output table; positions enter as one learned bias per head and bucket of distances, the same in every layer.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from .. import config
from ..typing import Array, Bool, Float, Int, Size
from . import kv_cache, masks
from .kv_cache import KVCache, LmOutput, place, write
from .layers import GatedMlp, KeyValue, attend, dense, rms_norm, untied_head
from .quantized import weight

START_ID = 0  # what the decoder reads before the first token: T5's padding id


def distance_buckets(buckets: int, max_distance: int) -> Int['R']:
    """Return the bucket of each distance 0..max_distance: half of them one distance each, then logarithmic.

    Worked example, 8 buckets and distance 20: 0 1 2 3 4 4 5 5 5 6 ..., from 14 on 7. In float32, as T5 was trained: a
    distance on the edge of a bucket falls where rounding puts it.
    """
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(np.log(max_distance / exact)) * np.float32(buckets - exact)
    return np.where(distance < exact, distance, np.minimum(exact + steps.astype(int), buckets - 1)).astype(np.int32)


def relative_bias(
    table: Float['buckets H'],
    query_position: Int['B S'],
    key_position: Int['B M'],
    max_distance: int,
    *,
    both_sides: bool,
) -> Float['B H S M']:
    """Return what attention adds for a position in `query_position` that looks at one in `key_position`.

    The encoder looks to `both_sides`: half of the buckets are for what comes after. The decoder looks back only.
    """
    ahead = key_position[:, None, :] - query_position[:, :, None]
    buckets = table.shape[0] // 2 if both_sides else table.shape[0]
    distance = jnp.abs(ahead) if both_sides else jnp.maximum(-ahead, 0)
    bucket = jnp.asarray(distance_buckets(buckets, max_distance))[jnp.minimum(distance, max_distance)]
    if both_sides:
        bucket += buckets * (ahead > 0)
    return table[bucket].transpose(0, 3, 1, 2)


class T5Attention(nn.Module):
    """Multi-head attention without scaling or biases; keys and values can be projected once and read many times."""

    config: config.T5Config
    dtype: DTypeLike

    def setup(self):
        c = self.config
        inner = c.heads * c.head_width
        calm = nn.initializers.normal((c.width * c.head_width) ** -0.5)  # makes up for the missing scaling
        self.query = dense(inner, self.dtype, use_bias=False, kernel_init=calm)
        self.key = dense(inner, self.dtype, use_bias=False)
        self.value = dense(inner, self.dtype, use_bias=False)
        self.output = dense(c.width, self.dtype, use_bias=False)

    def _heads(self, x: Float['B M I']) -> Float['B M H K']:
        return x.reshape(*x.shape[:-1], self.config.heads, self.config.head_width)

    def project(self, x: Float['B M L']) -> KeyValue:
        """Return the keys and values of `x`."""
        return KeyValue(self._heads(self.key(x)), self._heads(self.value(x)))

    def __call__(
        self, x: Float['B S L'], kv: KeyValue, mask: Bool['B 1 s M'], bias: Float['B H S M'] | None = None
    ) -> Float['B S L']:
        """Return what each position of `x` reads from `kv`; softmax in float32 or wider."""
        query = self._heads(self.query(x))
        read = attend(query, kv, mask, bias, scale=1.0)
        return self.output(read.reshape(*x.shape[:-1], -1))


class T5EncoderBlock(nn.Module):
    """Self-attention and a gated MLP, both pre-norm."""

    config: config.T5Config
    dtype: DTypeLike

    def setup(self):
        c = self.config
        self.self_attention_norm = rms_norm(c.norm_eps, self.dtype)
        self.self_attention = T5Attention(c, self.dtype)
        self.mlp_norm = rms_norm(c.norm_eps, self.dtype)
        self.mlp = GatedMlp(c.mlp_width, c.width, c.activation, self.dtype)

    def __call__(self, x: Float['B S L'], mask: Bool['B 1 1 S'], bias: Float['B H S S']) -> Float['B S L']:
        y = self.self_attention_norm(x)
        x = x + self.self_attention(y, self.self_attention.project(y), mask, bias)
        return x + self.mlp(self.mlp_norm(x))


class T5DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoder's output, and a gated MLP, all pre-norm."""

    config: config.T5Config
    dtype: DTypeLike

    def setup(self):
        c = self.config
        self.self_attention_norm = rms_norm(c.norm_eps, self.dtype)
        self.self_attention = T5Attention(c, self.dtype)
        self.cross_attention_norm = rms_norm(c.norm_eps, self.dtype)
        self.cross_attention = T5Attention(c, self.dtype)
        self.mlp_norm = rms_norm(c.norm_eps, self.dtype)
        self.mlp = GatedMlp(c.mlp_width, c.width, c.activation, self.dtype)

    def __call__(
        self,
        x: Float['B T L'],
        mask: Bool['B 1 T M'],
        bias: Float['B H T M'],
        encoded: KeyValue,
        encoded_mask: Bool['B 1 1 S'],
        cached: KeyValue | None,
        start: Array | int,
    ) -> tuple[Float['B T L'], KeyValue]:
        """Return the new hidden states and the keys and values seen (`cached` with this call's written at `start`)."""
        y = self.self_attention_norm(x)
        kv = self.self_attention.project(y)
        if cached is not None:
            kv = jax.tree.map(lambda old, new: write(old, new, start), cached, kv)
        x = x + self.self_attention(y, kv, mask, bias)
        x = x + self.cross_attention(self.cross_attention_norm(x), encoded, encoded_mask)
        return x + self.mlp(self.mlp_norm(x)), kv


class T5Encoder(nn.Module):
    """Reads a row in which everything sees everything that exists."""

    config: config.T5Config
    dtype: DTypeLike

    def setup(self):
        c = self.config
        self.relative_bias = _bias_table(self, c)
        self.layer = [T5EncoderBlock(c, self.dtype) for _ in range(c.depth)]
        self.norm = rms_norm(c.norm_eps, self.dtype)

    def __call__(self, x: Float['B S L'], token_mask: Bool['B S']) -> tuple[Float['B S L'], tuple[Array, ...]]:
        """Return the hidden states after the final norm, and those that enter the first block and leave each."""
        where = masks.positions(token_mask)
        bias = relative_bias(self.relative_bias, where, where, self.config.max_distance, both_sides=True)
        hidden = [x]
        for layer in self.layer:
            x = layer(x, token_mask[:, None, None, :], bias)
            hidden.append(x)
        return self.norm(x), tuple(hidden)


@struct.dataclass
class EncoderOutput:
    """What the encoder made of its row, projected once for every layer of the decoder."""

    hidden: Float['B S L']
    layers: tuple[KeyValue, ...]
    mask: Bool['B S']
    hidden_states: tuple[Array, ...]
    """[B, S, L] entering the encoder's first block, and after each."""


class T5Decoder(nn.Module):
    """Writes: each position sees the ones before it, and the encoder's row."""

    config: config.T5Config
    dtype: DTypeLike

    def setup(self):
        c = self.config
        self.relative_bias = _bias_table(self, c)
        self.layer = [T5DecoderBlock(c, self.dtype) for _ in range(c.decoder_depth)]
        self.norm = rms_norm(c.norm_eps, self.dtype)

    def project(self, hidden: Float['B S L']) -> tuple[KeyValue, ...]:
        """Return the keys and values of the encoder's output, a layer each."""
        return tuple(layer.cross_attention.project(hidden) for layer in self.layer)

    def __call__(
        self, x: Float['B T L'], token_mask: Bool['B T'], memory: EncoderOutput, cache: KVCache | None
    ) -> LmOutput:
        length = x.shape[1]
        slots, start = place(cache, token_mask)
        key_position = masks.positions(slots)
        query_position = jax.lax.dynamic_slice_in_dim(key_position, start, length, axis=1)
        bias = relative_bias(
            self.relative_bias, query_position, key_position, self.config.max_distance, both_sides=False
        )
        mask, encoded_mask = masks.decoder(slots, start, length), memory.mask[:, None, None, :]
        layers, hidden = [], [x]
        for i, layer in enumerate(self.layer):
            cached = cache.layers[i] if cache is not None else None
            x, own = layer(x, mask, bias, memory.layers[i], encoded_mask, cached, start)
            layers.append(own)
            hidden.append(x)
        new = KVCache(tuple(layers), slots, start + length) if cache is not None else None
        return LmOutput(self.norm(x), new, tuple(hidden))


def _bias_table(module: nn.Module, c: config.T5Config) -> Float['buckets H']:
    return module.param('relative_bias', nn.initializers.normal(c.width**-0.5), (c.buckets, c.heads))


class T5(nn.Module):
    """Encoder and decoder over one token table; positions follow from the masks, so padding may stand anywhere."""

    config: config.T5Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        c = self.config
        self.word_embedding = weight(self, 'word_embedding', nn.initializers.normal(1.0), (c.vocab_size, c.width))
        self.encoder = T5Encoder(c, self.dtype)
        self.decoder = T5Decoder(c, self.dtype)
        self.lm_head = untied_head(c.vocab_size, self.dtype)

    def embed(self, ids: Int['B T']) -> Float['B T L']:
        """Return the token vectors of `ids`."""
        return self.word_embedding[ids].astype(self.dtype)

    def encode(self, x: Float['B S L'], token_mask: Bool['B S']) -> EncoderOutput:
        """Read token vectors (or a soft prefix) and project the result for the decoder, once for all its calls."""
        hidden, states = self.encoder(x.astype(self.dtype), token_mask)
        return EncoderOutput(hidden, self.decoder.project(hidden), token_mask, states)

    def decode(
        self, x: Float['B T L'], token_mask: Bool['B T'], memory: EncoderOutput, cache: KVCache | None = None
    ) -> LmOutput:
        """Run the decoder over the vectors of `START_ID` and the tokens after it; with a cache, after what it holds."""
        return self.decoder(x.astype(self.dtype), token_mask, memory, cache)

    def __call__(self, x: Float['B T L'], token_mask: Bool['B T'], cache: tuple[EncoderOutput, KVCache]) -> LmOutput:
        """Run the decoder over the vectors of tokens that follow what the cache, with the encoder's output, holds."""
        memory, own = cache
        out = self.decode(x, token_mask, memory, own)
        return out.replace(cache=(memory, out.cache))

    def word_logits(self, hidden: Float['B T L']) -> Float['B T N']:
        """Return the logits of the next token (float32 or wider)."""
        return self.lm_head(hidden)


def shift_right(text: Int['B T'], target: Bool['B T']) -> Int['B T']:
    """Return what the decoder reads to predict each target: the token before it, `START_ID` before the first.

    Targets stand side by side: of [7 8 9 5] with [0 1 1 0], the decoder reads 0 at the 8 and 8 at the 9.
    """
    before, counts = (jnp.pad(x[:, :-1], ((0, 0), (1, 0))) for x in (text, target))
    return jnp.where(counts, before, START_ID)


def decoder_prompt(prompt: Int['B T'], prompt_mask: Bool['B T']) -> tuple[Int['B 1'], Bool['B 1']]:
    """Return what the decoder itself reads before it writes, `START_ID`: the prompt is its encoder's."""
    first = jnp.full((prompt.shape[0], 1), START_ID)
    return first, jnp.ones(first.shape, bool)


def prefill_inputs(
    lm: T5, x: Float['B S L'], token_mask: Bool['B S'], new: Size
) -> tuple[Float['B 1 L'], Bool['B 1'], tuple[EncoderOutput, KVCache]]:
    """Let the encoder read [prefix, prompt]; returns what the decoder reads first, and a cache for `new` tokens."""
    memory = lm.encode(x, token_mask).replace(hidden_states=())  # beams would carry them along
    first = jnp.full((x.shape[0], 1), START_ID)
    cache = kv_cache.empty(lm.config, x.shape[0], new, lm.dtype)
    return lm.embed(first), jnp.ones(first.shape, bool), (memory, cache)


def target_hidden_states(
    lm: T5, x: Float['B S L'], token_mask: Bool['B S'], text: Int['B T'], target: Bool['B T']
) -> Float['B T L']:
    """Return the hidden states that predict each target: the encoder reads [prefix, text] but for the targets."""
    memory = lm.encode(x, token_mask & ~jnp.pad(target, ((0, 0), (x.shape[1] - text.shape[1], 0))))
    return lm.decode(lm.embed(shift_right(text, target)), target, memory).hidden
