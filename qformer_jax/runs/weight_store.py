"""The weight store: a folder of safetensors files, each named by the SHA-256 of its bytes.

Runs refer to frozen weights by digest instead of copying them, so that a frozen tower lies on the disk once.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike
from safetensors.numpy import load_file

from ..atomic import scratch_folder
from ..convert import safetensors_writer
from ..convert.lazy_tensors import State, in_memory
from ..errors import UserError, full_disk_as_user_error
from ..hashing import sha256
from ..models.quantized import from_flat, to_flat
from ..rules import flatten, unflatten
from ..typing import Params


def save(folder: Path, params: Params) -> str:
    """Write `params` (nested dict of arrays) to `folder/DIGEST.safetensors` and return the digest, 64 hex digits.

    Equal content gives an equal digest and one file. Raises UserError when the disk is full.
    """
    return save_tensors(folder, in_memory(to_flat(flatten(params))))


def save_tensors(folder: Path, tensors: State, dtype: str | None = None) -> str:
    """Write tensors by path as `save` does, one at a time, floating ones as `dtype` if given."""
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder) as scratch, full_disk_as_user_error(folder):
        written = scratch / 'weights'
        digest = safetensors_writer.write(written, dict(sorted(tensors.items())), dtype)
        os.replace(written, path(folder, digest))  # also when it is there already: that heals a damaged copy
    return digest


@contextlib.contextmanager
def taken_back_on_error(folder: Path) -> Iterator[Callable[[State, str | None], str]]:
    """Lend `save_tensors`; an error inside removes the files that it added, and the folder if they were all."""
    before, added = set(folder.glob('*')), []

    def save(tensors: State, dtype: str | None) -> str:
        added.append(path(folder, save_tensors(folder, tensors, dtype)))
        return added[-1].stem

    try:
        yield save
    except BaseException:
        for file in set(added) - before:
            file.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def load(folder: Path, digest: str) -> Params:
    """Return the nested dict of numpy arrays that `save` stored; raises UserError when it is missing or damaged.

    Quantized weights, stored as PATH/values and PATH/scale, are one leaf again.
    """
    file = path(folder, digest)
    if not file.is_file():
        raise UserError(f'weights {file} are missing: copy the file there, or repeat the step that wrote them')
    if sha256(file) != digest:
        raise UserError(f'weights {file} are damaged (its SHA-256 is not its name): delete the file and write it again')
    return unflatten(from_flat(load_file(file)))


def copy(source: Path, folder: Path, digest: str) -> None:
    """Make sure that `folder` holds what the store `source` holds under `digest`; raises UserError as `load` does.

    The bytes are copied, for the name is theirs: written anew by a later version, they might have another one.
    """
    if path(folder, digest).is_file():
        return
    load(source, digest)  # checks them
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder) as scratch, full_disk_as_user_error(folder):
        written = shutil.copy(path(source, digest), scratch / 'weights')
        os.replace(written, path(folder, digest))


def path(folder: Path, digest: str) -> Path:
    """Return where `folder` holds the weights of this digest."""
    return folder / f'{digest}.safetensors'


def digest(params: Params) -> str:
    """Return the SHA-256 of the arrays' names, dtypes, shapes and bytes; equal means equal to the last bit."""
    return hashlib.sha256(repr(digests(params)).encode()).hexdigest()


def digests(params: Params) -> dict[str, str]:
    """Return path -> what `digest` says of one array; a quantized one is two (`PATH/values`, `PATH/scale`)."""
    flat = to_flat(flatten(params))
    with ThreadPoolExecutor() as pool:  # hashing is outside Python's lock
        return dict(zip(flat, pool.map(_digest_of_array, flat.values()), strict=True))


def _digest_of_array(value: ArrayLike) -> str:
    array = np.asarray(value)
    total = hashlib.sha256(f'{array.dtype} {array.shape}'.encode())
    total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return total.hexdigest()
