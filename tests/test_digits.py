"""The second modality, end to end: digits as ragged feature arrays through the four recipes, a few steps each."""

import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments.datasets.digits import make
from qformer_jax import cli
from qformer_jax.data.dataset import Dataset
from qformer_jax.evaluation import task

STARTS = {
    'language': (),
    'stage1': (),
    'stage2': ('--start.checkpoint', 'stage1', '--start.lm', 'language'),
    'instruct': ('--start.checkpoint', 'stage2'),
}
PARTS = {'language': ('lm',), 'stage1': ('qformer',), 'stage2': ('qformer', 'lm'), 'instruct': ('qformer', 'lm')}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp('digits') / 'source'
    make.make(out)
    return out


def test_steps_are_columns_with_their_place():
    picture = np.zeros((8, 8))
    picture[0, 3] = picture[4, 1] = 0.5
    found = make.steps(picture)
    np.testing.assert_array_equal(found[:, :8], [picture[:, 1], picture[:, 3]])
    np.testing.assert_array_equal(found[:, 8:], np.eye(8)[[1, 3]])


def test_lines_say_the_digit(source):
    lines = [json.loads(line) for line in (source / 'test' / 'captions.jsonl').read_text().splitlines()]
    digit = load_digits().target[make.TRAIN]
    assert lines[0]['caption'] == f'a handwritten {make.NAMES[digit]}'
    assert lines[0]['questions'][0]['answers'] == [make.NAMES[digit]]
    assert lines[0]['questions'][1]['answers'] == ['yes' if digit in (0, 2, 4, 6, 8) else 'no']
    assert len(lines) == 397


def test_the_line_from_arrays_to_answers(source, monkeypatch, capsys):
    root = source.parent
    monkeypatch.chdir(root)
    cli.run(['data', 'pack', 'features', 'data', '--path', 'source'])
    assert Dataset.open('data').feature_shape == (8, 16)
    rows = Dataset.open('data').source('train').counts[:, 2]
    assert rows.min() < rows.max() == 8, 'arrays are ragged'
    small = ('--data.path', 'data', '--optimizer.warmup-steps', 2, '--training.steps', 4, '--training.batch-size', 16)
    less = ('--training.validation-batches', 1, '--training.checkpoint-every', 4)
    for stage, starts in STARTS.items():
        flat = [word for part in PARTS[stage] for word in (f'--model.{part}.depth', 1)]
        cli.run([str(word) for word in ('train', f'digits_{stage}', '--run', stage, *small, *less, *flat, *starts)])
    found = task.evaluate(root / 'stage1', 'retrieval', 'test[:40]')
    assert found['number of captions'] == 10
    answered = task.evaluate(root / 'instruct', 'vqa', 'test[:40]')
    assert answered['number of questions'] == 80
    capsys.readouterr()
    cli.run(['ask', 'instruct', str(source / 'test' / f'{make.TRAIN}.npy'), 'which digit is this?'])
    assert len(capsys.readouterr().out.splitlines()) == 1
