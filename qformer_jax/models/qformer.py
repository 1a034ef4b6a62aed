"""The Q-Former (BLIP-2, section 3.1): learned queries that read frozen features, and a text branch beside them.

A BERT encoder (post-norm) over [queries, text]. Both share the self-attention; each has a feed-forward network of its
own; in every `cross_attention_freq`-th layer, from layer 0, the queries also read the features.

    features [B,P,V] -> project_image -> ImageMemory --+
    queries  [Q,D]   ----------------------------------+--> layers --> queries [B,Q,D], text [B,T,D], their cache
    text ids [B,T]   -> embed -------------------------+

What a position may see is the mask's business (`masks.py`), so one `__call__` serves all passes of stage 1.

Three options change what the queries are, each of which leaves BLIP-2's network as it is where it is not taken:
`query_bank` mixes their first vectors by the picture (`queries.py`), `local_queries` lets some see one window each
(`masks.windows`; our name is multi-granularity, after TokenPacker, Li et al. 2024, whose tokens read one window each),
`gated_residual` adds pooled features to what leaves the last layer (our name is QFormer++; the gate is Flamingo's,
Alayrac et al. 2022). ITG reads the queries' keys inside the layers, so it does not see that sum.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from .. import config
from ..errors import UserError
from ..typing import Array, Bool, Float, Int, Size
from . import masks, queries
from .layers import Attention, KeyValue, Mlp, at_least_float32, dense, gelu, layer_norm, tied_logits
from .pooling import pool


@struct.dataclass
class ImageMemory:
    """What every pass takes from the features, computed once: keys and values, and what else depends on them."""

    layers: tuple[KeyValue | None, ...]
    """One a layer; None where the layer has no cross-attention."""
    mask: Bool['B 1 q P']
    """Which features exist, or which of them each query sees."""
    start: Float['B Q D'] | None = None
    """The mixtures at which the queries start; None: where they start for every picture."""
    residual: Float['B Q D'] | None = None
    """What the gate adds to the queries."""
    query_mask: Bool['B Q'] | None = None
    """Which of the picture's queries exist; None: all."""

    def with_query_mask(self, query_mask: Bool['Q'] | None) -> 'ImageMemory':
        """Return the memory of pictures of which only some queries exist (None: all)."""
        if query_mask is None:
            return self
        return self.replace(query_mask=jnp.broadcast_to(query_mask, (len(self.mask), *query_mask.shape)))

    def take(self, rows: Int['C']) -> 'ImageMemory':
        """Return the memory of the pictures `rows`, in that order."""
        return jax.tree.map(lambda x: x[rows], self)


@struct.dataclass
class QformerOutput:
    """Last hidden states, and what a later pass or a curious reader may want."""

    queries: Float['B Q D']
    text: Float['B T D']
    cache: tuple[KeyValue, ...]
    """Self-attention keys and values of this pass's positions, one a layer."""
    hidden_states: tuple[Array, ...]
    """[B, S, D] after the embedding norm and after each layer."""
    query_mask: Bool['B Q'] | None = None
    """Which of the queries exist; None: all."""
    attention: tuple[Float['B H Q P'], ...] = ()
    """Where the queries look, one a layer that reads features; empty unless asked for."""
    self_attention: tuple[Float['B H S M'], ...] = ()
    """What each position takes from which, one a layer; empty unless asked for."""


class QformerLayer(nn.Module):
    """Self-attention of all positions, cross-attention of the queries, and one feed-forward network each."""

    config: config.QformerConfig
    reads_features: bool
    dtype: DTypeLike

    def setup(self):
        c = self.config
        self.self_attention = Attention(c.width, c.heads, dropout=c.dropout, dtype=self.dtype)
        self.self_attention_norm = layer_norm(c.norm_eps, self.dtype)
        if self.reads_features:
            self.cross_attention = Attention(c.width, c.heads, dropout=c.dropout, dtype=self.dtype)
            self.cross_attention_norm = layer_norm(c.norm_eps, self.dtype)
        self.query_mlp = Mlp(c.mlp_width, c.width, dtype=self.dtype)
        self.query_mlp_norm = layer_norm(c.norm_eps, self.dtype)
        if c.text_side != 'none':
            self.text_mlp = Mlp(c.mlp_width, c.width, dtype=self.dtype)
            self.text_mlp_norm = layer_norm(c.norm_eps, self.dtype)
        self.drop = nn.Dropout(c.dropout)

    def project_image(self, features: Float['B P V']) -> KeyValue | None:
        """Return the features' keys and values, or None in a layer that does not read them."""
        return self.cross_attention.project(features) if self.reads_features else None

    def __call__(
        self,
        x: Float['B S D'],
        num_queries: int,
        mask: Bool['B 1 S M'],
        image: KeyValue | None,
        image_mask: Bool['B 1 q P'] | None,
        prefix: KeyValue | None,
        train: bool,
        keep_attention: bool,
    ) -> tuple[Float['B S D'], KeyValue, tuple[Float['B H S M'], ...], tuple[Float['B H Q P'], ...]]:
        """Return the new hidden states, this layer's self-attention keys and values, and both attentions' weights.

        `prefix` is seen before. Of either's weights there is one array, or none where nothing is read or nobody asks.
        """
        own = self.self_attention.project(x)
        kv = prefix.append(own) if prefix is not None else own
        self_attention_weights = (self.self_attention.weights(x, kv, mask),) if keep_attention else ()
        branch = self.self_attention(x, kv, mask, train=train)
        x = self.self_attention_norm(x + self.drop(branch, deterministic=not train))
        queries, text = x[:, :num_queries], x[:, num_queries:]
        cross_attention_weights = ()
        if num_queries and self.reads_features:
            cross_attention_weights = (
                (self.cross_attention.weights(queries, image, image_mask),) if keep_attention else ()
            )
            branch = self.cross_attention(queries, image, image_mask, train=train)
            queries = self.cross_attention_norm(queries + self.drop(branch, deterministic=not train))
        parts = []
        if num_queries:
            parts.append(self.query_mlp_norm(queries + self.drop(self.query_mlp(queries), deterministic=not train)))
        if text.shape[1]:
            parts.append(self.text_mlp_norm(text + self.drop(self.text_mlp(text), deterministic=not train)))
        return jnp.concatenate(parts, axis=1), own, self_attention_weights, cross_attention_weights


class LmHead(nn.Module):
    """BERT's language-model head up to the product with the (tied) token table."""

    config: config.QformerConfig
    vocab_size: int
    dtype: DTypeLike

    def setup(self):
        self.transform = dense(self.config.width, self.dtype)
        self.norm = layer_norm(self.config.norm_eps, self.dtype)
        self.bias = self.param('bias', nn.initializers.zeros, (self.vocab_size,))

    def __call__(self, x: Float['B T D'], table: Float['N D']) -> Float['B T N']:
        x = self.norm(gelu(self.transform(x)))
        return tied_logits(x, table) + self.bias.reshape(1, 1, -1)


class Qformer(nn.Module):
    """Queries, text branch, and the heads of stage 1."""

    config: config.QformerConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        c = self.config
        self.feature_norm = layer_norm(c.feature_norm_eps, self.dtype)  # LAVIS's `ln_vision`
        bank = (c.num_queries * c.query_bank, c.width)
        self.query_token = self.param('query_token', nn.initializers.normal(0.02), bank)
        if c.query_bank > 1:
            self.query_mixer = Mlp(c.width, bank[0], dtype=self.dtype)
        if c.gated_residual:
            self.residual_projection = dense(c.width, self.dtype, use_bias=False)
            self.residual_gate = self.param('residual_gate', nn.initializers.zeros, ())
        self.embedding_norm = layer_norm(c.norm_eps, self.dtype)
        self.drop = nn.Dropout(c.dropout)
        self.layer = [QformerLayer(c, i % c.cross_attention_freq == 0, self.dtype) for i in range(c.depth)]
        if c.text_side != 'none':
            table = nn.initializers.normal(c.width**-0.5)
            self.word_embedding = self.param('word_embedding', table, (c.vocab_size, c.width))
            self.added_embedding = self.param('added_embedding', table, (1, c.width))  # the row of [DEC]
            self.position_embedding = self.param('position_embedding', table, (c.max_positions, c.width))
        if c.text_side in ('full', 'retrieval'):
            self.vision_projection = dense(c.embed_width, self.dtype)
            self.text_projection = dense(c.embed_width, self.dtype)
            self.itm_head = dense(2, self.dtype)
        if c.text_side == 'full':
            self.lm_head = LmHead(c, c.vocab_size + 1, self.dtype)
            self.temperature = self.param('temperature', nn.initializers.constant(0.07), ())

    def project_image(self, features: Float['B P V'], mask: Bool['B P']) -> ImageMemory:
        """Return the keys and values of a tower's features, once for all passes."""
        return self.project_normalised(self.feature_norm(features), mask)

    def project_normalised(self, features: Float['B P V'], mask: Bool['B P']) -> ImageMemory:
        """Return the keys and values of features that `feature_norm` left."""
        c, start, residual = self.config, None, None
        if c.query_bank > 1:
            logits = self.query_mixer(pool(features, mask, 1))[:, 0]
            start = queries.mixtures(self.query_token, logits, c.query_bank)
        if c.gated_residual:
            residual = self.residual_projection(pool(features, mask, c.num_queries))
        image_mask = mask[:, None, None, :]
        if c.local_queries:
            image_mask = masks.windows(c.num_queries - c.local_queries, c.local_queries, mask)
        return ImageMemory(tuple(layer.project_image(features) for layer in self.layer), image_mask, start, residual)

    def _embed(
        self, batch: Size, image: ImageMemory | None, text: Int['B T'] | None, text_start: Array | int
    ) -> Float['B S D']:
        parts = []
        if image is not None and image.start is not None:
            parts.append(image.start)
        elif image is not None:
            start = queries.means(self.query_token, self.config.query_bank)
            parts.append(jnp.broadcast_to(start[None], (batch, *start.shape)))
        if text is not None:  # text positions start at 0 whether queries come before or not
            if text.shape[1] > self.config.max_positions:
                raise UserError(
                    f'texts of {text.shape[1]} tokens do not fit the Q-Former: it has {self.config.max_positions} '
                    'positions (model.qformer.max-positions; data.max-text cuts texts)'
                )
            is_word = (text < self.config.vocab_size)[..., None]
            words = jnp.where(is_word, self.word_embedding.at[text].get(mode='clip'), self.added_embedding[:1, None])
            position = jax.lax.dynamic_slice_in_dim(self.position_embedding, text_start, text.shape[1])
            parts.append(words + position[None])
        return jnp.concatenate(parts, axis=1).astype(self.dtype)

    def __call__(
        self,
        mask: Bool['B 1 S M'],
        *,
        image: ImageMemory | None = None,
        text: Int['B T'] | None = None,
        prefix: tuple[KeyValue, ...] | None = None,
        text_start: Array | int = 0,
        train: bool = False,
        keep_attention: bool = False,
    ) -> QformerOutput:
        """Run the queries (if there is an image) and the text (if there is one) under `mask`.

        `prefix` is an earlier pass's cache, seen before this pass's positions; `text_start` is the position of the
        text's first token; `keep_attention` asks for the weights of both attentions too.
        """
        num_queries = self.config.num_queries if image is not None else 0
        x = self.embedding_norm(self._embed(mask.shape[0], image, text, text_start))
        x = self.drop(x, deterministic=not train)
        hidden, cache, self_attention, attention = [x], [], (), ()
        for i, layer in enumerate(self.layer):
            keys = image.layers[i] if image is not None else None
            image_mask = image.mask if image is not None else None
            cached = prefix[i] if prefix else None
            x, own, self_attention_weights, cross_attention_weights = layer(
                x, num_queries, mask, keys, image_mask, cached, train, keep_attention
            )
            self_attention += self_attention_weights
            attention += cross_attention_weights
            hidden.append(x)
            cache.append(own)
        last = x[:, :num_queries]
        if image is not None and image.residual is not None:
            last += jnp.tanh(self.residual_gate).astype(self.dtype) * image.residual
        query_mask = image.query_mask if image is not None else None
        weights = attention, self_attention
        return QformerOutput(last, x[:, num_queries:], tuple(cache), tuple(hidden), query_mask, *weights)

    def embed_image(self, queries: Float['B Q D']) -> Float['B Q E']:
        """Return unit vectors of the queries in the space shared with text (float32)."""
        return _unit(self.vision_projection(queries))

    def embed_text(self, text: Float['B T D']) -> Float['B E']:
        """Return the unit vector of a text, from its [CLS] position (float32)."""
        return self.embed_tokens(text[:, :1])[:, 0]

    def embed_tokens(self, text: Float['B T D']) -> Float['B T E']:
        """Return a unit vector of every text position in the shared space (float32)."""
        return _unit(self.text_projection(text))

    def match(self, queries: Float['B Q D'], query_mask: Bool['B Q'] | None = None) -> Float['B 2']:
        """Return the ITM logits (not matched, matched), averaged over the queries that exist (float32; None: all)."""
        where = None if query_mask is None else query_mask[..., None]
        return at_least_float32(self.itm_head(queries)).mean(axis=1, where=where)

    def word_logits(self, text: Float['B T D']) -> Float['B T N']:
        """Return the logits of the next token over the vocabulary and [DEC] (float32)."""
        return self.lm_head(text, jnp.concatenate([self.word_embedding, self.added_embedding]))


def _unit(x: Array) -> Array:
    x = at_least_float32(x)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
