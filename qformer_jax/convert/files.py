"""Checkpoint files of every kind as one thing: tensors by name, unread (`tensors.State`).

`.safetensors`, folders of them with Hugging Face's index, `.pth` / `.pt` / `.bin` of PyTorch, `.onnx`, `.gguf`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .lazy_tensors import FLOATS, Tensor

KINDS = '.safetensors, .pth, .pt, .bin, .onnx, .gguf, or a folder of .safetensors or .bin'
_DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'BOOL': 'bool'}
_DTYPES |= {f'I{bits}': f'int{bits}' for bits in (8, 16, 32, 64)} | {f'U{bits}': f'uint{bits}' for bits in (8, 16, 32)}
_INNER = ('model', 'state_dict', 'module')  # where training scripts put the state dict: LAVIS, Lightning, DeepSpeed


def open_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint; raises UserError when it is missing, damaged, or of no known kind."""
    state = {}
    for file in files_of(path):
        for name, tensor in _reader(file)(file).items():
            if name in state:
                raise UserError(f"'{name}' stands in more than one file of {path}")
            state[name] = tensor
    return state


def files_of(path: Path) -> list[Path]:
    """Return the files that a checkpoint consists of; raises UserError as `open_checkpoint`."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no file or folder '{path}'")
    for pattern in ('*.safetensors.index.json', '*.bin.index.json'):
        for index in sorted(path.glob(pattern)):
            return _files_of_index(index)
    for pattern in ('*.safetensors', '*.bin', '*.pth', '*.gguf', '*.onnx'):
        found = sorted(path.glob(pattern))
        if found:
            return found
    raise UserError(f"folder '{path}' holds no checkpoint; known kinds: {KINDS}")


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f'{index} is not an index of shards: {error}') from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f'{index} names {len(names)} shards, but {missing[0]} is missing ({len(missing)} in all)')
    return [index.parent / name for name in names]


def _reader(file: Path) -> Callable[[Path], dict[str, Tensor]]:
    if file.suffix == '.safetensors':
        return _safetensors
    if file.suffix in ('.pth', '.pt', '.bin'):
        return _torch
    if file.suffix == '.onnx':
        from .onnx import read

        return read
    if file.suffix == '.gguf':
        from .gguf import read

        return read
    raise UserError(f'{file}: known kinds are {KINDS}')


def _safetensors(file: Path) -> dict[str, Tensor]:
    def fetch(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            with safe_open(file, 'np') as opened:  # opened for each tensor: what is mapped counts as memory in use
                return opened.get_tensor(name)

        return read

    try:
        with safe_open(file, 'np') as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
            return {
                name: Tensor(tuple(part.get_shape()), _dtype(part.get_dtype(), name, file), fetch(name))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise UserError(f'{file} is damaged, or not safetensors ({error}): fetch it again') from error


def _dtype(name: str, tensor: str, file: Path) -> np.dtype:
    if name not in _DTYPES:
        raise UserError(f"{file}: '{tensor}' is {name}: weights must be {', '.join(FLOATS)}")
    return np.dtype(_DTYPES[name])


def _torch(file: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise UserError(f"{file} needs PyTorch to be read: pip install 'qformer_jax[torch]'") from None
    tree = _load(torch, file)
    for inner in _INNER:
        if isinstance(tree, dict) and isinstance(tree.get(inner), dict):
            tree = tree[inner]
    if not isinstance(tree, dict) or not any(isinstance(value, torch.Tensor) for value in tree.values()):
        raise UserError(f'{file} holds no state dict (names to tensors), at the top or under {", ".join(_INNER)}')
    odd = [name for name, value in tree.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise UserError(f"{file}: '{odd[0]}' is a {type(tree[odd[0]]).__name__}, not a tensor")
    return {name: _of_torch(torch, value) for name, value in tree.items()}


def _load(torch, file: Path):
    """Return what a file holds, memory-mapped where its format allows, and never running code that it holds."""
    options = {'weights_only': True, 'map_location': 'cpu'}
    try:
        with file.open('rb') as start:
            zipped = start.read(2) == b'PK'  # the format before PyTorch 1.6 is no zip and cannot be mapped
        return torch.load(file, mmap=zipped, **options)
    except Exception as error:
        refused = re.search(r'GLOBAL ([\w.]+)', str(error))
        if refused:
            raise UserError(
                f'{file} refused: reading it would run {refused.group(1)}, and a checkpoint must be tensors and plain '
                'values only: save its state dict again with torch.save(model.state_dict(), ...)'
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f'{file} is damaged, or not a PyTorch file ({reason[:160]}): fetch it again') from None


def _of_torch(torch, value) -> Tensor:
    name = str(value.dtype).removeprefix('torch.')

    def read() -> np.ndarray:
        plain = value.detach().contiguous()
        return plain.view(torch.int16).numpy().view(np.dtype(name)) if name == 'bfloat16' else plain.numpy()

    return Tensor(tuple(value.shape), np.dtype(name), read)
