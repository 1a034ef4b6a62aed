"""Where the queries look: the Q-Former's cross-attention over a picture (BLIP-2, section 3.1), as arrays.

In a layer that reads features a query's weights over class token and patches sum to 1. For maps the class token is left
out, and a map keeps what the patches got.
"""

from dataclasses import dataclass
from math import isqrt

import jax.numpy as jnp
import numpy as np

from ..errors import UserError
from ..inference.blip2 import Blip2
from ..inference.forward import bound
from ..inference.inputs import ImageFeatures, Picture
from ..models import blip2
from ..typing import Array, Bool, Float
from . import prompts
from .rollout import rollout
from .scores import reading_layers


@dataclass(frozen=True)
class AttentionMaps:
    """Where a picture's queries look in the C layers that read features, over G x G patches."""

    maps: Float['C H Q G G']
    class_token: Float['C H Q']
    """What the class token got."""
    layers: tuple[int, ...]
    """The numbers of the layers, from 0."""
    rollout: Float['Q G G']
    """The share of each patch in each query after the last layer."""

    @property
    def mean(self) -> Float['Q G G']:
        """The mean over layers and heads."""
        return self.maps.mean(axis=(0, 1))


@bound
def weights(
    model: blip2.Blip2Module, features: Float['B P V'], mask: Bool['B P'], *text: Array
) -> tuple[Float['B C H Q P'], Float['B Y H S S']]:
    """Return the weights of the C cross-attentions and of the Y self-attentions; a text is seen beside the queries."""
    out = model.query_features(features, mask, *text, keep_attention=True)
    return jnp.stack(out.attention, axis=1), jnp.stack(out.self_attention, axis=1)


def encode_picture(model: Blip2, picture: Picture) -> ImageFeatures:
    """Return the features of a picture; raises UserError for a run without a Q-Former or without a vision tower."""
    model.needs('qformer')
    if not model.run.model.vit:
        raise UserError('this run reads feature arrays, on which nothing can be drawn: give one with a vision tower')
    return model.encode_images([picture])


def attention_maps(model: Blip2, image_features: ImageFeatures, question: str = '') -> AttentionMaps:
    """Return where the queries look; those of an instruction-aware run read the prompt, with the question in it.

    Raises UserError for a question that nobody would read.
    """
    text = prompts.read(model, prompts.prompt(model, question))
    reads, self_attention_weights = (
        np.asarray(x)[0]
        for x in weights(model.model, model.params, image_features.features, image_features.mask, *text)
    )
    layers = reading_layers(model.run.model.qformer)
    of_layer = dict(zip(layers, reads, strict=True))
    shares, _ = rollout(list(self_attention_weights), [of_layer.get(i) for i in range(len(self_attention_weights))])
    return AttentionMaps(grid(reads), reads[..., 0], layers, grid(shares))


def grid(patches: Float['*N P']) -> Float['*N G G']:
    """Return class token and patches, which go row by row from the top left, without the former as squares."""
    side = isqrt(patches.shape[-1] - 1)
    return patches[..., 1:].reshape(*patches.shape[:-1], side, side)
