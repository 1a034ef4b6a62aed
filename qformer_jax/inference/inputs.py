"""Pictures as they are given, their frozen features, and what the queries read of them."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import QformerConfig
from ..data import pictures
from ..data.arrays import checked
from ..data.jsonl import read_features
from ..data.preprocess import padded
from ..data.transforms import eval_image
from ..errors import UserError
from ..typing import Int

Picture = str | Path | bytes | Image.Image | np.ndarray | Sequence['Picture']
"""A file, its bytes, a picture, features [P, V]; a folder of pictures, or several pictures: the frames of a video."""


@dataclass(frozen=True)
class ImageFeatures:
    """Frozen features of some pictures, [N, P, V] and which of them exist, on the host."""

    features: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> 'ImageFeatures':
        """Return arrays [P, V] of any number of rows, all of which exist."""
        return cls.join([cls(array[None], np.ones((1, len(array)), bool)) for array in arrays])

    def rows(self) -> Iterator[np.ndarray]:
        """Yield the features [P, V] of each picture, those that exist."""
        yield from (features[mask] for features, mask in zip(self.features, self.mask, strict=True))

    @classmethod
    def join(cls, parts: Sequence['ImageFeatures']) -> 'ImageFeatures':
        """Return all pictures of the parts, their rows padded with zeros to the longest."""
        longest = max(part.mask.shape[1] for part in parts)
        grow = [(0, longest - part.mask.shape[1]) for part in parts]
        features = [np.pad(p.features, ((0, 0), g, (0, 0))) for p, g in zip(parts, grow, strict=True)]
        masks = [np.pad(p.mask, ((0, 0), g)) for p, g in zip(parts, grow, strict=True)]
        return cls(np.concatenate(features), np.concatenate(masks))

    def take(self, rows: Sequence[int] | Int['R']) -> 'ImageFeatures':
        """Return the pictures `rows`, in that order (a picture may be asked many times)."""
        return ImageFeatures(self.features[np.asarray(rows)], self.mask[np.asarray(rows)])


@dataclass(frozen=True)
class QueryOutputs:
    """What queries that read no question took from some pictures, [N, Q, D], on the host."""

    queries: np.ndarray

    def __len__(self) -> int:
        return len(self.queries)

    def checked(self, c: QformerConfig) -> 'QueryOutputs':
        """Return them as they are; raises UserError unless they have a Q-Former's sizes."""
        wanted, given = [c.num_queries, c.width], list(self.queries.shape[1:])
        if given != wanted:
            raise UserError(f'queries must be {wanted} for this run, not {given}: look at the pictures with it')
        return self

    @classmethod
    def join(cls, parts: Sequence['QueryOutputs']) -> 'QueryOutputs':
        """Return all pictures of the parts."""
        return cls(np.concatenate([part.queries for part in parts]))

    def take(self, rows: Sequence[int] | Int['R']) -> 'QueryOutputs':
        """Return the pictures `rows`, in that order."""
        return QueryOutputs(self.queries[np.asarray(rows)])


Pictures = Sequence[Picture] | ImageFeatures


def is_array(picture: Picture) -> bool:
    """Return whether features are given, not pixels."""
    return isinstance(picture, np.ndarray) or (isinstance(picture, str | Path) and Path(picture).suffix == '.npy')


def read(picture: Picture, size: int) -> np.ndarray:
    """Return pixels [S, S, 3], of a video [F, S, S, 3] (with size 0 there is no tower to see them), or features.

    Raises UserError for what is no picture, no video and no array of finite floats [P, V].
    """
    if isinstance(picture, np.ndarray):
        return checked(picture, 'the features').astype(np.float32)
    is_folder = isinstance(picture, str | Path) and os.path.isdir(picture)
    if isinstance(picture, str | Path) and not is_folder and (not size or is_array(picture)):
        return read_features(Path(picture))
    if not size:
        raise UserError('this run has no vision tower: give feature arrays')
    if is_folder:
        return read(frames(Path(picture)), size)
    if not isinstance(picture, list | tuple):
        return _pixels(picture, size)
    if not picture:
        raise UserError('a video without a frame: give its pictures')
    return np.stack([_pixels(frame, size) for frame in picture])


def frames(folder: Path) -> list[Path]:
    """Return the pictures of a folder, a video, with numbers in their order: 9.png before 10.png.

    Raises UserError when there is none, or a folder among them.
    """
    found = sorted((file for file in folder.iterdir() if not file.name.startswith('.')), key=natural)
    if inside := [file for file in found if file.is_dir()]:
        raise UserError(f"{folder}: holds the folder '{inside[0].name}'; a video is a folder of its frames alone")
    if not found:
        raise UserError(f'{folder}: no picture in it; a video is a folder of its frames')
    return found


def natural(file: Path) -> tuple[list[str | int], str]:
    """Return a key that sorts names by their numbers, not digit by digit; of equal ones, by the name."""
    parts = re.split('([0-9]+)', file.name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], file.name


def stack_pictures(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Return pictures [N, S, S, 3], or, where videos are among them, [N, F, S, S, 3] and which frames exist.

    A picture is a video of one frame.
    """
    if all(array.ndim == 3 for array in arrays):
        return (np.stack(arrays),)
    videos = [array if array.ndim == 4 else array[None] for array in arrays]
    longest = max(map(len, videos))
    return tuple(map(np.stack, zip(*(padded(video, longest) for video in videos), strict=True)))


def _pixels(picture: Picture, size: int) -> np.ndarray:
    name = str(picture) if isinstance(picture, str | Path) else 'the picture'
    if not isinstance(picture, str | Path | bytes | Image.Image):
        raise UserError(f'a picture is a file, its bytes or a PIL image, not {type(picture).__name__}')
    return eval_image(pictures.read(Path(picture)) if isinstance(picture, str | Path) else picture, size, name)
