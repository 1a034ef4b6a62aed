"""The folder of a run: what was changed or damaged in it is named, in one line, and nothing in it is run."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import small

from qformer_jax import cli, config, lock
from qformer_jax.errors import UserError
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.rules import flatten
from qformer_jax.runs import run_dir
from qformer_jax.training import loop


def brief(stage: str, data, steps: int = 1) -> config.Run:
    """Return a tiny run of a step or two, without warm-up."""
    return small.change(small.recipe(stage, data, steps=steps), 'optimizer', warmup_steps=0)


@pytest.fixture
def copied(line, tmp_path):
    """A copy of the instruct run with the store beside it."""
    shutil.copytree(line / 'weights', tmp_path / 'weights')
    return shutil.copytree(line / 'instruct', tmp_path / 'instruct')


def change(file, path: tuple, value) -> None:
    """Change one value of a JSON file; None removes its key."""
    tree = json.loads(file.read_text())
    part = tree
    for key in path[:-1]:
        part = part[key]
    part.pop(path[-1]) if value is None else part.update({path[-1]: value})
    file.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    'path, value, says',
    [
        (('config', 'model', 'qformer', 'depth'), 1, r'run.json: its configuration or inputs were changed'),
        (('config', 'model', 'qformer', 'heads'), 4, r'run.json: its configuration or inputs were changed'),
        (('config', 'model', 'vit', 'norm_eps'), 1e-3, r'run.json: its configuration or inputs were changed'),
        (('inputs', 'data'), 'abc', r'run.json: its configuration or inputs were changed'),
        (('fingerprint',), '0' * 12, r"run.json: .* their fingerprint is not '000000000000' any more"),
        (('fingerprint',), 7, r'run.json: Expected `str`, got `int` - at `fingerprint`'),
        (('inputs',), None, r'run.json: Object missing required field `inputs`'),
        (('colour',), 'red', r"run.json: unknown key 'colour'.*known are fingerprint, config, inputs"),
        (('config',), [], r'run.json: Expected `object`, got `array` - at `config`'),
    ],
)
def test_a_changed_run_json_is_refused(copied, path, value, says):
    change(copied / 'run.json', path, value)
    with pytest.raises(UserError, match=says):
        Blip2.load(copied)


@pytest.mark.parametrize(
    'field, value, says',
    [
        (('model', 'qformer', 'depth'), '2', r'model.qformer: Expected `int`, got `str` - at `depth`'),
        (('model', 'qformer', 'dept'), 2, r"model.qformer has an unknown field 'dept' \(nearest: 'depth'\)"),
        (('model', 'lm', 'family'), 'optt', r"model.lm.family is 'optt'; known are opt, llama, t5"),
        (('model', 'word_head'), 'x', r"model.word_head is 'x'; expected int"),
        (('model', 'vit'), 3, r'model.vit is int; expected an object'),
        (('stage',), 'stage9', r"Invalid enum value 'stage9'"),
        (('data', 'crop_scale'), [1.0], r'data: Expected `array` of length 2, got 1 - at `crop_scale`'),
        (('training',), None, r"'training' is missing"),
        (('trainign',), {}, r"'trainign' is unknown \(nearest: 'training'\)"),
        (('model', 'connector'), {'kind': 'mlp', 'module': 'os'}, r"unknown field 'module'"),
    ],
)
def test_a_configuration_of_another_shape_is_refused(line, field, value, says):
    tree = run_dir.read_identity(line / 'instruct').config
    part = tree
    for key in field[:-1]:
        part = part[key]
    part.pop(field[-1]) if value is None else part.update({field[-1]: value})
    with pytest.raises(UserError, match=f'run.json: .*{says}|run.json: {says}'):
        config.from_tree(tree, 'run.json')


@pytest.mark.parametrize(
    'name, damage, says',
    [
        ('run.json', b'', 'run.json: not JSON'),
        ('run.json', b'\xff\xfe', r'run.json: not UTF-8 text \(byte 0\)'),
        ('run.json', b'null', 'run.json: Expected `object`, got `null`'),
        ('run.json', b'[' * 10**5 + b']' * 10**5, 'run.json: nested deeper'),
        ('finished.json', b'{"last": {}', r'finished.json: not JSON .* copy the file again .*or delete it'),
        ('finished.json', b'{"last": {"vit": 3}, "best": {}}', r'finished.json: Expected `str`, got `int`'),
        ('finished.json', b'{"last": {}, "best": {}, "tokenizers": {"a": "b"}}', "finished.json: 'sha256' is missing"),
        ('wordpiece.json', b'{}', r'wordpiece.json is missing or damaged \(its SHA-256 is not'),
    ],
)
def test_a_damaged_file_is_named(copied, name, damage, says):
    (copied / name).write_bytes(damage)
    with pytest.raises(UserError, match=says) as error:
        Blip2.load(copied)
    assert '\n' not in str(error.value)


def test_finished_json_is_held_against_its_own_checksum(copied):
    change(copied / 'finished.json', ('last', 'vit'), '0' * 64)
    with pytest.raises(UserError, match=r'finished.json: does not match its own SHA-256'):
        run_dir.finished(copied)


def test_paths_may_change(copied):
    """Where data and weights lay is no part of what a run is."""
    change(copied / 'run.json', ('config', 'data', 'path'), 'elsewhere')
    change(copied / 'run.json', ('config', 'start', 'checkpoint'), 'moved')
    assert run_dir.finished(copied).run.data.path == 'elsewhere'


def test_weights_of_other_shapes_are_refused(copied):
    """As of a run.json that somebody changed together with its fingerprint."""
    done = run_dir.finished(copied)
    other = dataclasses.replace(done.run.model.qformer, depth=1)
    run_dir.write_identity(copied, small.change(done.run, 'model', qformer=other), done.inputs)
    with pytest.raises(UserError, match=r"another configuration of 'qformer': .*layer_1/.* absent here"):
        Blip2.load(copied)
    run_dir.write_identity(copied, small.change(done.run, 'model', vit=None), done.inputs)
    with pytest.raises(UserError, match=r'finished.json names the components .*vit.*, and the model of run.json has'):
        Blip2.load(copied)


MODULE = "import pathlib\npathlib.Path({marker!r}).write_text('run')\nclass Connector:\n    pass\n"


def of_strange_connector(folder, line):
    """Make a run that names a module of its own, which lies in its folder and would leave a marker."""
    shutil.copytree(line / 'weights', folder / 'weights')
    shutil.copytree(line / 'stage2', folder / 'strange')
    done = run_dir.finished(folder / 'strange')
    run = small.change(
        done.run, 'model', qformer=None, connector=config.ConnectorConfig(kind='marking', feature_width=16)
    )
    run_dir.write_identity(folder / 'strange', run, done.inputs)
    for place in (folder, folder / 'strange'):
        for name in ('marking', 'tyro'):  # one that it names, and one that this package needs
            (place / f'{name}.py').write_text(MODULE.format(marker=str(folder / 'marker')))
    return folder / 'strange'


def test_a_run_runs_no_code_of_its_own(line, tmp_path, monkeypatch, capsys):
    run, picture = of_strange_connector(tmp_path, line), tmp_path / 'picture.png'
    small.draw_picture('red', 'square').save(picture)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"no connector 'marking'.*--connector FILE"):
        Blip2.load(run)
    monkeypatch.setattr(sys, 'argv', ['qformer', 'caption', str(run), str(picture)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: no connector 'marking'")
    words = [sys.executable, '-m', 'qformer_jax', 'caption', 'strange', 'picture.png']
    said = subprocess.run(words, capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.startswith("error: no connector 'marking'")
    assert not (tmp_path / 'marker').exists()


def test_a_data_set_runs_no_code_of_its_own(pictures, tmp_path, monkeypatch):
    """tensorflow_datasets would import the module that features.json names."""
    data = shutil.copytree(pictures, tmp_path / 'data')
    for place in (tmp_path, data):
        (place / 'marking.py').write_text(MODULE.format(marker=str(tmp_path / 'marker')))
    named = json.loads((data / 'features.json').read_text())
    (data / 'features.json').write_text(
        json.dumps(named | {'pythonClassName': 'marking.Connector', 'type': 'marking.X'})
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    loop.train(brief('vision', data), tmp_path / 'run')
    assert not (tmp_path / 'marker').exists() and 'marking' not in sys.modules


def test_another_run_in_the_folder_is_refused_and_restart_replaces_it(pictures, tmp_path):
    run, folder = brief('vision', pictures, steps=2), tmp_path / 'run'
    loop.train(run, folder)
    (folder / 'notes.txt').write_text('mine')
    other = small.change(run, 'training', steps=3)
    with pytest.raises(UserError, match=r'belongs to another run .*training.steps 2 there, 3 here.*--restart run'):
        loop.train(other, folder)
    with pytest.raises(UserError, match=r"--restart runn: the run in '.*' is named 'run'"):
        loop.train(other, folder, restart='runn')
    loop.train(other, folder, restart='run')
    assert run_dir.finished(folder).run.training.steps == 3
    assert (folder / 'notes.txt').read_text() == 'mine'
    before = (folder / 'log.jsonl').read_bytes()
    loop.train(other, folder, restart='run')  # the very same run: nothing is removed
    assert (folder / 'log.jsonl').read_bytes() == before


def test_two_do_not_train_in_one_folder(pictures, tmp_path):
    run = brief('vision', pictures)
    with lock.one_writer(tmp_path / 'run'), pytest.raises(UserError, match=r'written by process \d+ on .*--wait'):
        loop.train(run, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    loop.train(run, tmp_path / 'run')


@pytest.mark.parametrize('stage', ['vision', 'language'])
def test_a_small_validation_split_gives_a_smaller_batch(pictures, tmp_path, stage):
    run = small.change(brief(stage, pictures), 'data', validation_split='test[:3]')
    loop.train(run, tmp_path / 'run')
    (record,) = [r for r in loop_records(tmp_path / 'run') if r['kind'] == 'validation']
    assert record['loss'] > 0


def loop_records(folder):
    return [json.loads(text) for text in (folder / 'log.jsonl').read_text().splitlines()]


@pytest.mark.parametrize(
    'stage, data, says',
    [
        ('stage1', {'validation_split': 'test[:1]'}, "'test.:1.' holds one record that stage1 can use"),
        ('stage2', {'validation_split': 'dev'}, "no split 'dev'"),
        ('stage1', {'max_text': 4}, r"24 of 24 texts of 'train' \(100.0%\) are longer .*--data.max-text 5, or"),
        ('stage2', {'max_lm_text': 3}, r'of data.max-lm-text, which cuts them'),
        ('instruct', {'max_lm_text': 4}, r"data.max-lm-text is 4, and what stands before the answer of '\d+.png'"),
    ],
)
def test_what_data_cannot_give_is_said_before_the_first_step(pictures, tmp_path, stage, data, says):
    run = small.change(brief(stage, pictures), 'data', **data)
    with pytest.raises(UserError, match=says):
        loop.train(run, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_texts_may_be_cut_where_that_is_asked_for(pictures, tmp_path, capsys):
    run = small.change(brief('vision', pictures), 'data', max_text=4, cut_texts=1.0)
    loop.train(run, tmp_path / 'run')
    assert "24 of 24 texts of 'train' (100.0%) are longer than the 4 tokens" in capsys.readouterr().err


def test_a_frozen_component_from_random_numbers_is_refused(pictures, line, tmp_path):
    run = dataclasses.replace(brief('stage2', pictures), start=config.Start(vit=str(line / 'vision')))
    with pytest.raises(UserError, match=r"'lm' is frozen .*start.lm.*--start.scratch lm"):
        loop.train(run, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_new_fields_leave_fingerprints_as_they_were():
    run = config.Run('stage1')
    tree = config.to_tree(run)
    assert 'cut_texts' not in tree['data'] and 'scratch' not in tree['start'] and 'module' not in str(tree)
    other = small.change(run, 'data', cut_texts=0.5)
    assert config.to_tree(other)['data']['cut_texts'] == 0.5
    assert config.from_tree(config.to_tree(other), 'here') == other
    assert list(flatten(tree))  # plain dicts throughout
