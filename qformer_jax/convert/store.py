"""The weight store: a folder of safetensors files, each named by the SHA-256 of its bytes.

Runs refer to frozen weights by digest instead of copying them, so that a frozen tower lies on the disk once.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from qformer_jax.errors import UserError, full_disk_as_user_error
from qformer_jax.rules import flatten, unflatten
from qformer_jax.typing import Params


def save(folder: Path, params: Params) -> str:
    """Write `params` (nested dict of arrays) to `folder/DIGEST.safetensors` and return the digest, 64 hex digits.

    Equal content gives an equal digest and one file. Raises UserError when the disk is full.
    """
    tensors = {name: np.array(value, order='C') for name, value in flatten(params).items()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.writing-') as scratch, full_disk_as_user_error(folder):
        path = Path(scratch) / 'weights'
        save_file(tensors, path)
        digest = sha256(path)
        os.replace(path, _path(folder, digest))  # also when it is there already: that heals a damaged copy
    return digest


def load(folder: Path, digest: str) -> Params:
    """Return the nested dict of numpy arrays that `save` stored; raises UserError when it is missing or damaged."""
    path = _path(folder, digest)
    if not path.is_file():
        raise UserError(f'weights {path} are missing: copy the file there, or repeat the step that wrote them')
    if sha256(path) != digest:
        raise UserError(f'weights {path} are damaged (its SHA-256 is not its name): delete the file and write it again')
    return unflatten(load_file(path))


def copy(source: Path, folder: Path, digest: str) -> None:
    """Make sure that `folder` holds what the store `source` holds under `digest`; raises UserError as `load` does."""
    if not _path(folder, digest).is_file():
        save(folder, load(source, digest))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _path(folder: Path, digest: str) -> Path:
    return folder / f'{digest}.safetensors'


def digest(params: Params) -> str:
    """Return the SHA-256 of the arrays' names, dtypes, shapes and bytes; equal means equal to the last bit."""
    total = hashlib.sha256()
    for name, value in flatten(params).items():
        array = np.asarray(value)
        total.update(f'{name} {array.dtype} {array.shape}'.encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
