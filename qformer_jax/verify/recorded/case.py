"""A recorded case on disk: what somebody else's code computed, at what sizes, with which weights.

    CASE/meta.json                  sizes (`config`), texts, the meaning of every array
    CASE/arrays.npz                 inputs and results
    CASE/state_dict.safetensors     weights by LAVIS's names; or `meta.json` points into a neighbouring case
    CASE/grads*.safetensors         d loss / d weight, by the same names
    CASE/noise.json                 what float32 does to each array, if that was measured (`tolerance.py`)

Pictures are NCHW on disk and NHWC from here on; ids are int32.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ... import json_file
from ...convert.lazy_tensors import in_memory
from ...convert.table import Table, check_complete, check_derived, to_jax
from ...errors import UserError, nearest
from ...rules import flatten, unflatten
from ...typing import Params

NOISE = 'noise.json'


@dataclass(frozen=True, eq=False)
class Case:
    """One folder, read; two cases are equal only if they are the same object."""

    folder: Path
    meta: dict
    arrays: dict[str, np.ndarray]

    def array(self, name: str) -> np.ndarray:
        """Return a recorded array; raises UserError when the case lacks it."""
        if name not in self.arrays:
            raise UserError(f"{self.folder}: arrays.npz has no '{name}'{nearest(name, self.arrays)}")
        return self.arrays[name]

    def setting(self, *names: str) -> object:
        """Return `meta['config'][name][name]...`, ours or that of `home`; raises UserError where there is none."""
        source = self if 'config' in self.meta else self.home
        return source.entry('config', *names)

    def entry(self, *names: str) -> object:
        """Return `meta[name][name]...`; raises UserError where there is none."""
        found = self.meta
        for name in names:
            if not isinstance(found, dict) or name not in found:
                raise UserError(f"{self.folder}: meta.json has no '{'.'.join(names)}'")
            found = found[name]
        return found

    @cached_property
    def home(self) -> 'Case':
        """The case whose weights these are: this one, or a neighbour whose state dict meta.json mentions."""
        if (self.folder / 'state_dict.safetensors').is_file():
            return self
        pointed = re.search(r'(\.\./[^\s"]+)/state_dict\.safetensors', json.dumps(self.meta))
        if not pointed:
            raise UserError(f'{self.folder}: no state_dict.safetensors, and meta.json does not say where it is')
        folder = self.folder / pointed[1]
        if not (folder / 'state_dict.safetensors').is_file():
            raise UserError(f'{self.folder}: meta.json takes the weights from {folder}, where they are not')
        return read(folder)

    @cached_property
    def state(self) -> dict[str, np.ndarray]:
        """The weights by LAVIS's names."""
        return self.home.tensors('state_dict.safetensors')

    @cached_property
    def noise(self) -> dict[str, float]:
        """What float32 does to each array, where it was measured and stored."""
        path = self.folder / NOISE
        return json_file.read(path, dict[str, float], 'delete it to measure again') if path.is_file() else {}

    def tensors(self, file: str) -> dict[str, np.ndarray]:
        """Return a safetensors file of the folder; raises UserError when it is missing or damaged."""
        path = self.folder / file
        if not path.is_file():
            raise UserError(f'{path}: no such file')
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises its own type, which it does not export
            raise UserError(f'{path}: damaged ({error}): copy it again') from error


def read(folder: Path | str) -> Case:
    """Return the case in `folder`; raises UserError when a file is missing or damaged."""
    folder = Path(folder)
    if not (folder / 'meta.json').is_file():
        raise UserError(f'{folder}: not a case: it has no meta.json')
    try:
        meta = json.loads((folder / 'meta.json').read_text())
    except ValueError as error:
        raise UserError(f'{folder}/meta.json: not JSON ({error})') from error
    if not isinstance(meta, dict):
        raise UserError(f'{folder}/meta.json: not a JSON object')
    case = Case(folder, meta, _arrays(folder / 'arrays.npz'))
    _check_inventory(case)
    return case


def _check_inventory(case: Case) -> None:
    """Raise UserError when an array or a file that meta.json lists is not there, or has another shape."""
    for name, said in case.meta.get('arrays', {}).items():
        found = list(_torch_layout(name, case.array(name)).shape)
        if found != said.get('shape', found):
            raise UserError(f"{case.folder}: '{name}' is {found}, but meta.json says {said['shape']}")
    for name in case.meta.get('files', {}):
        if not (case.folder / name).is_file():
            raise UserError(f'{case.folder / name}: no such file, but meta.json lists it')


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f'{path}: no such file')
    try:
        with path.open('rb') as stream, np.load(stream) as file:
            return {name: _jax_layout(name, array) for name, array in file.items()}
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise UserError(f'{path}: damaged ({error}): copy it again') from error


def _jax_layout(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.int64:
        array = array.astype(np.int32)
    return array.transpose(0, 2, 3, 1) if _is_picture(name) else array


def _torch_layout(name: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 3, 1, 2) if _is_picture(name) else array


def _is_picture(name: str) -> bool:
    return name.rpartition('.')[2] == 'pixels'


def params_of(case: Case, table: Table, shapes: Params, unused: tuple[str, ...] = ()) -> Params:
    """Return a case's weights as our tree, through the conversion tables; raises UserError for what does not fit.

    Regexes over paths in `unused` name what a case need not record because nothing in it depends on them: zeros.
    """
    torch_state, wanted = in_memory(case.state), flatten(shapes)
    jax_state = to_jax(table, torch_state)
    absent = [path for path in wanted if path not in jax_state and any(re.fullmatch(rule, path) for rule in unused)]
    jax_state |= in_memory({path: np.zeros(wanted[path].shape, np.float32) for path in absent})
    check_complete(jax_state, shapes)
    check_derived(table, torch_state, jax_state)
    return unflatten({path: jax_state[path].read().astype(np.float32) for path in wanted})


def gradients_of(case: Case, file: str, table: Table, ranks: int = 0) -> dict[str, np.ndarray]:
    """Return the gradients of a file in our layout, named `file: path`; nothing if the case has no such file.

    Where a file holds those of several processes, their names start with `rank0.`, `rank1.`, ...
    """
    if not (case.folder / file).is_file():
        return {}
    tensors, out = case.tensors(file), {}
    for rank in [f'rank{r}.' for r in range(ranks)] or ['']:
        own = {key.removeprefix(rank): tensor for key, tensor in tensors.items() if key.startswith(rank)}
        out |= {named(file, rank + path): x.read() for path, x in to_jax(table, in_memory(own)).items()}
    return out


def named(file: str, path: str) -> str:
    """Return the name of a tensor of a file in the table of results."""
    return f'{file}: {path}'
