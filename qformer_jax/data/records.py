"""What one picture of a data set holds, and how a feature array becomes bytes."""

import struct
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16
import numpy as np

from ..boxes import Box

_HEADER = struct.Struct('<8sII')  # dtype name, rows (P), columns (V); then the values, row by row


@dataclass(frozen=True)
class Record:
    """One picture (or feature array) with everything that is said about it."""

    image_id: str
    """Name of the picture in its source."""
    image: bytes | None = None
    """The encoded picture (JPEG, PNG), as it was found."""
    frames: tuple[bytes, ...] = ()
    """Encoded pictures of a video, in their order, in place of `image`."""
    features: np.ndarray | None = None
    """Features of a frozen encoder, [P, V], float32 when read (float16 and bfloat16 are kept as such on disk)."""
    captions: tuple[str, ...] = ()
    """Descriptions; none where nobody stated any."""
    questions: tuple[str, ...] = ()
    """Questions about the picture."""
    answers: tuple[tuple[str, ...], ...] = ()
    """`answers[i]`: the accepted answers of `questions[i]`; repeated ones weigh more."""
    phrases: tuple[tuple[str, Box], ...] = ()
    """What is where: a phrase and its box; a phrase that names several things is there once for each."""

    @property
    def model_input(self) -> 'bytes | tuple[bytes, ...] | np.ndarray':
        """What a model is given: the features, the frames, or the picture."""
        return self.features if self.features is not None else self.frames or self.image

    def __post_init__(self):
        if len(self.questions) != len(self.answers):
            raise ValueError(f'{self.image_id}: {len(self.questions)} questions, {len(self.answers)} lists of answers')

    @property
    def phrases_with_boxes(self) -> list[tuple[str, tuple[Box, ...]]]:
        """Each phrase once, with all its boxes."""
        return [(name, tuple(box for other, box in self.phrases if other == name)) for name in dict(self.phrases)]


def pack_array(array: np.ndarray) -> bytes:
    """Return a [P, V] array as bytes: dtype and shape in a 16-byte header, then the values, little-endian."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder('<'))
    return _HEADER.pack(array.dtype.name.encode(), *array.shape) + little.tobytes()


def unpack_array(data: bytes) -> np.ndarray:
    """Return the array [P, V] of `pack_array`'s bytes, in the dtype that it had."""
    name, rows, columns = _HEADER.unpack_from(data)
    dtype = np.dtype(name.rstrip(b'\0').decode()).newbyteorder('<')
    return np.frombuffer(data, dtype, offset=_HEADER.size).reshape(rows, columns)
