"""Prompts as rows of ids, alone or with the text that follows them, and where that text ends."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..data.tokenizers import LmTokenizer, lm_row, pad
from ..errors import UserError
from ..typing import Bool, Int
from .generate import GenerationConfig
from .inputs import Pictures, QueryOutputs

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


def target_rows(
    tokenizer: LmTokenizer, prompts: Sequence[str], targets: Sequence[str]
) -> tuple[Int['N T'], Bool['N T'], Bool['N T']]:
    """Return the ids of `prompt target`, padded at the right, which of them exist, and which are the target's."""
    rows = [lm_row(tokenizer, *pair) for pair in zip(prompts, targets, strict=True)]
    length = max(len(ids) for ids, _ in rows)
    ids, mask = map(np.stack, zip(*(pad(row, length, tokenizer.pad_id) for row, _ in rows), strict=True))
    return ids, mask, mask & (np.arange(length)[None] >= np.array([begin for _, begin in rows])[:, None])


def with_eos(settings: GenerationConfig, end_id: int) -> GenerationConfig:
    """Return settings that end texts: at `end_id` where they name no end themselves."""
    return settings if settings.end_ids else dataclasses.replace(settings, end_ids=(end_id,))


def as_many(pictures: Pictures | QueryOutputs, texts: Sequence[str], what: str) -> None:
    """Raise UserError unless there are pictures, and a text for each."""
    if not len(pictures):
        raise UserError('no picture given')
    if len(texts) != len(pictures):
        raise UserError(f'{len(pictures)} picture(s) but {len(texts)} {what}(s): give one {what} a picture')
