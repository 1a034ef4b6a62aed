"""The attention masks of BLIP-2 (section 3.2, figure 2), drawn. True = may be seen.

The sequence is [queries, text]. With two queries q, three text positions t, and the last text position padding (.),
a row says what that position sees:

    ITC, unimodal             ITM, bidirectional        ITG, multimodal causal
         q q t t .                 q q t t .                 q q t t .
    q    x x                  q    x x x x              q    x x
    q    x x                  q    x x x x              q    x x
    t        x x              t    x x x x              t    x x x
    t        x x              t    x x x x              t    x x x x
    .        x x              .    x x x x              .    x x x x

Queries never see text in ITC and ITG, so both share one pass over the queries; the text rows of ITG then read that
pass's keys and values. A pass over some of the rows takes those rows of the drawing and nothing else.

Where some of a picture's queries do not exist (`query_mask`; None: all do), their columns are empty: nobody sees them.

Where queries look may be masked too. One global query g and four local ones l over features that are a class token c
and a grid of 4 x 4 patches p, row by row:

         c pppp pppp pppp pppp
    g    x xxxx xxxx xxxx xxxx
    l      xx   xx
    l        xx   xx
    l                xx   xx
    l                  xx   xx
"""

import math

import jax.numpy as jnp

from ..typing import Array, Bool, Float, Int, Size
from .pooling import cut, grid


def _valid_keys(
    num_queries: int, text_mask: Bool['B T'], query_mask: Bool['B Q'] | None
) -> tuple[Bool['S'], Bool['B 1 1 S']]:
    """Return which positions are text, and which positions exist (queries that do, and text that is not padding)."""
    batch, length = text_mask.shape
    is_text = jnp.arange(num_queries + length) >= num_queries
    query_mask = jnp.ones((batch, num_queries), bool) if query_mask is None else query_mask
    return is_text, jnp.concatenate([query_mask, text_mask], axis=1)[:, None, None, :]


def unimodal(num_queries: int, text_mask: Bool['B T'], query_mask: Bool['B Q'] | None = None) -> Bool['B 1 S S']:
    """Return the ITC mask: queries see queries, text sees text."""
    is_text, valid = _valid_keys(num_queries, text_mask, query_mask)
    return (is_text[:, None] == is_text[None, :])[None, None] & valid


def bidirectional(num_queries: int, text_mask: Bool['B T'], query_mask: Bool['B Q'] | None = None) -> Bool['B 1 S S']:
    """Return the ITM mask: everything sees everything that is not padding."""
    is_text, valid = _valid_keys(num_queries, text_mask, query_mask)
    return jnp.ones((1, 1, is_text.size, 1), bool) & valid


def multimodal_causal(
    num_queries: int, text_mask: Bool['B T'], query_mask: Bool['B Q'] | None = None
) -> Bool['B 1 S S']:
    """Return the ITG mask: queries see queries; text sees the queries and the text up to itself."""
    is_text, valid = _valid_keys(num_queries, text_mask, query_mask)
    position = jnp.arange(is_text.size)
    causal = position[None, :] <= position[:, None]
    return (jnp.where(is_text[:, None], causal, ~is_text[None, :]))[None, None] & valid


def windows(num_global: int, num_local: int, feature_mask: Bool['B P']) -> Bool['B 1 Q P']:
    """Return where queries look of which the last `num_local`, a square number, each see one window of a square grid.

    The windows are cut as `pooling.cut` says: they share rows of patches where their number does not divide the grid's.
    Raises UserError for features that are no grid (`pooling.grid`).
    """
    side, first = grid(feature_mask.shape[1])
    rows = math.isqrt(num_local)
    along = cut(jnp.arange(side)[None], jnp.full(1, side), rows)[0]
    squares = (along[:, None, :, None] & along[None, :, None, :]).reshape(num_local, side * side)
    local = jnp.pad(squares, ((0, 0), (first, 0)))
    visible = jnp.concatenate([jnp.ones((num_global, feature_mask.shape[1]), bool), local])
    return visible[None, None] & feature_mask[:, None, None, :]


def last(tokens: Float['B Q D'], token_mask: Bool['B Q']) -> tuple[Float['B Q D'], Bool['B Q']]:
    """Return the tokens with those that exist moved to the end, in their order: exists [1 0 1] -> [0 1 1]."""
    order = jnp.argsort(token_mask, axis=1, stable=True)
    return jnp.take_along_axis(tokens, order[..., None], axis=1), jnp.take_along_axis(token_mask, order, axis=1)


def latest_image(image: Int['B T'], media_mask: Bool['B I Q']) -> Bool['B 1 T M']:
    """Return which media each token sees: those of the latest image before it (Flamingo, section 3.1.3).

    `image` says which that is, -1 where there is none yet (`images_so_far`). Two images of two media each, and a text
    in which <1> and <2> stand for them:

                1 1 2 2
        a
        <1>     x x
        b       x x
        <2>         x x
        c           x x
    """
    own = image[:, :, None, None] == jnp.arange(media_mask.shape[1])[None, None, :, None]
    return (own & media_mask[:, None]).reshape(*image.shape, -1)[:, None]


def images_so_far(marks: Bool['B T']) -> Int['B T']:
    """Return the latest image at each token, given which tokens stand for one: [0 1 0 1 0] -> [-1 0 0 1 1]."""
    return jnp.cumsum(marks, axis=1) - 1


def decoder(valid: Bool['B M'], start: int | Array, length: Size) -> Bool['B 1 T M']:
    """Return the mask of `length` new positions of a decoder whose keys occupy slots 0..M-1.

    The new positions are slots start..start+length-1; each sees the existing slots up to itself. Worked example:
    exists = [0 1 1 1], start = 2, length = 2: row 0 (slot 2) sees slots 1, 2; row 1 (slot 3) sees 1, 2, 3.
    """
    slots = jnp.arange(valid.shape[1])
    rows = start + jnp.arange(length)
    return (slots[None, :] <= rows[:, None])[None, None] & valid[:, None, None, :]


def positions(valid: Bool['B M']) -> Int['B M']:
    """Return each slot's position among the existing ones: [0 0 1 1 1] -> [0 0 0 1 2] (holes do not count)."""
    return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
