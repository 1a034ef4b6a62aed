"""Features that lie on the device train as features that are sent: to the bit, for one data set and for several."""

import dataclasses
import shutil

import numpy as np
import pytest
import small

from qformer_jax import cli, config
from qformer_jax.data import pipeline
from qformer_jax.data.dataset import Dataset
from qformer_jax.training import device_features, init_params, language_model, loop
from qformer_jax.training.stages import STAGES


@pytest.fixture(scope='module')
def second(arrays, tmp_path_factory):
    """Another data set of arrays with the tokenizers of the first."""
    folder = tmp_path_factory.mktemp('second')
    source = small.write_arrays(folder / 'source')
    tokenizers = ['--text-tokenizer', str(arrays / 'wordpiece.json'), '--lm-tokenizer', str(arrays / 'byte_bpe.json')]
    cli.run(['data', 'pack', 'features', str(folder / 'data'), '--path', str(source), *tokenizers])
    return folder / 'data'


def tiny(arrays, second) -> config.Run:
    run = small.without_tower(small.recipe('stage2', arrays, steps=4))
    run = small.change(run, 'optimizer', warmup_steps=1)
    return small.change(run, 'data', mixed_with=(str(second),), train_split='train[25%:]')


def test_a_run_is_the_same_to_the_bit(arrays, second, tmp_path, monkeypatch):
    run = tiny(arrays, second)
    on_device = loop.train(run, tmp_path / 'near')
    monkeypatch.setattr(device_features, 'fits', lambda *_: False)
    sent = loop.train(run, tmp_path / 'sent')
    assert on_device.last == sent.last and on_device.fingerprint == sent.fingerprint


def test_rows_name_what_they_leave_out(arrays, second):
    """The features at `image_id` are those of the record, in whichever of the data sets it lies."""
    run = tiny(arrays, second)
    dataset = language_model.open_dataset(run)
    run = init_params.complete(run, dataset)
    with loop.jax.set_mesh(mesh := loop.data_mesh()):
        on_device = device_features.load(run, dataset, mesh)
    assert on_device.features.shape == (36, 4, 6) and on_device.mask.sum(axis=1).min() == 2
    given = run, STAGES[run.stage].row_format, dataset, run.data.train_split
    both = [pipeline.batches(*given, training=True, features=f) for f in (False, True)]
    ids = set()
    for _ in range(6):
        without, whole = (next(batches) for batches in both)
        assert whole.keys() - without.keys() == {'features', 'feature_mask'}
        joined = on_device.join(without)
        assert joined.keys() == whole.keys()
        for name in whole:
            np.testing.assert_array_equal(joined[name], whole[name])
        ids |= set(whole['image_id'].tolist())
    assert min(ids) < 18 <= max(ids)


def test_the_next_run_finds_them_there_unless_the_records_changed(arrays, second, tmp_path):
    folder, source = tmp_path / 'data', small.write_arrays(tmp_path / 'source')
    shutil.copytree(second, folder)
    run = small.change(tiny(arrays, second), 'data', path=str(folder), mixed_with=())

    def load() -> device_features.DeviceFeatures:
        dataset = language_model.open_dataset(run)
        with loop.jax.set_mesh(mesh := loop.data_mesh()):
            return device_features.load(init_params.complete(run, dataset), dataset, mesh)

    first = load()
    assert load() is first
    shutil.rmtree(folder)
    np.save(source / 'train' / '20.npy', np.full((2, 6), 7.0, np.float32))
    tokenizers = ['--text-tokenizer', str(second / 'wordpiece.json'), '--lm-tokenizer', str(second / 'byte_bpe.json')]
    cli.run(['data', 'pack', 'features', str(folder), '--path', str(source), *tokenizers])
    assert (load().features == 7).any() and not (first.features == 7).any()


def test_what_does_not_fit_is_sent(arrays, monkeypatch):
    run = dataclasses.replace(small.without_tower(small.recipe('stage1', arrays)))
    dataset = Dataset.open(arrays)
    run = init_params.complete(run, dataset)
    size = 24 * 4 * 6 * 4  # records, rows, columns, bytes
    for memory, expected in ((4 * size, True), (4 * size - 4, False)):
        monkeypatch.setattr(device_features, '_memory', lambda memory=memory: memory)
        assert device_features.fits(run, dataset) == expected
    assert not device_features.fits(dataclasses.replace(run, stage='language'), dataset)
