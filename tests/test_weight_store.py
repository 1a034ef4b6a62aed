"""The weight store: equal content has one name, and a damaged file is never loaded."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from qformer_jax.errors import UserError
from qformer_jax.hashing import sha256
from qformer_jax.models.quantized import quantize
from qformer_jax.runs import weight_store


@pytest.fixture
def params():
    draw = np.random.default_rng(0)
    kernel = draw.normal(size=(5, 3)).astype('float32')
    return {
        'layer_0': {'query': {'kernel': kernel.T, 'bias': jnp.asarray([1.5, -2.25], jnp.bfloat16)}},
        'scale': np.float32(0.07) * np.ones(()),
    }


def test_arrays_come_back_bit_equal_with_their_dtypes(tmp_path, params):
    loaded = weight_store.load(tmp_path, weight_store.save(tmp_path, params))
    assert list(loaded) == ['layer_0', 'scale'] or list(loaded) == ['scale', 'layer_0']
    before, after = params['layer_0']['query'], loaded['layer_0']['query']
    np.testing.assert_array_equal(after['kernel'], before['kernel'], strict=True)
    np.testing.assert_array_equal(after['bias'], np.asarray(before['bias']), strict=True)
    np.testing.assert_array_equal(loaded['scale'], params['scale'], strict=True)


def test_equal_content_is_one_file_whatever_its_order_and_library(tmp_path, params):
    first = weight_store.save(tmp_path, params)
    turned = {name: params[name] for name in reversed(params)}
    turned['layer_0'] = {'query': {name: jnp.asarray(x) for name, x in params['layer_0']['query'].items()}}
    assert weight_store.save(tmp_path, turned) == first
    assert [path.name for path in tmp_path.iterdir()] == [f'{first}.safetensors']
    turned['layer_0']['query']['bias'] += 1
    assert weight_store.save(tmp_path, turned) != first


def test_a_digest_is_of_names_shapes_and_bytes_of_quantized_weights_too(params):
    small = lambda: quantize(jnp.asarray(params['layer_0']['query']['kernel'].T), 8)  # noqa: E731
    first = weight_store.digest(params | {'small': small()})
    assert weight_store.digest({'small': small(), **params}) == first
    moved = small().replace(scale=small().scale * 2)
    others = [params | {'small': moved}, params | {'tiny': small()}, params, params | {'small': small().values}]
    assert len({first, *map(weight_store.digest, others)}) == 5
    flat = {'x': np.arange(6)}, {'x': np.arange(6).reshape(2, 3)}, {'x': np.arange(6).astype('float64')}
    assert len(set(map(weight_store.digest, flat))) == 3


def test_a_missing_or_damaged_file_is_named(tmp_path, params):
    digest = weight_store.save(tmp_path, params)
    with pytest.raises(UserError, match=r'ffff\.safetensors are missing'):
        weight_store.load(tmp_path, 'ffff')
    path = tmp_path / f'{digest}.safetensors'
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf'{digest}\.safetensors are damaged'):
        weight_store.load(tmp_path, digest)
    assert weight_store.save(tmp_path, params) == digest  # writing it again heals it
    weight_store.load(tmp_path, digest)


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, params, monkeypatch):
    def fail(path, tensors, dtype):
        path.write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(weight_store.safetensors_writer, 'write', fail)
    with pytest.raises(UserError, match='disk full'):
        weight_store.save(tmp_path, params)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_keeps_the_bytes_that_its_name_is_of(tmp_path, params):
    """Another version, or another library, may have written the file in another way."""
    other = tmp_path / 'theirs'
    other.mkdir()
    save_file({'scale': np.float32([1, 2])}, other / 'x', metadata={'written': 'otherwise'})
    digest = sha256(other / 'x')
    (other / 'x').rename(other / f'{digest}.safetensors')
    weight_store.copy(other, tmp_path / 'ours', digest)
    assert [path.name for path in (tmp_path / 'ours').iterdir()] == [f'{digest}.safetensors']
    np.testing.assert_array_equal(weight_store.load(tmp_path / 'ours', digest)['scale'], [1, 2])
    (other / f'{digest}.safetensors').write_bytes(b'')
    weight_store.copy(other, tmp_path / 'ours', digest)  # it is there
    with pytest.raises(UserError, match='damaged'):
        weight_store.copy(other, tmp_path / 'third', digest)
