"""Writes safetensors files a tensor at a time, since the library's own writer wants them all in memory at once.

The format: 8 bytes with the length of the header, the header (JSON: name -> dtype, shape, offsets), the bytes.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from .tensors import State

_NAMES = {'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'int64': 'I64', 'int32': 'I32'}


def write(path: Path, state: State, dtype: str | None = None) -> str:
    """Write tensors, floating ones as `dtype` if given, and return the SHA-256 of the file (64 hex digits)."""
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    kinds = {name: _kind(tensor.dtype, dtype) for name, tensor in state.items()}
    for name, tensor in state.items():
        size = int(np.prod(tensor.shape)) * kinds[name].itemsize
        header[name] = {
            'dtype': _NAMES[kinds[name].name],
            'shape': tensor.shape,
            'data_offsets': (offset, offset + size),
        }
        offset += size
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    total = hashlib.sha256()
    with path.open('wb') as file:
        for piece in (len(text).to_bytes(8, 'little'), text):
            total.update(piece)
            file.write(piece)
        for name, tensor in state.items():
            array = np.ascontiguousarray(tensor.read().astype(kinds[name], copy=False))
            data = memoryview(array.reshape(-1).view(np.uint8))  # no copy
            total.update(data)
            file.write(data)
    return total.hexdigest()


def _kind(found: np.dtype, wanted: str | None) -> np.dtype:
    is_float = found.name in ('float64', 'float32', 'float16', 'bfloat16')
    return np.dtype(wanted) if wanted and is_float else found


def write_shards(folder: Path, state: State, dtype: str | None, limit: int) -> list[Path]:
    """Write tensors as Hugging Face does: one `model.safetensors`, or shards of at most `limit` bytes and an index."""
    shards, size = [{}], 0
    for name, tensor in state.items():
        more = int(np.prod(tensor.shape)) * _kind(tensor.dtype, dtype).itemsize
        if size + more > limit and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += more
    count = len(shards)
    names = [f'model-{i + 1:05}-of-{count:05}.safetensors' if count > 1 else 'model.safetensors' for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        write(folder / name, shard, dtype)
    paths = [folder / name for name in names]
    if count > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        bytes_ = sum(path.stat().st_size for path in paths)
        index = folder / 'model.safetensors.index.json'
        index.write_text(
            json.dumps({'metadata': {'total_size': bytes_}, 'weight_map': where}, indent=1, sort_keys=True)
        )
        paths.append(index)
    return paths
