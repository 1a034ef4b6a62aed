"""Conversion tables: which PyTorch tensor becomes which parameter, exactly once in both directions.

A table is an ordered tuple of rows; the first row whose regex matches a whole key decides. Nothing is dropped or left
over in silence: a key without a row, a path filled twice or not at all, and a shape that differs are errors.

    >>> rows = (*linear(r'proj', 'projection'), Row(r'position_ids', ()))
    >>> state = {'proj.weight': np.ones((2, 3)), 'proj.bias': np.ones(2), 'position_ids': np.arange(4)}
    >>> convert(rows, state, wanted)['projection']['kernel'].shape
    (3, 2)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError, nearest
from ..rules import flatten, unflatten
from ..typing import Params


@dataclass(frozen=True)
class Transform:
    """One tensor to the arrays of a row's paths, and back."""

    forward: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    backward: Callable[..., np.ndarray]


KEEP = Transform(lambda x: (x,), lambda x: x)
TRANSPOSE = Transform(lambda x: (x.T,), lambda x: x.T)
"""A Linear's weight [out, in] <-> a Dense's kernel [in, out]."""
CONVOLUTION = Transform(lambda x: (x.transpose(2, 3, 1, 0),), lambda x: x.transpose(3, 2, 0, 1))
"""OIHW <-> HWIO."""
SPLIT_QKV = Transform(lambda x: tuple(np.split(x, 3)), lambda *x: np.concatenate(x))
"""Fused bias [3 * width] <-> query, key, value."""
SPLIT_QKV_TRANSPOSE = Transform(
    lambda x: tuple(part.T for part in np.split(x, 3)), lambda *x: np.concatenate([part.T for part in x])
)
"""Fused weight [3 * width, in] <-> three kernels [in, width]."""
SPLIT_LAST_ROW = Transform(lambda x: (x[:-1], x[-1:]), lambda *x: np.concatenate(x))
"""Token table <-> the pretrained rows, and the one that was added."""


def drop_axes(count: int) -> Transform:
    """Return the transform that drops `count` leading axes of length 1, as in [1, 1, width] -> [width]."""
    return Transform(lambda x: (x.squeeze(tuple(range(count))),), lambda x: x.reshape((1,) * count + x.shape))


@dataclass(frozen=True)
class Row:
    """A regex over PyTorch keys, the paths of what it holds (groups as `\\1`), and how to get there.

    No paths: the key is ignored, knowingly (buffers, the second name of a tied tensor).
    """

    key: str
    paths: tuple[str, ...]
    transform: Transform = KEEP


Table = tuple[Row, ...]


def linear(key: str, path: str) -> Table:
    """Return the rows of a torch Linear, weight and bias."""
    return (Row(rf'{key}\.weight', (f'{path}/kernel',), TRANSPOSE), Row(rf'{key}\.bias', (f'{path}/bias',)))


def norm(key: str, path: str) -> Table:
    """Return the rows of a torch LayerNorm, weight and bias."""
    return (Row(rf'{key}\.weight', (f'{path}/scale',)), Row(rf'{key}\.bias', (f'{path}/bias',)))


def convert(
    table: Table, state: Mapping[str, np.ndarray], wanted: Params, *, allow_missing: Sequence[str] = ()
) -> Params:
    """Return the parameters that `state` holds, with the tree, shapes and dtypes of `wanted` (arrays or shape structs).

    `allow_missing` lists regexes over paths that may be absent and are then zeros, such as the text side of a Q-Former
    that was trained without one. Raises UserError, with both sides, for whatever does not fit exactly once.
    """
    wanted = flatten(wanted)
    source, found = {}, {}
    for key, tensor in state.items():
        for path, array in _convert_one(table, key, np.asarray(tensor)):
            if path in source:
                raise UserError(f"'{source[path]}' and '{key}' both become '{path}': ignore one of them in the table")
            if path not in wanted:
                raise UserError(f"'{key}' becomes '{path}', which the model does not have{nearest(path, wanted)}")
            if array.shape != wanted[path].shape:
                raise UserError(
                    f"'{key}' {tensor.shape} becomes '{path}' {array.shape}, "
                    f'but the model expects {wanted[path].shape}: check the sizes in the configuration'
                )
            source[path], found[path] = key, array.astype(wanted[path].dtype)
    missing = [path for path in wanted if path not in found]
    unfilled = [path for path in missing if not any(re.fullmatch(pattern, path) for pattern in allow_missing)]
    if unfilled:
        raise UserError(
            f"no tensor for {len(unfilled)} of the model's {len(wanted)} parameters, first '{unfilled[0]}'; "
            f'the file has {len(state)} tensors: {_some(state)}: check that it is the right file'
        )
    zeros = {path: np.zeros(wanted[path].shape, wanted[path].dtype) for path in missing}
    return unflatten(found | zeros)


def _convert_one(table: Table, key: str, tensor: np.ndarray) -> list[tuple[str, np.ndarray]]:
    for row in table:
        match = re.fullmatch(row.key, key)
        if match:
            paths = [match.expand(path) for path in row.paths]
            return list(zip(paths, row.transform.forward(tensor), strict=True)) if paths else []
    raise UserError(f"no row of the table matches '{key}' {tensor.shape}: is the file of this model family?")


def _some(names: Mapping[str, np.ndarray]) -> str:
    return ', '.join(sorted(names)[:3]) + (', ...' if len(names) > 3 else '')
