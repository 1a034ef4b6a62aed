"""Training from a frozen tower's features: the same numbers as from pictures, and only from the tower's own."""

import dataclasses
import functools
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
import small

from qformer_jax import cli, config
from qformer_jax.data import pipeline
from qformer_jax.data.dataset import Dataset
from qformer_jax.data.encoder import Encoder
from qformer_jax.errors import UserError
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.runs import run_dir
from qformer_jax.training import init_params, logs, loop
from qformer_jax.training.stages import STAGES

STEPS = 3


@pytest.fixture(scope='module')
def features(line, pictures, tmp_path_factory):
    """The data set of pictures, encoded by the tower that was pretrained on it."""
    out = tmp_path_factory.mktemp('encoded') / 'features'
    cli.run(['data', 'encode', str(pictures), str(out), '--vit', str(line / 'vision'), '--batch-size', '8'])
    return out


def stage(name: str, data, line, **begin) -> config.Run:
    run = small.change(small.recipe(name, data, steps=STEPS), 'optimizer', warmup_steps=1)
    return dataclasses.replace(run, start=config.Start(**{part: str(line / run) for part, run in begin.items()}))


def losses(folder) -> list[float]:
    return [record['loss'] for record in logs.records(folder) if record['kind'] == 'train']


BEGINNINGS = {
    'stage1': {'vit': 'vision'},
    'stage2': {'checkpoint': 'stage1', 'lm': 'language'},
    'instruct': {'checkpoint': 'stage2'},
}


@pytest.fixture(scope='module')
def train(line, tmp_path_factory):
    """A function that trains a stage on a data set, once."""
    runs = tmp_path_factory.mktemp('runs')

    @functools.cache
    def train(name: str, data):
        return loop.train(stage(name, data, line, **BEGINNINGS[name]), runs / name / data.name)

    return train


@pytest.mark.parametrize('name', ['stage1', 'instruct'])
def test_training_from_features_is_training_from_pictures(name, line, pictures, features, train):
    """Step by step, and the finished run refers to the same tower."""
    runs = [train(name, data) for data in (pictures, features)]
    expected, found = (losses(run.folder) for run in runs)
    assert len(found) == STEPS and expected[0] != expected[-1]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert runs[1].last['vit'] == runs[0].last['vit'] == run_dir.finished(line / 'vision').last['vit']
    assert runs[1].last.keys() == runs[0].last.keys()


@pytest.mark.parametrize('name', BEGINNINGS)
def test_rows_differ_in_the_picture_only(name, line, pictures, features):
    batches = []
    for data in (pictures, features):
        dataset = Dataset.open(data)
        run = init_params.complete(stage(name, data, line, **BEGINNINGS[name]), dataset)
        batches.append(next(pipeline.batches(run, STAGES[run.stage].row_format, dataset, 'train', training=True)))
    image, tower_features = batches[0].pop('image'), batches[1].pop('features')
    assert image.shape == (8, 16, 16, 3) and tower_features.shape == (8, 5, 16) and batches[1].pop('feature_mask').all()
    jax.tree.map(np.testing.assert_array_equal, *batches)


def test_features_are_what_the_tower_sees(line, pictures, features):
    records, encoded = (Dataset.open(path).source('test') for path in (pictures, features))
    image_features = Blip2.load(line / 'stage1', batch_size=8).encode_images([records[i].image for i in range(8)])
    for number in range(8):
        np.testing.assert_array_equal(encoded[number].features, image_features.features[number])
        assert encoded[number].image is None
        assert dataclasses.replace(encoded[number], features=None, image=records[number].image) == records[number]
    assert Dataset.open(features).splits == Dataset.open(pictures).splits == ('test', 'train')
    tokenizers = [(path / 'wordpiece.json').read_bytes() for path in (pictures, features)]
    assert tokenizers[0] == tokenizers[1]


def test_a_run_from_features_takes_pictures_and_features(train, pictures, features):
    model = Blip2.load(train('stage1', features).folder, batch_size=8)
    records, encoded = (list(itertools.islice(Dataset.open(path).source('test'), 3)) for path in (pictures, features))
    image_features, given = (
        model.encode_images([r.image for r in records]),
        model.encode_images([r.features for r in encoded]),
    )
    np.testing.assert_allclose(model.features(given), model.features(image_features), atol=1e-5)
    with pytest.raises(UserError, match='pictures and feature arrays do not go through together'):
        model.encode_images([records[0].image, encoded[0].features])


def test_the_command_says_how_to_go_on(line, pictures, tmp_path, capsys):
    out = tmp_path / 'features'
    cli.run(['data', 'encode', str(pictures), str(out), '--vit', str(line / 'stage1')])
    said = capsys.readouterr().out
    assert f'wrote {out}: test 8 records, train 24 records' in said
    assert f'--data.path {out} --start.vit {line / "stage1"} --data.crop-scale 1 1 --data.no-flip' in said
    tower = Encoder.load(out)
    assert tower.weights == run_dir.finished(line / 'vision').last['vit'] and tower.dtype == 'float32'


def with_another_tower(run, folder):
    """Return a copy of a finished run, as far as it is read before training, that names other weights."""
    folder.mkdir()
    shutil.copy(run / 'run.json', folder)
    run_dir.write_finished(folder, run_dir.finished(run).last | {'vit': '0' * 64}, {}, None, [])
    return folder


def test_another_tower_is_refused_before_training(line, features, tmp_path):
    other = with_another_tower(line / 'vision', tmp_path / 'other')
    run = dataclasses.replace(stage('stage1', features, line), start=config.Start(vit=str(other)))
    words = rf"was encoded by the tower in '{line}/vision' \(\w{{12}}\), not by this run's \(0{{12}}\)"
    for wrong in (run, small.without_tower(run)):  # the second would not even load it
        with pytest.raises(UserError, match=words):
            loop.train(wrong, tmp_path / 'run')
    with pytest.raises(UserError, match=f'features of the tower in .*: give --start.vit {line}/vision'):
        loop.train(stage('stage1', features, line), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_tower_of_other_sizes_is_refused_and_how_it_began_is_not_a_size(features):
    encoder = Encoder.load(features)
    encoder.check(features, encoder.weights, dataclasses.replace(encoder.vit, positions='waves'))
    with pytest.raises(UserError, match=r'of other sizes: model\.vit\.depth'):
        encoder.check(features, encoder.weights, dataclasses.replace(encoder.vit, depth=encoder.vit.depth + 1))


def test_evaluation_refuses_another_towers_features(line, features, tmp_path):
    other = with_another_tower(line / 'stage1', tmp_path / 'other')
    with pytest.raises(UserError, match='was encoded by the tower'):
        cli.run(['evaluate', str(other), '--task', 'retrieval', '--data', str(features)])


def test_what_features_cannot_give_is_refused(line, features, tmp_path):
    run = stage('stage1', features, line, vit='vision')
    refused = {
        'neither cropped nor mirrored': small.change(run, 'data', flip=True),
        'whole pictures': small.change(run, 'data', crop_scale=(0.5, 1.0)),
        'rate-rules train it': small.change(run, 'optimizer', rate_rules=(('.*', 1.0),)),
        'norm_eps 1e-06 there, 0.01 here': small.change(
            run, 'model', vit=dataclasses.replace(run.model.vit, norm_eps=0.01)
        ),
    }
    for words, wrong in refused.items():
        with pytest.raises(UserError, match=words):
            loop.train(wrong, tmp_path / 'run')


def test_only_pictures_and_only_towers_encode(line, pictures, features, arrays, tmp_path):
    for data, run, words in (
        (features, 'vision', 'holds feature arrays, not pictures'),
        (pictures, 'language', 'has no vision tower'),
        (pictures, 'nowhere', 'no run at'),
    ):
        with pytest.raises(UserError, match=words):
            cli.run(['data', 'encode', str(data), str(tmp_path / 'out'), '--vit', str(line / run)])
    run = dataclasses.replace(stage('stage1', arrays, line), start=config.Start(vit=str(line / 'vision')))
    with pytest.raises(UserError, match='holds feature arrays, and the run a vision tower'):
        loop.train(run, tmp_path / 'run')


def test_a_data_set_without_pictures_of_this_reading_is_refused(features, monkeypatch):
    tree = json.loads((features / 'encoder.json').read_text())
    other = dataclasses.replace(Encoder.load(features), read='cut from the middle')
    with pytest.raises(UserError, match="read as 'cut from the middle'"):
        other.check(features, tree['weights'], other.vit)
