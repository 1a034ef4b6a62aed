"""Writes safetensors files a tensor at a time, since the library's own writer wants them all in memory at once.

The format: 8 bytes with the length of the header, the header (JSON: name -> dtype, shape, offsets), the bytes.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from .lazy_tensors import FLOATS, State, Tensor

_NAMES = {'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}
_NAMES |= {'int64': 'I64', 'int32': 'I32', 'int8': 'I8', 'uint8': 'U8'}


def write(path: Path, state: State, dtype: str | None = None) -> str:
    """Write tensors, floating ones as `dtype` if given, and return the SHA-256 of the file (64 hex digits)."""
    total = hashlib.sha256()
    with path.open('wb') as file:
        start = header(state, dtype)
        total.update(start)
        file.write(start)
        for tensor in state.values():
            with np.errstate(over='ignore'):  # whoever writes says what became infinite
                array = np.ascontiguousarray(tensor.read().astype(_kind(tensor, dtype), copy=False))
            data = memoryview(array.reshape(-1).view(np.uint8))  # no copy
            total.update(data)
            file.write(data)
    return total.hexdigest()


def header(state: State, dtype: str | None = None) -> bytes:
    """Return what a file of these tensors begins with."""
    places, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name, tensor in state.items():
        end = offset + _bytes(tensor, dtype)
        kind = _NAMES[_kind(tensor, dtype).name]
        places[name] = {'dtype': kind, 'shape': tensor.shape, 'data_offsets': (offset, end)}
        offset = end
    text = json.dumps(places, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    return len(text).to_bytes(8, 'little') + text


def _kind(tensor: Tensor, wanted: str | None) -> np.dtype:
    return np.dtype(wanted) if wanted and tensor.dtype.name in FLOATS else tensor.dtype


def _bytes(tensor: Tensor, dtype: str | None) -> int:
    return tensor.size * _kind(tensor, dtype).itemsize


def write_shards(folder: Path, state: State, dtype: str | None, limit: int) -> None:
    """Write tensors as Hugging Face does: one `model.safetensors`, or shards of at most `limit` bytes and an index."""
    found = shards(state, dtype, limit)
    for name, shard in found.items():
        write(folder / name, shard, dtype)
    if len(found) > 1:
        size = sum((folder / name).stat().st_size for name in found)
        where = {key: name for name, shard in found.items() for key in shard}
        tree = {'metadata': {'total_size': size}, 'weight_map': where}
        (folder / 'model.safetensors.index.json').write_text(json.dumps(tree, indent=1, sort_keys=True))


def shards(state: State, dtype: str | None, limit: int) -> dict[str, State]:
    """Return file name -> tensors, each at most `limit` bytes (or one tensor that is larger)."""
    parts, size = [{}], 0
    for name, tensor in state.items():
        more = _bytes(tensor, dtype)
        if size + more > limit and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += more
    if len(parts) == 1:
        return {'model.safetensors': parts[0]}
    return {f'model-{i:05}-of-{len(parts):05}.safetensors': part for i, part in enumerate(parts, 1)}
