"""Weights out of an ONNX file, under the names that PyTorch gave them.

PyTorch's exporter keeps a parameter's name unless it had to change the tensor: the weight of a Linear is stored
transposed, as `onnx::MatMul_1966`, and only the node that multiplies by it still says which module it was:

    /encoder/layer.0/mlp/fc1/MatMul  reads  onnx::MatMul_1981 [in, out]  ->  encoder.layer.0.mlp.fc1.weight [out, in]
    /embeddings/Reshape_1            reads  onnx::Reshape_1962           ->  embeddings.Reshape_1
"""

from functools import partial
from pathlib import Path

import numpy as np

from ..errors import UserError
from .lazy_tensors import Tensor

try:
    from google.protobuf.message import DecodeError
    from onnx import GraphProto, TensorProto, checker, helper, load, numpy_helper
except ImportError:
    raise UserError("ONNX files need a package more: pip install 'qformer_jax[onnx]'") from None


def read(path: Path) -> dict[str, Tensor]:
    """Return the weights of an ONNX file by PyTorch's names; raises UserError when it is none, or is cut off."""
    if not path.is_file():
        raise UserError(f'{path} does not exist: name an ONNX file')
    try:
        graph = load(path, load_external_data=False).graph
    except DecodeError:
        raise UserError(f'{path} is no ONNX file, or only a part of one: fetch it again') from None
    if not graph.initializer:
        raise UserError(f'{path} holds no weights: is it an ONNX file?')
    named = [x.name for x in (*graph.initializer, *graph.node)] + [name for node in graph.node for name in node.input]
    if not all(isinstance(name, str) for name in named):  # bytes, where they are not UTF-8
        raise UserError(f'{path} has damaged names: fetch it again')
    names = _names(graph)
    return dict(_tensor(names.get(x.name, x.name), x, path) for x in graph.initializer)


def _names(graph: GraphProto) -> dict[str, str]:
    """Return anonymous weight -> `scope.op` of the first node that reads it."""
    names = {}
    for node in graph.node:
        for name in node.input:
            if name.startswith('onnx::') and node.name.startswith('/'):
                names.setdefault(name, node.name.strip('/').replace('/', '.'))
    return names


def _tensor(name: str, proto: TensorProto, path: Path) -> tuple[str, Tensor]:
    shape = tuple(proto.dims)
    if min(shape, default=0) < 0:
        raise UserError(f"{path}: '{proto.name}' has the shape {list(shape)}: fetch it again")
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(proto.data_type))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: '{proto.name}' is of the type {proto.data_type}, which ONNX does not have") from None
    linear = name.removesuffix('.MatMul')
    if linear == name or len(shape) != 2:
        return name, Tensor(shape, dtype, partial(_values, proto, path))
    return f'{linear}.weight', Tensor(shape[::-1], dtype, partial(_transposed, proto, path))


def _values(proto: TensorProto, path: Path) -> np.ndarray:
    try:
        return numpy_helper.to_array(proto, str(path.parent))
    except (checker.ValidationError, OSError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError):
        file = next((x.value for x in proto.external_data if x.key == 'location'), path.name)
        raise UserError(f"{path}: '{proto.name}' cannot be read from '{file}': is that there, and whole?") from None


def _transposed(proto: TensorProto, path: Path) -> np.ndarray:
    return _values(proto, path).T
