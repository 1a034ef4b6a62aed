"""Pictures as they are given, their frozen features, and what the queries read of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import Qformer
from ..data.jsonl import read_features
from ..data.transforms import eval_image
from ..errors import UserError
from ..typing import Int

Picture = str | Path | bytes | Image.Image | np.ndarray  # a file, its bytes, a picture, or features [P, V]


@dataclass(frozen=True)
class Seen:
    """Frozen features of some pictures, [N, P, V] and which of them exist, on the host."""

    features: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def join(cls, parts: Sequence['Seen']) -> 'Seen':
        """Return all pictures of the parts, their rows padded with zeros to the longest."""
        longest = max(part.mask.shape[1] for part in parts)
        grow = [(0, longest - part.mask.shape[1]) for part in parts]
        features = [np.pad(p.features, ((0, 0), g, (0, 0))) for p, g in zip(parts, grow, strict=True)]
        masks = [np.pad(p.mask, ((0, 0), g)) for p, g in zip(parts, grow, strict=True)]
        return cls(np.concatenate(features), np.concatenate(masks))

    def take(self, rows: Sequence[int] | Int['R']) -> 'Seen':
        """Return the pictures `rows`, in that order (a picture may be asked many times)."""
        return Seen(self.features[np.asarray(rows)], self.mask[np.asarray(rows)])


@dataclass(frozen=True)
class Queries:
    """What queries that read no question took from some pictures, [N, Q, D], on the host."""

    queries: np.ndarray

    def __len__(self) -> int:
        return len(self.queries)

    def checked(self, c: Qformer) -> 'Queries':
        """Return them as they are; raises UserError unless they have a Q-Former's sizes."""
        wanted, given = [c.num_queries, c.width], list(self.queries.shape[1:])
        if given != wanted:
            raise UserError(f'queries must be {wanted} for this run, not {given}: look at the pictures with it')
        return self

    @classmethod
    def join(cls, parts: Sequence['Queries']) -> 'Queries':
        """Return all pictures of the parts."""
        return cls(np.concatenate([part.queries for part in parts]))

    def take(self, rows: Sequence[int] | Int['R']) -> 'Queries':
        """Return the pictures `rows`, in that order."""
        return Queries(self.queries[np.asarray(rows)])


Pictures = Sequence[Picture] | Seen


def is_array(picture: Picture) -> bool:
    """Return whether features are given, not pixels."""
    return isinstance(picture, np.ndarray) or (isinstance(picture, str | Path) and Path(picture).suffix == '.npy')


def read(picture: Picture, size: int) -> np.ndarray:
    """Return pixels [size, size, 3] (with size 0 there is no tower to see them), or a feature array."""
    if isinstance(picture, np.ndarray):
        return picture.astype(np.float32)
    if isinstance(picture, str | Path) and (not size or is_array(picture)):
        return read_features(Path(picture))
    if not size:
        raise UserError('this run has no vision tower: give feature arrays')
    return _pixels(picture, size)


def _pixels(picture: Picture, size: int) -> np.ndarray:
    name = str(picture) if isinstance(picture, str | Path) else 'the picture'
    if isinstance(picture, str | Path):
        try:
            picture = Path(picture).read_bytes()
        except OSError as error:
            raise UserError(f'{name}: {error.strerror.lower()}') from error
    try:
        return eval_image(picture, size)
    except UserError as error:
        raise UserError(str(error).replace('the picture', name, 1)) from error
