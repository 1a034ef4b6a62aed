"""Sizes that a state dict without a configuration beside it, as LAVIS's are, tells by its names and shapes."""

import re

from .. import config
from ..errors import UserError
from .lazy_tensors import State

Part = config.VitConfig | config.QformerConfig | config.LmConfig


def count_layers(state: State, prefix: str) -> int:
    """Return the number of layers: one more than the largest number after the prefix."""
    numbers = [re.match(re.escape(prefix) + r'(\d+)\.', key) for key in state]
    return 1 + max((int(found.group(1)) for found in numbers if found), default=-1)


def shape_of(state: State, key: str, rank: int) -> tuple[int, ...]:
    """Return the shape of a tensor that tells sizes; raises UserError where it is not there, or of another rank."""
    if key not in state:
        raise UserError(f"the file has no '{key}', which tells sizes: is it a part of one?")
    shape = state[key].shape
    if len(shape) != rank or 0 in shape:
        raise UserError(f"'{key}' is {list(shape)}, but {rank} sizes are expected of it, none of them 0")
    return shape


def heads_of(part: str, width: int, published: dict[int, int], like: Part | None) -> int:
    """Return the attention heads of a part, which no shape tells: those of `like`, or of the published one as wide.

    Raises UserError when neither has this width.
    """
    if like is not None and like.width == width:
        return like.heads
    if width not in published:
        raise UserError(
            f'the file does not tell the number of attention heads of its {part}, and no published one has the width '
            f'{width}: name a recipe of that width with --recipe'
        )
    return published[width]
