"""BLIP-2, put together: pixels -> ViT -> features -> Q-Former -> queries -> projection -> language model.

The one file that composes. A part that the configuration leaves out does not exist; the others keep their names, so the
parameters of a stage are a subset of the next stage's. Another connector may stand in the Q-Former's place, or beside
it, behind its queries (BLIVA, Hu et al. 2023).
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from .. import config
from ..typing import Array, Bool, Float, Int, Params, Size, UInt8
from . import connectors, lora, masks, vocab_extension
from .families import family_of
from .gated_cross_attention import Gates
from .kv_cache import KVCache, LmOutput, Media
from .layers import at_least_float32, dense, layer_norm
from .qformer import Qformer, QformerOutput
from .temporal_embedding import TemporalEmbedding
from .vit import Vit, normalise

FEATURE_NORM_EPS = 1e-5  # as the Q-Former's, LAVIS's `ln_vision`


@struct.dataclass
class Prefix:
    """What the language model reads in place of a picture."""

    vectors: Float['B Q L']
    mask: Bool['B Q']

    @classmethod
    def whole(cls, vectors: Array) -> 'Prefix':
        """Return a prefix of which everything exists."""
        return cls(vectors, jnp.ones(vectors.shape[:2], bool))

    @classmethod
    def join(cls, parts: Sequence['Prefix']) -> 'Prefix':
        """Return the rows of all parts (numpy); shorter ones have places in front that do not exist."""
        longest = max(part.mask.shape[1] for part in parts)
        grow = [((0, 0), (longest - part.mask.shape[1], 0)) for part in parts]
        vectors = [np.pad(part.vectors, (*g, (0, 0))) for part, g in zip(parts, grow, strict=True)]
        padded_masks = [np.pad(part.mask, g) for part, g in zip(parts, grow, strict=True)]
        return cls(np.concatenate(vectors), np.concatenate(padded_masks))


def prefix_length(c: config.Blip2Config, prefix: Prefix) -> Size:
    """Return the places that a soft prefix takes in front of a text: none where gated layers read it."""
    return 0 if c.gates else prefix.mask.shape[1]


class Blip2Module(nn.Module):
    """The whole network; objectives and inference call its parts by name."""

    config: config.Blip2Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        c = self.config
        if c.vit:
            self.vit = Vit(c.vit, self.dtype)
        if c.word_head:
            self.word_head = dense(c.word_head, self.dtype)
        if c.qformer:
            self.qformer = Qformer(c.qformer, self.dtype)
        if c.lm:
            self.lm = family_of(c.lm).module(c.lm, self.dtype)
        if c.gates:
            self.gates = Gates(c.gates, c.lm.depth, c.lm.width, self.dtype)
        if c.qformer and c.lm:
            self.lm_projection = dense(c.lm.input_width, self.dtype)
        if c.time:
            self.time = TemporalEmbedding(c.time, c.feature_width, self.dtype)
        if c.connector:
            self.connector_norm = layer_norm(FEATURE_NORM_EPS, self.dtype)
            self.connector = connectors.make(c.connector, self.dtype)
            self.connector_projection = dense(c.lm.input_width, self.dtype)

    def vision_features(
        self,
        image: UInt8['B S W 3'] | UInt8['B F S W 3'] | None = None,
        features: Float['B P V'] | None = None,
        feature_mask: Bool['B P'] | None = None,
        frame_mask: Bool['B F'] | None = None,
    ) -> tuple[Float['B P V'], Bool['B P']]:
        """Return the frozen features and which of them exist, from pixels or as they were given.

        The tower sees one frame of a video at a time; the features of all follow each other, as one long sequence.
        """
        if image is None:
            return features.astype(self.dtype), feature_mask
        if image.ndim == 4:
            features = self.vit(normalise(image)).features
            return features, jnp.ones(features.shape[:2], bool)
        batch, frames, *picture = image.shape
        frame_features = self.vit(normalise(image.reshape(batch * frames, *picture))).features
        mask = jnp.repeat(frame_mask, frame_features.shape[1], axis=1)
        return frame_features.reshape(batch, frames * frame_features.shape[1], -1), mask

    def add_frame_embedding(self, features: Float['B P V'], feature_mask: Bool['B P']) -> Float['B P V']:
        """Return the features as they are read: with their frames' times, where the model knows them."""
        return self.time(features, feature_mask) if self.config.time else features

    def bag_of_words_logits(self, features: Float['B P V'], feature_mask: Bool['B P']) -> Float['B N']:
        """Return the logits of the words that a caption of this picture may hold, from the mean patch."""
        return at_least_float32(self.word_head(features.mean(axis=1, where=feature_mask[..., None])))

    def query_features(
        self,
        features: Float['I P V'],
        feature_mask: Bool['I P'],
        text: Int['B T'] | None = None,
        text_mask: Bool['B T'] | None = None,
        train: bool = False,
        picture: Int['B'] | None = None,
        keep_attention: bool = False,
        query_mask: Bool['Q'] | None = None,
    ) -> QformerOutput:
        """Run the queries over the features; with a text, they see it and it sees them (InstructBLIP, section 2.3).

        `picture`: which features each text belongs to; the default is one text a picture. `query_mask`: which queries
        do; the default is all (`nested.py`).
        """
        memory = self.qformer.project_image(self.add_frame_embedding(features, feature_mask), feature_mask)
        memory = (memory if picture is None else memory.take(picture)).with_query_mask(query_mask)
        if text is None:
            text_mask = jnp.ones((features.shape[0], 0), bool)
        mask = masks.bidirectional(self.config.qformer.num_queries, text_mask, memory.query_mask)
        return self.qformer(mask, image=memory, text=text, train=train, keep_attention=keep_attention)

    def soft_prefix(
        self,
        features: Float['B P V'],
        feature_mask: Bool['B P'],
        text: Int['B T'] | None = None,
        text_mask: Bool['B T'] | None = None,
        train: bool = False,
        query_mask: Bool['Q'] | None = None,
    ) -> Prefix:
        """Return what the language model reads in place of the picture (section 3.3).

        Tokens that do not exist come first, so that the text follows one that does. `query_mask`: which queries do.
        """
        parts = []
        if self.config.qformer:
            out = self.query_features(features, feature_mask, text, text_mask, train, query_mask=query_mask)
            vectors = self.lm_projection(out.queries)
            parts.append(Prefix.whole(vectors) if query_mask is None else Prefix(vectors, out.query_mask))
        if self.config.connector:
            parts.append(self.connect(features, feature_mask))
        prefix = jax.tree.map(lambda *part: jnp.concatenate(part, axis=1), *parts)
        whole = query_mask is None and not self.config.connector
        return prefix if whole else Prefix(*masks.last(prefix.vectors, prefix.mask))

    def connect(self, features: Float['B P V'], feature_mask: Bool['B P']) -> Prefix:
        """Return what the connector makes of features for the language model."""
        normed = self.connector_norm(self.add_frame_embedding(features, feature_mask)) * feature_mask[..., None]
        tokens, token_mask = self.connector(normed, feature_mask)
        return Prefix(self.connector_projection(tokens), token_mask)

    def media(self, prefix: Prefix) -> Media | None:
        """Return what gated layers read of the picture in place of a soft prefix; None without such layers."""
        return self.gates.project(prefix.vectors, prefix.mask) if self.config.gates else None

    def lm_forward(
        self,
        x: Float['B T L'],
        token_mask: Bool['B T'],
        cache: KVCache | tuple | None = None,
        media: Media | None = None,
        media_mask: Bool['b 1 t M'] | None = None,
    ) -> LmOutput:
        """Let the decoder read token vectors, or a soft prefix; with a cache, after what it holds.

        Gated layers read `media` (default: the cache's), of which a position sees what `media_mask` says (default: all
        that exists); what is read later sees what the last position saw.
        """
        if not self.config.gates:
            return self.lm(x, token_mask, cache)
        media = cache.media if media is None else media
        media_mask = media.mask[:, None, None, :] if media_mask is None else media_mask
        out = self.lm(x, token_mask, cache, self.gates.pre_block_hooks(media, media_mask))
        if cache is None:
            return out
        return out.replace(cache=out.cache.replace(media=media.replace(mask=media_mask[:, 0, -1])))

    def target_hidden_states(
        self, prefix: Prefix, text: Int['B T'], text_mask: Bool['B T'], target: Bool['B T']
    ) -> Float['B T L']:
        """Return the language model's hidden states that predict each `target` token of `text` (others: any value).

        A decoder reads [prefix, text]; T5's encoder reads [prefix, what is no target], its decoder the targets. Where
        gated layers read the prefix, the decoder reads [text] alone, and nothing predicts token 0.
        """
        if self.config.gates:
            hidden = self.lm_forward(self.lm.embed(text), text_mask, media=self.media(prefix)).hidden
            return jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
        x = jnp.concatenate([prefix.vectors, self.lm.embed(text)], axis=1)
        token_mask = jnp.concatenate([prefix.mask, text_mask], axis=1)
        return family_of(self.config.lm).target_hidden_states(self.lm, x, token_mask, text, target)

    def init_all_parts(self) -> None:
        """Call every part once on the smallest input: `init` makes the parameters that are touched."""
        c = self.config
        text, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
        if c.vit:
            size = c.vit.image_size
            features = self.vision_features(jnp.zeros((1, size, size, 3), jnp.uint8))
            if c.word_head:
                self.bag_of_words_logits(*features)
        if c.qformer:
            side = c.qformer.text_side
            words = (None, None) if side == 'none' else (text, mask)
            out = self.query_features(jnp.zeros((1, 1, c.qformer.feature_width)), mask, *words)
            if side in ('full', 'retrieval'):
                self.qformer.embed_image(out.queries), self.qformer.embed_text(out.text)
                self.qformer.match(out.queries)
            if side == 'full':
                self.qformer.word_logits(out.text)
        if c.connector:
            self.connect(jnp.zeros((1, 1, c.connector.feature_width)), mask)
        if c.lm:
            prefix = Prefix.whole(self.lm_projection(out.queries) if c.qformer else self.lm.embed(text))
            self.lm.word_logits(self.target_hidden_states(prefix, text, mask, mask))


@functools.partial(jax.jit, static_argnames=('model', 'names'))  # so only what draws the numbers is left of the pass
def init(model: Blip2Module, key: jax.Array, names: tuple[str, ...] = ()) -> Params:
    """Return fresh parameters, as the canonical nested dict (float32), of the parts named; default: of every part."""
    params = model.init(key, method='init_all_parts')['params']
    c = model.config
    if c.lora:
        params['lora'] = lora.init(c.lora, params['lm'], jax.random.fold_in(key, 1))
    if c.grounding and not c.grounding.in_table:
        params['grounding'] = vocab_extension.init(c.grounding, params['lm'], jax.random.fold_in(key, 2))
    return {name: params[name] for name in names} if names else params


def effective_params(params: Params, c: config.Blip2Config) -> Params:
    """Return the parameters as `apply` takes them: steps beside their kernels, added rows behind their tables."""
    return vocab_extension.extend(lora.adapt(params, c.lora), c.grounding)


def shapes(c: config.Blip2Config) -> Params:
    """Return the parameters' shapes without making them; traced once a config, a fresh dict each time."""
    return jax.tree.map(lambda x: x, _traced(c))


@functools.cache
def _traced(c: config.Blip2Config) -> Params:
    return jax.eval_shape(lambda key: init(Blip2Module(c), key), jax.eval_shape(lambda: jax.random.key(0)))
