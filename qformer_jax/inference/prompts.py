"""Prompts as rows of ids, and where the text that follows them ends."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..typing import Bool, Int
from .search import Settings

PROMPT_BUCKET = 8  # prompts are padded to a multiple of this many tokens


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, room: int | None = None) -> tuple[Int['N T'], Bool['N T']]:
    """Return rows of ids, padded at the left to a multiple of PROMPT_BUCKET within `room`, and which of them exist."""
    longest = max(map(len, rows))
    length = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    length = length if room is None else max(longest, min(length, room))
    ids = np.full((len(rows), length), pad_id, np.int32)
    for row, given in zip(ids, rows, strict=True):
        row[length - len(given) :] = given
    return ids, np.arange(length)[None] >= length - np.array([len(row) for row in rows])[:, None]


def ending(settings: Settings, end_id: int) -> Settings:
    """Return settings that end texts: at `end_id` where they name no end themselves."""
    return settings if settings.end_ids else dataclasses.replace(settings, end_ids=(end_id,))
