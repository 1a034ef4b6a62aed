"""Runs and data sets of earlier versions: they load, resume and evaluate as they did when they were made.

`old_runs/COMMIT.tar.xz` holds what the code of that commit wrote (packed pictures, the same encoded, a finished run of
every stage, and one that was stopped after step 20 of 60), `COMMIT.json` what that code said of them.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from qformer_jax import config
from qformer_jax.data.dataset import Dataset
from qformer_jax.evaluation.task import evaluate
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.runs import run_dir
from qformer_jax.training import logs, loop

OLD = Path(__file__).parent / 'old_runs'
VERSIONS = sorted(path.name.removesuffix('.tar.xz') for path in OLD.glob('*.tar.xz'))
TASKS = {'stage1': 'retrieval', 'stage2': 'caption', 'instruct': 'vqa'}


@pytest.fixture(scope='module', params=VERSIONS)
def old(request, tmp_path_factory) -> tuple[Path, dict]:
    """The folder that an earlier version left, and what that version said of it."""
    folder = tmp_path_factory.mktemp(request.param)
    with tarfile.open(OLD / f'{request.param}.tar.xz') as archive:
        archive.extractall(folder, filter='data')
    return folder, json.loads((OLD / f'{request.param}.json').read_text())


@pytest.fixture(autouse=True)
def inside(old, monkeypatch):
    """Paths in these runs begin where they were made."""
    monkeypatch.chdir(old[0])


@pytest.mark.parametrize('stage', ['vision', 'language', 'stage1', 'stage2', 'instruct', 'half'])
def test_fingerprints_stay(old, stage):
    """The one that is stored, and the one that this version computes."""
    identity = run_dir.read_identity(Path('line') / stage)
    run = config.from_tree(identity.config, stage)
    assert identity.fingerprint == old[1]['fingerprints'][stage] == run_dir.fingerprint(run, identity.inputs)


@pytest.mark.parametrize('name', ['pictures', 'features'])
def test_a_data_set_reads(old, name):
    dataset = Dataset.open(name)
    assert dataset.fingerprint == old[1]['data'][name]
    assert [len(list(dataset.source(split))) for split in dataset.splits] == [8, 24]


@pytest.mark.parametrize('stage', TASKS)
def test_a_finished_run_evaluates(old, stage):
    numbers = evaluate(Path('line') / stage, TASKS[stage], 'test')
    assert numbers == pytest.approx(old[1]['numbers'][stage], abs=1e-5)


def test_a_finished_run_answers_and_ranks(old):
    records, model = list(Dataset.open('pictures').source('test')), Blip2.load('line/instruct')
    pictures, questions = [r.image for r in records], [r.questions[0] for r in records]
    assert model.ask(pictures, questions) == old[1]['answers']
    scores = model.rank(pictures, questions, ['red', 'blue', 'green', 'yellow'])
    np.testing.assert_allclose(scores, old[1]['log p'], atol=1e-5)


def test_a_half_done_run_resumes(old, capsys):
    """It goes on after its checkpoint, and its losses are those of a run that was never stopped.

    Up to rounding, which grows over 40 steps: the tests compile without the compiler's slowest passes.
    """
    identity = run_dir.read_identity(Path('line/half'))
    loop.train(config.from_tree(identity.config, 'half'), Path('line/half'))
    assert 'resumed from the checkpoint of step 20' in capsys.readouterr().err
    found = [{k: v for k, v in r.items() if k != 'timing'} for r in logs.records(Path('line/half')) if r['step'] > 20]
    for record, known in zip(found, old[1]['log of half, after step 20'], strict=True):
        assert (record.pop('step'), record.pop('kind')) == (known.pop('step'), known.pop('kind'))
        assert record == pytest.approx(known, rel=1e-4, abs=1e-5)
