"""The forward passes that inference and evaluation share, each jitted as `pass_(model, params, *arrays)`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ..models import masks
from ..models.blip2 import Blip2Module, Prefix
from ..models.target_losses import target_losses as losses_at_targets
from ..typing import Bool, Float, Int, UInt8


def bound(function: Callable) -> Callable:
    """Return `function(bound model, *arrays)` as a jitted `f(model, params, *arrays)`."""

    @functools.partial(jax.jit, static_argnums=0)
    @functools.wraps(function)
    def call(model: Blip2Module, params, *arrays):
        return nn.apply(function, model)({'params': params}, *arrays)

    return call


def in_batches(function: Callable, size: int, *arrays: np.ndarray | Prefix | None) -> Any:
    """Apply a pass to `size` rows of the arrays at a time, and return what it gives of all (numpy).

    A batch of fewer is padded with its last row to a power of two: 5 rows run as 8, 1 as 1. None stays None.
    """
    leaves, structure = jax.tree.flatten(arrays)
    parts = []
    for begin in range(0, len(leaves[0]), size):
        rows = [a[begin : begin + size] for a in leaves]
        count = len(rows[0])
        given = jax.tree.unflatten(structure, _grown(rows, min(size, 1 << (count - 1).bit_length())))
        parts.append(jax.tree.map(lambda x, count=count: np.asarray(x)[:count], function(*given)))
    return jax.tree.map(lambda *column: np.concatenate(column), *parts)


def in_pairs(
    function: Callable,
    size: int,
    pictures: Sequence[np.ndarray],
    texts: Sequence[np.ndarray],
    picture: Int['N'],
    text: Int['N'],
) -> np.ndarray:
    """Apply a pass to the pairs of `pictures[picture[n]]` and `texts[text[n]]`, `size` at a time.

    The pairs of a picture go through together, over one copy of it: `function(*pictures, which, *texts)`. There are 8
    copies in a batch, 32, 128, ... or `size`, so that few shapes are compiled.
    """
    order, parts = np.argsort(picture, kind='stable'), []
    for begin in range(0, len(order), size):
        rows = order[begin : begin + size]
        shown, which = np.unique(picture[rows], return_inverse=True)
        copies = 8 << 2 * max(0, -(-((len(shown) - 1).bit_length() - 3) // 2))  # 1 to 8: 8, 9 to 32: 32, 33 to 128: 128
        given = _grown([array[shown] for array in pictures], min(size, copies))
        pairs = [which, *(array[text[rows]] for array in texts)]
        out = function(*given, *_grown(pairs, min(size, 1 << (len(rows) - 1).bit_length())))
        parts.append(np.asarray(out)[: len(rows)])
    return np.concatenate(parts)[np.argsort(order, kind='stable')]


def _grown(arrays: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Return arrays of `count` rows: the last one is repeated."""
    missing = count - len(arrays[0])
    return [np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) if missing else a for a in arrays]


@bound
def vision_features(
    model: Blip2Module, image: UInt8['B S S 3'] | UInt8['B F S S 3'], frame_mask: Bool['B F'] | None = None
) -> tuple[Float['B P V'], Bool['B P']]:
    """Return the frozen features of pictures, or of videos and their frames that exist, and the features' mask."""
    return model.vision_features(image, frame_mask=frame_mask)


@bound
def query_features(model: Blip2Module, features: Float['B P V'], mask: Bool['B P']) -> Float['B Q D']:
    """Return what the queries read, without a text."""
    return model.query_features(features, mask).queries


@bound
def project(model: Blip2Module, queries: Float['B Q D']) -> Prefix:
    """Return the soft prefix that queries make."""
    return Prefix.whole(model.lm_projection(queries))


@bound
def soft_prefix(model: Blip2Module, *arrays) -> Prefix:
    """Return the soft prefix of (features, mask) or (features, mask, question, question mask)."""
    return model.soft_prefix(*arrays)


@bound
def soft_prefix_of_pictures(
    model: Blip2Module,
    image: UInt8['B S S 3'] | UInt8['B F S S 3'],
    frame_mask: Bool['B F'] | None,
    text: Int['B T'] | None,
    text_mask: Bool['B T'] | None,
) -> Prefix:
    """Return the soft prefix of pictures, or of videos: from pixels to the language model's width in one function."""
    return model.soft_prefix(*model.vision_features(image, frame_mask=frame_mask), text, text_mask)


@bound
def embed_image(model: Blip2Module, features: Float['B P V'], mask: Bool['B P']) -> Float['B Q E']:
    """Return the ITC vectors of the queries."""
    return model.qformer.embed_image(model.query_features(features, mask).queries)


@bound
def embed_text(model: Blip2Module, text: Int['B T'], text_mask: Bool['B T']) -> Float['B E']:
    """Return the ITC vector of each text."""
    return model.qformer.embed_text(model.qformer(masks.unimodal(0, text_mask), text=text).text)


@bound
def read_both(
    model: Blip2Module, features: Float['B P V'], mask: Bool['B P'], text: Int['B T'], text_mask: Bool['B T']
) -> Float['B Q D']:
    """Return the queries after they and the text saw each other."""
    return model.query_features(features, mask, text, text_mask).queries


@bound
def match(
    model: Blip2Module,
    features: Float['I P V'],
    mask: Bool['I P'],
    picture: Int['B'],
    text: Int['B T'],
    text_mask: Bool['B T'],
) -> Float['B 2']:
    """Return the ITM logits (not matched, matched) of texts and the pictures that they belong to.

    A picture's keys and values are projected once, however many texts there are: with 32 tokens a text, a third of a
    pair's work.
    """
    return model.qformer.match(model.query_features(features, mask, text, text_mask, picture=picture).queries)


@bound
def target_losses(
    model: Blip2Module, prefix: Prefix, text: Int['B T'], text_mask: Bool['B T'], target: Bool['B T']
) -> Float['B T']:
    """Return the loss (nats) of each target token after [prefix, text so far]; zero elsewhere."""
    hidden = model.target_hidden_states(prefix, text, text_mask, target)
    return losses_at_targets(model, hidden, text, target)[0]
