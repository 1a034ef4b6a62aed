"""Checkpoints survive what happens to disks and processes: kills, damage, a full disk, another mesh."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qformer_jax.errors import UserError
from qformer_jax.training import checkpoint
from qformer_jax.training.checkpoint import Checkpoints


def make_state(step, size=7):
    """Return a training state in which every leaf depends on the step."""
    draw = np.random.default_rng(step)
    params = {'kernel': jnp.asarray(draw.normal(size=(8, size)), 'float32'), 'half': jnp.full(3, step, jnp.bfloat16)}
    return {
        'params': params,
        'opt': jax.tree.map(lambda x: x + step, optax.adamw(1e-3).init(params)),
        'step': jnp.int32(step),
        'key': jax.random.key(step),
    }


def make_iterator(step=0):
    """Return a shuffled data iterator that has given `step` batches."""
    iterator = iter(grain.MapDataset.range(40).shuffle(seed=3).repeat().batch(4).to_iter_dataset())
    for _ in range(step):
        next(iterator)
    return iterator


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(state, expected):
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(data(a), data(b), strict=True), state, expected)


def save(checkpoints, step, loss=None):
    checkpoints.save(step, make_state(step), make_iterator(step), {'validation_loss': loss, 'fingerprint': 'abc'})
    checkpoints.wait()


def assert_restores(checkpoints, step, size=7):
    """Restore, and check that it is `step` with its state and its place in the data."""
    iterator = make_iterator()
    state, found, info = checkpoints.restore(abstract(make_state(0, size)), iterator)
    assert found == step
    assert info['fingerprint'] == 'abc'
    assert_equal(state, make_state(step, size))
    np.testing.assert_array_equal(next(iterator), next(make_iterator(step)))


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / 'checkpoints')
    yield opened
    opened.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Return a folder with checkpoints 1 (the best), 2 and 3; tests work on copies."""
    folder = tmp_path_factory.mktemp('saved') / 'checkpoints'
    opened = Checkpoints(folder)
    for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0)):
        save(opened, step, loss)
    opened.close()
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / 'copied')
    opened = Checkpoints(tmp_path / 'copied')
    yield tmp_path / 'copied', opened
    opened.close()


def steps_on_disk(folder):
    folders = {int(path.name) for path in folder.iterdir() if path.is_dir()}
    assert {int(path.stem) for path in folder.glob('*.json')} == folders
    return folders


def test_nothing_saved_is_none(checkpoints):
    assert checkpoints.restore(abstract(make_state(0)), make_iterator()) is None
    assert checkpoints.best(abstract(make_state(0)), held=0) is None


def test_state_data_place_and_info_come_back(copied, capfd):
    assert_restores(copied[1], 3)
    assert capfd.readouterr().err == ''


def test_the_newest_two_and_the_best_are_kept(checkpoints, tmp_path):
    for step, loss in ((1, 5.0), (2, 1.0), (3, None), (4, math.nan), (5, 2.0)):
        save(checkpoints, step, loss)
    assert steps_on_disk(tmp_path / 'checkpoints') == {2, 4, 5}
    state, step = checkpoints.best(abstract(make_state(0)), held=0)
    assert step == 2
    assert_equal(state, make_state(2))
    assert checkpoints.best(abstract(make_state(0)), held=2) is None
    save(checkpoints, 6, 0.5)
    assert steps_on_disk(tmp_path / 'checkpoints') == {5, 6}


def test_without_validation_losses_there_is_no_best(checkpoints):
    save(checkpoints, 1, None)
    assert checkpoints.best(abstract(make_state(0)), held=0) is None


def test_a_state_of_other_arrays_is_named_and_stays(checkpoints, tmp_path):
    save(checkpoints, 1)
    other = abstract({'state': make_state(0), 'rates': jax.numpy.zeros(3)})
    with pytest.raises(UserError, match=r'/1: the state of another version .*do not match.*; finish the run with that'):
        checkpoints.restore(other, make_iterator())
    assert steps_on_disk(tmp_path / 'checkpoints') == {1}


def test_saving_a_step_again_replaces_it(checkpoints):
    save(checkpoints, 2)
    checkpoints.save(2, make_state(9), make_iterator(9), {})
    state, step, info = checkpoints.restore(abstract(make_state(0)), make_iterator())
    assert (step, info) == (2, {})
    assert_equal(state, make_state(9))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize('harm', [flip, truncate, Path.unlink])
def test_damage_to_any_file_is_found_and_named(copied, harm):
    folder, checkpoints = copied
    files = [path for path in (folder / '3').rglob('*') if path.is_file()]
    assert len(files) > 5
    for path in files if harm is Path.unlink else filter(os.path.getsize, files):
        original = path.read_bytes()
        harm(path)
        assert str(path) in checkpoints._damage(3)
        path.write_bytes(original)
    assert checkpoints._damage(3) == ''


def data_file(folder, step):
    return max((folder / str(step)).rglob('d/*'), key=os.path.getsize)


def damage(folder, step, part):
    """Damage a part of a checkpoint and return its path."""
    bad = {'array': data_file(folder, step), 'seal': folder / f'{step}.json', 'folder': folder / str(step)}[part]
    shutil.rmtree(bad) if part == 'folder' else flip(bad)
    return bad


@pytest.mark.parametrize('part', ['array', 'seal', 'folder'])
def test_a_damaged_checkpoint_is_named_deleted_and_the_one_before_used(copied, capsys, part):
    folder, checkpoints = copied
    bad = damage(folder, 3, part)
    assert_restores(checkpoints, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'checkpoint 3 is damaged: {bad}')
    assert line.endswith(': using checkpoint 2 instead')
    assert steps_on_disk(folder) == {1, 2}
    save(checkpoints, 3)
    assert_restores(checkpoints, 3)


def test_a_changed_word_in_the_info_is_damage(copied):
    folder, checkpoints = copied
    seal = json.loads((folder / '3.json').read_text())
    seal['info']['validation_loss'] = 0.1
    (folder / '3.json').write_text(json.dumps(seal))
    assert_restores(checkpoints, 2)


@pytest.mark.parametrize('part', ['array', 'seal'])
def test_a_damaged_best_is_named_and_the_next_best_used(copied, capsys, part):
    folder, checkpoints = copied
    damage(folder, 1, part)
    state, step = checkpoints.best(abstract(make_state(0)), held=0)
    assert step == 3
    assert_equal(state, make_state(3))
    assert 'checkpoint 1 is damaged' in capsys.readouterr().err
    assert steps_on_disk(folder) == {1, 2, 3}  # judging a run changes nothing in it


def test_only_damaged_checkpoints_are_an_error_that_names_them_and_deletes_nothing(copied):
    folder, checkpoints = copied
    for step in (1, 2, 3):
        flip(data_file(folder, step))
    with pytest.raises(UserError, match=r'checkpoint 3 is damaged.*checkpoint 2 is damaged.*checkpoint 1 is damaged'):
        checkpoints.restore(abstract(make_state(0)), make_iterator())
    assert steps_on_disk(folder) == {1, 2, 3}


def test_an_unsealed_checkpoint_is_absent(copied):
    folder, checkpoints = copied
    (folder / '3.json').unlink()
    (folder / '4.orbax-checkpoint-tmp').mkdir()
    assert_restores(checkpoints, 2)
    assert steps_on_disk(folder) == {1, 2}


def test_a_full_disk_is_one_clear_line_and_the_checkpoint_before_stays(checkpoints, tmp_path, monkeypatch):
    save(checkpoints, 1)
    save(checkpoints, 2)

    def fail(path):
        raise ValueError(f'RESOURCE_EXHAUSTED: Failed writing {path}: No space left on device')

    monkeypatch.setattr(checkpoint, 'sha256', fail)
    checkpoints.save(2, make_state(2), make_iterator(2), {})
    with pytest.raises(UserError, match='disk full'):
        for _ in range(1000):
            checkpoints.poll()
            time.sleep(0.01)
    monkeypatch.undo()
    assert steps_on_disk(tmp_path / 'checkpoints') == {1}
    assert_restores(checkpoints, 1)


def start(code, *arguments):
    """Start Python on `code` with this file's helpers in scope."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get('PYTHONPATH', '')])
    code = f'import sys\nfrom pathlib import Path\nfrom test_checkpoint import *\n{code}'
    command = [sys.executable, '-c', code, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {'PYTHONPATH': paths}, stdout=subprocess.PIPE, text=True)


SAVE_FOR_EVER = """
import os, signal
from qformer_jax.training import checkpoint

def kill_at(owner, name, part):
    function = getattr(owner, name)
    def killing(path, *rest):
        if part in Path(path).parts:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(path, *rest)
    setattr(owner, name, killing)

kill_at(*{
    'writing': (checkpoint, 'sha256', 'never'),
    'sealing': (os, 'replace', '3.json.tmp'),
    'deleting': (shutil, 'rmtree', '1'),
}[sys.argv[2]])
checkpoints = Checkpoints(Path(sys.argv[1]))
for step in range(1, 10**6):
    checkpoints.save(step, make_state(step, 50_000), make_iterator(step), {'fingerprint': 'abc'})
    print(step, flush=True)
"""


@pytest.mark.parametrize('moment', ['writing', 'sealing', 'deleting'])
def test_a_killed_process_leaves_a_sealed_state_to_the_bit(tmp_path, moment):
    with start(SAVE_FOR_EVER, tmp_path, moment) as child:
        lines = []
        if moment == 'writing':
            lines = [child.stdout.readline() for _ in range(3)]
            child.kill()
        reached = int([*lines, *child.stdout][-1])
    assert child.returncode == -signal.SIGKILL
    opened = Checkpoints(tmp_path)
    # Saving step 3 starts once 2 is sealed, and 1 is deleted, its seal first, once 3 is sealed.
    expected = {'sealing': [{1, 2}], 'deleting': [{2, 3}]}
    sealed = set(opened._sealed())
    newest = max(sealed)
    assert sealed in expected.get(moment, [{reached - 2, reached - 1}, {reached - 1, reached}])
    assert_restores(opened, newest, 50_000)
    assert newest in steps_on_disk(tmp_path)
    opened.save(newest + 1, make_state(newest + 1, 50_000), make_iterator(newest + 1), {'fingerprint': 'abc'})
    assert_restores(opened, newest + 1, 50_000)
    opened.close()


def test_restores_onto_eight_devices_and_back(copied):
    folder, checkpoints = copied
    mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))
    place = lambda x: NamedSharding(mesh, PartitionSpec('fsdp') if x.ndim == 2 else PartitionSpec())  # noqa: E731
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), make_state(0))
    with contextlib.closing(Checkpoints(folder)) as others:
        state, step, info = others.restore(target, make_iterator())
        assert_equal(state, make_state(3))
        assert state['params']['kernel'].sharding.is_equivalent_to(place(state['params']['kernel']), 2)
        assert len(state['opt'][0].mu['kernel'].addressable_shards) == 8
        assert state['opt'][0].mu['kernel'].addressable_shards[5].data.shape == (1, 7)
        others.save(4, state, make_iterator(3), info)
    state, step, _ = checkpoints.restore(abstract(make_state(0)), make_iterator())
    assert step == 4
    assert_equal(state, make_state(3))
