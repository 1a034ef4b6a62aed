"""Conversion tables: which PyTorch tensor is which parameter, exactly once in both directions.

A table is a tuple of rows. `{i}` in a key and in its paths stands for the same number, so that a row reads both ways:

    >>> rows = (*linear('blocks.{i}.fc', 'layer_{i}/up'), Derived('ids', ('layer_0/up/bias',), lambda b: np.arange(2)))
    >>> torch_state = {'blocks.0.fc.weight': np.ones((2, 3)), 'blocks.0.fc.bias': np.ones(2), 'ids': np.arange(2)}
    >>> jax_state = to_jax(rows, in_memory(torch_state))
    >>> jax_state['layer_0/up/kernel'].shape
    (3, 2)
    >>> sorted(to_torch(rows, jax_state))
    ['blocks.0.fc.bias', 'blocks.0.fc.weight', 'ids']

Nothing is dropped or left over in silence: a key without a row, a parameter filled twice or not at all, and a shape
that differs are errors that name both sides; what a table leaves out on purpose is a row with its reason.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from ..errors import UserError, nearest
from ..rules import flatten, unflatten
from ..typing import Params
from .lazy_tensors import State, Tensor, in_memory, outline


@dataclass(frozen=True)
class Transform:
    """One tensor to the arrays of a row's paths, and back; `forward` raises ValueError for what has no place."""

    forward: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    backward: Callable[..., np.ndarray]


IDENTITY = Transform(lambda x: (x,), lambda x: x)
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
    """A PyTorch key, the paths of the parameters that it holds, and how to get from one to the other."""

    key: str
    paths: tuple[str, ...]
    transform: Transform = IDENTITY


@dataclass(frozen=True)
class Derived:
    """A key whose content follows from parameters that other rows fill: a tied tensor's second name, a buffer.

    A file may lack it; where it is there it must agree (`check_derived`). `derive(*arrays of the paths)` makes it when
    we write; without paths it is a constant.
    """

    key: str
    paths: tuple[str, ...]
    derive: Callable[..., np.ndarray]


@dataclass(frozen=True)
class Ignored:
    """A key that a file may hold and that has no place in the model; read only."""

    key: str
    why: str


@dataclass(frozen=True)
class NewlyInitialized:
    """Parameters that this family cannot give, and that keep their first values; read only."""

    path: str
    why: str


Table = tuple[Row | Derived | Ignored | NewlyInitialized, ...]


def linear(key: str, path: str, bias: bool = True) -> Table:
    """Return the rows of a torch Linear, weight and bias."""
    weight = Row(f'{key}.weight', (f'{path}/kernel',), TRANSPOSE)
    return (weight, Row(f'{key}.bias', (f'{path}/bias',))) if bias else (weight,)


def norm(key: str, path: str, bias: bool = True) -> Table:
    """Return the rows of a torch LayerNorm (or, without bias, RMSNorm)."""
    weight = Row(f'{key}.weight', (f'{path}/scale',))
    return (weight, Row(f'{key}.bias', (f'{path}/bias',))) if bias else (weight,)


def prefixed(table: Table, prefix: str) -> Table:
    """Return the table for the same module inside a larger one: `prefix` before every key."""
    return tuple(row if isinstance(row, NewlyInitialized) else replace(row, key=prefix + row.key) for row in table)


def skipped_blocks(table: Table, blocks: range, why: str) -> Table:
    """Return what says that a file's `blocks` have no place in the model; put it before the table, the first wins."""
    repeated = [row.key for row in table if isinstance(row, Row) and '{i}' in row.key]
    return tuple(Ignored(key.replace('{i}', str(i)), why) for i in blocks for key in repeated)


@cache
def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r'\{i\}', r'(?P<i>\d+)', 1).replace(r'\{i\}', '(?P=i)'))


def row_of(table: Table, key: str) -> tuple[Row | Derived | Ignored, dict[str, str]] | None:
    """Return the row of a PyTorch key and what its `{i}` stands for, or None."""
    for row in table:
        found = None if isinstance(row, NewlyInitialized) else _pattern(row.key).fullmatch(key)
        if found:
            return row, found.groupdict()
    return None


def to_jax(table: Table, torch_state: State) -> dict[str, Tensor]:
    """Return the parameters that a state dict holds, by path, unread; raises UserError as the module says."""
    jax_state, source = {}, {}
    for key, tensor in torch_state.items():
        found = row_of(table, key)
        if found is None:
            known = [row.key.replace('{i}', '0') for row in table if not isinstance(row, NewlyInitialized)]
            raise UserError(f"no row of the table has the key '{key}' {list(tensor.shape)}{nearest(key, known)}")
        row, binding = found
        if not isinstance(row, Row):
            continue
        for path, part in _parts(key, tensor, row, binding).items():
            if path in source:
                raise UserError(f"'{source[path]}' and '{key}' are both '{path}': one of them is one too many")
            source[path], jax_state[path] = key, part
    return jax_state


def check_derived(table: Table, torch_state: State, jax_state: State) -> None:
    """Read every second name and buffer of a state dict and raise UserError where one is not what it repeats."""
    for key, tensor in torch_state.items():
        row, binding = row_of(table, key)
        if not isinstance(row, Derived):
            continue
        paths = [path.format(**binding) for path in row.paths]
        absent = [path for path in paths if path not in jax_state]
        if absent:
            raise UserError(f"'{key}' repeats '{absent[0]}', which the file does not hold")
        if not np.array_equal(tensor.read(), row.derive(*(jax_state[path].read() for path in paths))):
            raise UserError(f"'{key}' {list(tensor.shape)} differs from {_it(paths)}, which it should repeat")


def _it(paths: list[str]) -> str:
    return ' and '.join(map(repr, paths)) or 'the constant'


def _parts(key: str, tensor: Tensor, row: Row, binding: dict[str, str]) -> dict[str, Tensor]:
    paths = [path.format(**binding) for path in row.paths]
    it = f"'{key}' {list(tensor.shape)} cannot be {', '.join(map(repr, paths))}"
    try:
        shapes = [x.shape for x in row.transform.forward(outline(tensor.shape))]
    except ValueError:
        raise UserError(f'{it}: wrong rank') from None
    return {
        path: Tensor(shape, tensor.dtype, partial(_read_part, tensor, row.transform, n, it))
        for n, (path, shape) in enumerate(zip(paths, shapes, strict=True))
    }


def _read_part(tensor: Tensor, transform: Transform, n: int, it: str) -> np.ndarray:
    try:
        return transform.forward(tensor.read())[n]
    except ValueError as error:
        raise UserError(f'{it}: {error}') from None


def to_torch(table: Table, jax_state: State) -> dict[str, Tensor]:
    """Return the state dict of parameters by path: `to_jax` undone, second names and buffers made again.

    Raises UserError when a parameter has no row, or when part of a fused tensor is missing.
    """
    torch_state, used = {}, {}
    for row in table:
        for binding in _bindings(row, jax_state):
            key, paths = row.key.format(**binding), [path.format(**binding) for path in row.paths]
            absent = [path for path in paths if path not in jax_state]
            if absent:
                raise UserError(f"'{key}' needs '{absent[0]}', which the model does not have")
            parts = [jax_state[path] for path in paths]
            if isinstance(row, Derived):
                torch_state[key] = _joined(row.derive, parts)
                continue
            twice = [path for path in paths if path in used]
            if twice:
                raise UserError(f"'{twice[0]}' is both '{used[twice[0]]}' and '{key}': one of the rows is one too many")
            used |= dict.fromkeys(paths, key)
            torch_state[key] = _joined(row.transform.backward, parts)
    lost = [path for path in jax_state if path not in used]
    if lost:
        raise UserError(f"no row of the table has the parameter '{lost[0]}' ({len(lost)} in all): another family's?")
    return torch_state


def _bindings(row: Row | Derived | Ignored | NewlyInitialized, jax_state: State) -> list[dict[str, str]]:
    """Return what `{i}` stands for, once for each key that the row writes."""
    if not isinstance(row, Row | Derived):
        return []
    if not row.paths:
        return [{}]
    fits = map(_pattern(row.paths[0]).fullmatch, jax_state)
    return [found.groupdict() for found in fits if found]


def _joined(make: Callable[..., np.ndarray], parts: list[Tensor]) -> Tensor:
    like = make(*(outline(part.shape) for part in parts))
    dtype = like.dtype if like.dtype != bool else parts[0].dtype  # an outline is bool; a counting buffer is not
    return Tensor(like.shape, dtype, lambda: make(*(part.read() for part in parts)))


def check_complete(jax_state: Mapping[str, Tensor], wanted: Params, fresh: Table = ()) -> dict[str, NewlyInitialized]:
    """Return the paths of `wanted` that `jax_state` lacks, and the row that excuses each; raises UserError for all
    else."""
    wanted = flatten(wanted)
    for path, tensor in jax_state.items():
        if path not in wanted:
            raise UserError(f"the file has '{path}', which the model does not have{nearest(path, wanted)}")
        if tensor.shape != wanted[path].shape:
            raise UserError(
                f"'{path}' is {list(tensor.shape)} in the file, but the model expects {list(wanted[path].shape)}: "
                'check the sizes in the configuration'
            )
    missing = [path for path in wanted if path not in jax_state]
    rows = [row for row in fresh if isinstance(row, NewlyInitialized)]
    excused = {path: row for path in missing for row in rows if _pattern(row.path).fullmatch(path)}
    unfilled = [path for path in missing if path not in excused]
    if unfilled:
        some = ', '.join(sorted(jax_state)[:3]) + (', ...' if len(jax_state) > 3 else '')
        raise UserError(
            f"no tensor for {len(unfilled)} of the model's {len(wanted)} parameters, first '{unfilled[0]}'; "
            f'the file gives {len(jax_state)}: {some}: is a source missing?'
        )
    return excused


def convert(table: Table, state: Mapping[str, np.ndarray], wanted: Params) -> Params:
    """Return the parameters that arrays in memory hold, with the tree, shapes and dtypes of `wanted`."""
    torch_state = in_memory(state)
    jax_state = to_jax(table, torch_state)
    check_complete(jax_state, wanted)
    check_derived(table, torch_state, jax_state)
    return unflatten({path: jax_state[path].read().astype(leaf.dtype) for path, leaf in flatten(wanted).items()})
