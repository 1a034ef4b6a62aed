"""Tensors by name that are read one at a time, so that a checkpoint larger than memory can pass through."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes  # noqa: F401, teaches numpy the name 'bfloat16'
import numpy as np
from jax.typing import ArrayLike

FLOATS = ('float64', 'float32', 'float16', 'bfloat16')
"""Types that weights may have."""


@dataclass(frozen=True)
class Tensor:
    """A tensor whose size is known and whose values are fetched when asked."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


State = Mapping[str, Tensor]
"""A state dict: PyTorch key, or path of ours, -> tensor."""


def in_memory(arrays: Mapping[str, ArrayLike]) -> dict[str, Tensor]:
    """Return arrays that are in memory already as tensors."""
    return {name: _held(np.asarray(array)) for name, array in arrays.items()}


def _held(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, array.dtype, lambda: array)


def read_all(state: State) -> dict[str, np.ndarray]:
    """Return every tensor's values."""
    return {name: tensor.read() for name, tensor in state.items()}


def outline(shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of this shape that occupies one byte: what a transform does to it tells the resulting shape."""
    return np.broadcast_to(np.False_, shape)
