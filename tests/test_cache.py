"""Arrays by what they depend on: computed once, and again only when they are gone or damaged."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from qformer_jax.data.cache import Cache, key_of
from qformer_jax.errors import UserError

KEYS = [key_of({'picture': n}) for n in range(4)]


def array(n: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(2 + n, 3)).astype(dtype)


class Counted:
    """Computes arrays and remembers which it was asked for."""

    def __init__(self):
        self.requested = []

    def __call__(self, positions):
        self.requested += positions
        return (array(n) for n in positions)


def fetched(cache: Cache, keys=KEYS) -> list[int]:
    """Return the positions that had to be computed, after checking what came."""
    count = Counted()
    for n, found in enumerate(cache.fetch(keys, count)):
        np.testing.assert_array_equal(found, array(n), strict=True)
    return count.requested


def flip(file, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(bytes(data))


def test_a_second_reading_computes_nothing(tmp_path):
    assert fetched(Cache(tmp_path / 'new' / 'cache')) == [0, 1, 2, 3]
    assert fetched(Cache(tmp_path / 'new' / 'cache')) == []
    assert list((tmp_path / 'new' / 'cache').glob('.*')) == []


def test_only_what_is_missing_is_computed(tmp_path):
    assert fetched(Cache(tmp_path), KEYS[:2]) == [0, 1]
    cache = Cache(tmp_path)
    assert KEYS[1] in cache and KEYS[2] not in cache
    assert fetched(cache) == [2, 3]
    assert fetched(cache) == fetched(Cache(tmp_path)) == []


def test_equal_keys_are_computed_once(tmp_path):
    count = Counted()
    same = [KEYS[1], KEYS[0], KEYS[1]]
    first, _, last = Cache(tmp_path).fetch(same, count)
    assert count.requested == [0, 1]
    np.testing.assert_array_equal(first, last)


@pytest.mark.parametrize('dtype', [np.float16, np.float32, ml_dtypes.bfloat16])
def test_bits_and_dtype_come_back(tmp_path, dtype):
    Cache(tmp_path).fetch(KEYS[:1], lambda _: [array(0, dtype)])
    (found,) = Cache(tmp_path).fetch(KEYS[:1], lambda _: pytest.fail('computed again'))
    assert found.dtype == dtype and found.tobytes() == array(0, dtype).tobytes()


def test_every_flipped_byte_of_an_entry_is_noticed(tmp_path, capsys):
    """The file is removed aloud, what it held computed again, and the next reading is a good one."""
    fetched(Cache(tmp_path))
    (file,) = tmp_path.glob('*')
    content = file.read_bytes()
    place = content.index(array(1).tobytes())
    for byte in (place, place + 11, place - 4, place - 60):  # values, shape, key or digest
        flip(file, byte)
        capsys.readouterr()
        assert fetched(Cache(tmp_path)) == [0, 1, 2, 3]
        assert f'{file}: damaged' in capsys.readouterr().err
        assert fetched(Cache(tmp_path)) == [] and capsys.readouterr().err == ''


def test_a_cut_or_foreign_file_is_noticed(tmp_path, capsys):
    fetched(Cache(tmp_path), KEYS[:1])
    (file,) = tmp_path.glob('*')
    file.write_bytes(file.read_bytes()[:30_000])
    (tmp_path / '0123456789abcdef.array_record').write_bytes(b'something else')
    assert fetched(Cache(tmp_path)) == [0, 1, 2, 3]
    said = capsys.readouterr().err
    assert f'{file}: damaged' in said and '0123456789abcdef.array_record: damaged' in said


def test_a_file_that_no_cache_wrote_stays(tmp_path, capsys):
    """The folder may hold a packed data set: nothing of it is lost."""
    foreign = tmp_path / 'train.array_record'
    foreign.write_bytes(b'a data set')
    assert fetched(Cache(tmp_path)) == [0, 1, 2, 3]
    assert capsys.readouterr().err == f'{foreign}: not of this cache; left as it is\n'
    assert foreign.read_bytes() == b'a data set' and fetched(Cache(tmp_path)) == []


def test_an_entry_under_another_key_is_noticed(tmp_path, monkeypatch, capsys):
    """Two intact files whose keys were exchanged: every checksum of the format holds."""
    cache = Cache(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr('qformer_jax.data.cache._sealed', swapped(cache))
        cache.fetch(KEYS[:2], lambda _: [array(0), array(1)])
    assert fetched(Cache(tmp_path)) == [0, 1, 2, 3]
    assert 'damaged' in capsys.readouterr().err


def swapped(cache):
    from qformer_jax.data import cache as module

    seal, other = module._sealed, dict(itertools.permutations(KEYS[:2]))
    return lambda key, value: seal(other[key], value)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / 'cache').write_text('')
    with pytest.raises(UserError, match=r"cache' is a file: name a folder"):
        Cache(tmp_path / 'cache')


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r"nothing can be kept in '.*file/cache': not a directory"):
        fetched(Cache(tmp_path / 'file' / 'cache'))


def test_a_file_that_vanishes_is_computed_again(tmp_path):
    cache = Cache(tmp_path)
    fetched(cache)
    for file in tmp_path.glob('*'):
        file.unlink()
    assert fetched(cache) == [0, 1, 2, 3]


def test_a_failure_leaves_nothing(tmp_path):
    def fail(_):
        yield array(0)
        raise ValueError('no second one')

    with pytest.raises(ValueError, match='no second one'):
        Cache(tmp_path).fetch(KEYS[:2], fail)
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_all_that_it_depends_on():
    depends = {'picture': 'ab', 'dtype': 'float32', 'weights': {'vit': 'cd'}}
    assert key_of(depends) == key_of(dict(reversed(depends.items())))
    others = [depends | {'dtype': 'bfloat16'}, depends | {'weights': {'vit': 'ce'}}, depends | {'text': 'a cat'}]
    assert len({key_of(d) for d in [depends, *others]}) == 4
