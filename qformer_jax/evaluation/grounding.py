"""Phrase grounding: the share of phrases whose box fits (R@1 at IoU 0.5, as on Flickr30k Entities), and what is blind.

A phrase may have several true boxes; an answer is as good as the one that it fits best (MDETR's any-box protocol).
"""

from collections.abc import Sequence

import numpy as np

from ..boxes import Box, Grounded
from ..typing import Float

FITS = 0.5  # an answer fits where its IoU with a true box is above
CANDIDATES = 1000  # training boxes that are tried as the blind one


def iou(a: Float['*N 4'], b: Float['*N 4']) -> Float['*N']:
    """Return the area that two boxes share over the area that they cover together."""
    shared = _area(np.concatenate([np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])], axis=-1))
    return shared / (_area(a) + _area(b) - shared)


def _area(box: Float['*N 4']) -> Float['*N']:
    return np.maximum(box[..., 2:] - box[..., :2], 0).prod(axis=-1)


def fits(answers: Sequence[Box | None], truths: Sequence[Sequence[Box]]) -> Float['N']:
    """Return each answer's IoU with the true box that it fits best; of no answer, 0."""
    return np.array(
        [
            0.0 if box is None else iou(np.tile(np.array(box), (len(truth), 1)), np.array(truth)).max()
            for box, truth in zip(answers, truths, strict=True)
        ]
    )


def first(said: Grounded) -> Box | None:
    """Return the box that a text begins with: what it says of the phrase that it was asked for."""
    return said.found[0][1][0] if said.found else None


def blind(truths: Sequence[Box]) -> Box:
    """Return one box for every picture: of the mean and so many of these, the one that fits most of these."""
    boxes = np.array(truths)
    tried = np.concatenate([boxes.mean(axis=0, keepdims=True), boxes[:: -(-len(boxes) // CANDIDATES)]])
    hits = [(iou(np.broadcast_to(box, boxes.shape), boxes) > FITS).mean() for box in tried]
    return tuple(tried[int(np.argmax(hits))].tolist())
