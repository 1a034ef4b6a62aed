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
from . import added, connectors, lora, masks
from .cache import Cache, LmOutput, Media
from .gates import Gates
from .layers import at_least_float32, dense, layer_norm
from .llama import Llama
from .opt import Opt
from .qformer import Qformer, QformerOutput
from .t5 import T5, shift_right
from .time import Time
from .vit import Vit, normalise

FEATURE_NORM_EPS = 1e-5  # as the Q-Former's, LAVIS's `ln_vision`


@struct.dataclass
class Prefix:
    """What the language model reads in place of a picture."""

    vectors: Float['B Q L']
    exists: Bool['B Q']

    @classmethod
    def whole(cls, vectors: Array) -> 'Prefix':
        """Return a prefix of which everything exists."""
        return cls(vectors, jnp.ones(vectors.shape[:2], bool))

    @classmethod
    def join(cls, parts: Sequence['Prefix']) -> 'Prefix':
        """Return the rows of all parts (numpy); shorter ones have places in front that do not exist."""
        longest = max(part.exists.shape[1] for part in parts)
        grow = [((0, 0), (longest - part.exists.shape[1], 0)) for part in parts]
        vectors = [np.pad(part.vectors, (*g, (0, 0))) for part, g in zip(parts, grow, strict=True)]
        exists = [np.pad(part.exists, g) for part, g in zip(parts, grow, strict=True)]
        return cls(np.concatenate(vectors), np.concatenate(exists))


def in_front(c: config.Blip2, prefix: Prefix) -> Size:
    """Return the places that a soft prefix takes in front of a text: none where gated layers read it."""
    return 0 if c.gates else prefix.exists.shape[1]


class Blip2(nn.Module):
    """The whole network; objectives and inference call its parts by name."""

    config: config.Blip2
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
            self.lm = {'opt': Opt, 'llama': Llama, 't5': T5}[c.lm.family](c.lm, self.dtype)
        if c.gates:
            self.gates = Gates(c.gates, c.lm.depth, c.lm.width, self.dtype)
        if c.qformer and c.lm:
            self.lm_projection = dense(c.lm.input_width, self.dtype)
        if c.time:
            self.time = Time(c.time, c.feature_width, self.dtype)
        if c.connector:
            self.connector_norm = layer_norm(FEATURE_NORM_EPS, self.dtype)
            self.connector = connectors.make(c.connector, self.dtype)
            self.connector_projection = dense(c.lm.input_width, self.dtype)

    def see(
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
        seen = self.vit(normalise(image.reshape(batch * frames, *picture))).features
        mask = jnp.repeat(frame_mask, seen.shape[1], axis=1)
        return seen.reshape(batch, frames * seen.shape[1], -1), mask

    def in_time(self, features: Float['B P V'], feature_mask: Bool['B P']) -> Float['B P V']:
        """Return the features as they are read: with their frames' times, where the model knows them."""
        return self.time(features, feature_mask) if self.config.time else features

    def name_words(self, features: Float['B P V'], feature_mask: Bool['B P']) -> Float['B N']:
        """Return the logits of the words that a caption of this picture may hold, from the mean patch."""
        return at_least_float32(self.word_head(features.mean(axis=1, where=feature_mask[..., None])))

    def ask_queries(
        self,
        features: Float['I P V'],
        feature_mask: Bool['I P'],
        text: Int['B T'] | None = None,
        text_mask: Bool['B T'] | None = None,
        train: bool = False,
        picture: Int['B'] | None = None,
        keep_attention: bool = False,
        exists: Bool['Q'] | None = None,
    ) -> QformerOutput:
        """Run the queries over the features; with a text, they see it and it sees them (InstructBLIP, section 2.3).

        `picture`: which features each text belongs to; the default is one text a picture. `exists`: which queries do;
        the default is all (`nested.py`).
        """
        memory = self.qformer.project_image(self.in_time(features, feature_mask), feature_mask)
        memory = memory if picture is None else memory.take(picture)
        if text is None:
            text_mask = jnp.ones((features.shape[0], 0), bool)
        mask = masks.bidirectional(self.config.qformer.num_queries, text_mask, exists)
        return self.qformer(mask, image=memory, text=text, train=train, keep_attention=keep_attention)

    def soft_prefix(
        self,
        features: Float['B P V'],
        feature_mask: Bool['B P'],
        text: Int['B T'] | None = None,
        text_mask: Bool['B T'] | None = None,
        train: bool = False,
        exists: Bool['Q'] | None = None,
    ) -> Prefix:
        """Return what the language model reads in place of the picture (section 3.3).

        Tokens that do not exist come first, so that the text follows one that does. `exists`: which queries do.
        """
        parts = []
        if self.config.qformer:
            queries = self.ask_queries(features, feature_mask, text, text_mask, train, exists=exists).queries
            part = Prefix.whole(self.lm_projection(queries))
            parts.append(part if exists is None else part.replace(exists=part.exists & exists[None]))
        if self.config.connector:
            parts.append(self.connect(features, feature_mask))
        prefix = jax.tree.map(lambda *part: jnp.concatenate(part, axis=1), *parts)
        whole = exists is None and not self.config.connector
        return prefix if whole else Prefix(*masks.last(prefix.vectors, prefix.exists))

    def connect(self, features: Float['B P V'], feature_mask: Bool['B P']) -> Prefix:
        """Return what the connector makes of features for the language model."""
        normed = self.connector_norm(self.in_time(features, feature_mask)) * feature_mask[..., None]
        tokens, exists = self.connector(normed, feature_mask)
        return Prefix(self.connector_projection(tokens), exists)

    def media(self, prefix: Prefix) -> Media | None:
        """Return what gated layers read of the picture in place of a soft prefix; None without such layers."""
        return self.gates.project(prefix.vectors, prefix.exists) if self.config.gates else None

    def read(
        self,
        x: Float['B T L'],
        exists: Bool['B T'],
        cache: Cache | None = None,
        media: Media | None = None,
        sees: Bool['b 1 t M'] | None = None,
    ) -> LmOutput:
        """Let a decoder read token vectors, or a soft prefix; with a cache, after what it holds.

        Gated layers read `media` (default: the cache's), of which a position sees what `sees` says (default: all that
        exists); what is read later sees what the last position saw.
        """
        if not self.config.gates:
            return self.lm(x, exists, cache)
        media = cache.media if media is None else media
        sees = media.exists[:, None, None, :] if sees is None else sees
        out = self.lm(x, exists, cache, self.gates.before(media, sees))
        if cache is None:
            return out
        return out.replace(cache=out.cache.replace(media=media.replace(exists=sees[:, 0, -1])))

    def after_prefix(
        self, prefix: Prefix, text: Int['B T'], text_mask: Bool['B T'], target: Bool['B T']
    ) -> Float['B T L']:
        """Return the language model's hidden states that predict each `target` token of `text` (others: any value).

        A decoder reads [prefix, text]. Slot Q + t holds token t, so its prediction leaves slot Q + t - 1: with 3
        queries and 4 tokens, slots 2..5. T5's encoder reads [prefix, what is no target], its decoder the targets.
        Where gated layers read the prefix, the decoder reads [text] alone, and nothing predicts token 0.
        """
        if self.config.gates:
            hidden = self.read(self.lm.embed(text), text_mask, media=self.media(prefix)).hidden
            return jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
        count = prefix.exists.shape[1]
        x = jnp.concatenate([prefix.vectors, self.lm.embed(text)], axis=1)
        exists = jnp.concatenate([prefix.exists, text_mask], axis=1)
        if self.config.lm.family != 't5':
            return self.lm(x, exists).hidden[:, count - 1 : -1]
        memory = self.lm.encode(x, exists & ~jnp.pad(target, ((0, 0), (count, 0))))
        return self.lm(self.lm.embed(shift_right(text, target)), target, memory).hidden

    def touch_everything(self) -> None:
        """Call every part once on the smallest input: `init` makes the parameters that are touched."""
        c = self.config
        text, exists = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
        if c.vit:
            size = c.vit.image_size
            seen = self.see(jnp.zeros((1, size, size, 3), jnp.uint8))
            if c.word_head:
                self.name_words(*seen)
        if c.qformer:
            side = c.qformer.text_side
            words = (None, None) if side == 'none' else (text, exists)
            out = self.ask_queries(jnp.zeros((1, 1, c.qformer.feature_width)), exists, *words)
            if side in ('full', 'retrieval'):
                self.qformer.embed_image(out.queries), self.qformer.embed_text(out.text)
                self.qformer.match(out.queries)
            if side == 'full':
                self.qformer.word_logits(out.text)
        if c.connector:
            self.connect(jnp.zeros((1, 1, c.connector.feature_width)), exists)
        if c.lm:
            prefix = Prefix.whole(self.lm_projection(out.queries) if c.qformer else self.lm.embed(text))
            self.lm.word_logits(self.after_prefix(prefix, text, exists, exists))


@functools.partial(jax.jit, static_argnames=('model', 'names'))  # so only what draws the numbers is left of the pass
def init(model: Blip2, key: jax.Array, names: tuple[str, ...] = ()) -> Params:
    """Return fresh parameters, as the canonical nested dict (float32), of the parts named; default: of every part."""
    params = model.init(key, method='touch_everything')['params']
    c = model.config
    if c.lora:
        params['lora'] = lora.init(c.lora, params['lm'], jax.random.fold_in(key, 1))
    if c.grounding and not c.grounding.in_table:
        params['grounding'] = added.init(c.grounding, params['lm'], jax.random.fold_in(key, 2))
    return {name: params[name] for name in names} if names else params


def applied(params: Params, c: config.Blip2) -> Params:
    """Return the parameters as `apply` takes them: steps beside their kernels, added rows behind their tables."""
    return added.extend(lora.adapt(params, c.lora), c.grounding)


def shapes(c: config.Blip2) -> Params:
    """Return the parameters' shapes without making them; traced once a config, a fresh dict each time."""
    return jax.tree.map(lambda x: x, _traced(c))


@functools.cache
def _traced(c: config.Blip2) -> Params:
    return jax.eval_shape(lambda key: init(Blip2(c), key), jax.eval_shape(lambda: jax.random.key(0)))
