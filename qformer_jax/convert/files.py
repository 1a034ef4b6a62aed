"""Checkpoint files of every kind as one thing: tensors by name, unread (`tensors.State`).

`.safetensors`, folders of them with Hugging Face's index, `.pth` / `.pt` / `.bin` of PyTorch, `.onnx`, `.gguf`.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from .. import json_file
from ..errors import UserError
from .lazy_tensors import FLOATS, Tensor

KINDS = '.safetensors, .pth, .pt, .bin, .onnx, .gguf, or a folder of .safetensors or .bin'
_DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'BOOL': 'bool'}
_DTYPES |= {f'I{bits}': f'int{bits}' for bits in (8, 16, 32, 64)} | {f'U{bits}': f'uint{bits}' for bits in (8, 16, 32)}
_BESIDE = re.compile(r'(training_args|optimizer|scheduler|scaler|rng_state\w*|random_states\w*)\.(bin|pth)')
"""What transformers' `Trainer` and accelerate write beside the weights."""
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
        found = sorted(file for file in path.glob(pattern) if file.is_file() and not _BESIDE.fullmatch(file.name))
        if found:
            return found
    raise UserError(f"folder '{path}' holds no checkpoint; known kinds: {KINDS}")


class _Index(msgspec.Struct):
    """What an index of shards holds, as far as it is read."""

    weight_map: dict[str, str]


def _files_of_index(index: Path) -> list[Path]:
    names = sorted(set(json_file.read(index, _Index, 'fetch it again').weight_map.values()))
    if not names:
        raise UserError(f'{index} names no shards: fetch it again')
    for name in names:
        if Path(name).name != name or '\0' in name:
            raise UserError(f"{index} names a shard '{name}', which is no file beside it: fetch it again")
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
    for name, value in tree.items():
        if not isinstance(name, str):
            raise UserError(f'{file}: a key of its state dict is {name!r:.40}, a {type(name).__name__}: expected text')
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{file}: '{name}' is a {type(value).__name__}, not a tensor")
        _check_plain(torch, name, value, file)
    return {name: _of_torch(torch, value) for name, value in tree.items()}


def _check_plain(torch, name: str, value, file: Path) -> None:
    """Raise UserError for a tensor that is no array of numbers that the file holds."""
    dtype = str(value.dtype).removeprefix('torch.')
    if dtype not in _DTYPES.values():
        raise UserError(f"{file}: '{name}' is {dtype}: weights must be {', '.join(FLOATS)}")
    if value.layout != torch.strided or value.device.type != 'cpu':
        raise UserError(f"{file}: '{name}' is {value.layout} on '{value.device}': expected a plain tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{file}: '{name}' {list(value.shape)} is more than the file holds of it: save a whole copy")


def _load(torch, file: Path):
    """Return what a file holds, memory-mapped where its format allows, and never running code that it holds."""
    options = {'weights_only': True, 'map_location': 'cpu'}
    try:
        with file.open('rb') as start:
            zipped = start.read(2) == b'PK'  # the format before PyTorch 1.6 is no zip and cannot be mapped
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # PyTorch's, about odd tensors: what is wrong with them is said later
            return torch.load(file, mmap=zipped, **options)
    except Exception as error:
        refused = re.search(r'GLOBAL ([\w.]+)', str(error))
        if refused:
            raise UserError(
                f'{file} refused: reading it would run {refused.group(1)}, and a checkpoint must be tensors and plain '
                'values only: save its state dict again with torch.save(model.state_dict(), ...)'
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = reason.partition('. In PyTorch 2.6')[0][:160]  # which goes on about the options of torch.load
        raise UserError(f'{file} is damaged, or not a PyTorch file ({reason}): fetch it again') from None


def _of_torch(torch, value) -> Tensor:
    name = str(value.dtype).removeprefix('torch.')

    def read() -> np.ndarray:
        plain = value.detach().contiguous()
        return plain.view(torch.int16).numpy().view(np.dtype(name)) if name == 'bfloat16' else plain.numpy()

    return Tensor(tuple(value.shape), np.dtype(name), read)
