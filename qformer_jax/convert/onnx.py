"""Weights out of an ONNX file, under the names that PyTorch gave them.

PyTorch's exporter keeps a parameter's name unless it had to change the tensor: the weight of a Linear is stored
transposed, as `onnx::MatMul_1966`, and only the node that multiplies by it still says which module it was:

    /encoder/layer.0/mlp/fc1/MatMul  reads  onnx::MatMul_1981 [in, out]  ->  encoder.layer.0.mlp.fc1.weight [out, in]
    /embeddings/Reshape_1            reads  onnx::Reshape_1962           ->  embeddings.Reshape_1
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from onnx import GraphProto, TensorProto, helper, load, numpy_helper

from ..errors import UserError
from .tensors import Tensor


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
    names = _names(graph)
    return dict(_tensor(names.get(x.name, x.name), x, path.parent) for x in graph.initializer)


def _names(graph: GraphProto) -> dict[str, str]:
    """Return anonymous weight -> `scope.op` of the first node that reads it."""
    names = {}
    for node in graph.node:
        for name in node.input:
            if name.startswith('onnx::') and node.name.startswith('/'):
                names.setdefault(name, node.name.strip('/').replace('/', '.'))
    return names


def _tensor(name: str, proto: TensorProto, folder: Path) -> tuple[str, Tensor]:
    shape, dtype = tuple(proto.dims), np.dtype(helper.tensor_dtype_to_np_dtype(proto.data_type))

    def read() -> np.ndarray:
        return numpy_helper.to_array(proto, str(folder))

    linear = name.removesuffix('.MatMul')
    if linear == name or len(shape) != 2:
        return name, Tensor(shape, dtype, read)
    return f'{linear}.weight', Tensor(shape[::-1], dtype, _transposed(read))


def _transposed(read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    return lambda: read().T
