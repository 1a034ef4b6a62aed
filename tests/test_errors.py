"""Every mistake that a user can make ends in one line that starts with `error: `, and exit code 2."""

import dataclasses
import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from small import change, recipe, without_tower

import experiments
from qformer_jax import cli, config, errors
from qformer_jax.evaluation import task
from qformer_jax.runs import run_dir
from qformer_jax.training import loop


@pytest.fixture
def complaint(monkeypatch, capsys):
    """Return a function that runs a command line and returns its complaint, checked to be one line with exit code 2."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, 'argv', ['qformer', *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr().err
        assert stop.value.code == 2
        complaints = [line for line in said.splitlines() if line.startswith('error: ')]
        assert len(complaints) == 1 and said.splitlines()[-1] == complaints[0], said
        assert 'Traceback' not in said
        return complaints[0]

    return run


@pytest.fixture
def source(tmp_path) -> Path:
    """A fresh source folder of pictures, to be damaged."""
    return small.write_pictures(tmp_path / 'source')


def pack_words(source: Path) -> tuple:
    return 'data', 'pack', 'folder', source.parent / 'data', '--path', source


def train_words(run: config.Run, folder: Path) -> tuple:
    folder.mkdir(parents=True, exist_ok=True)
    return 'train', small.write_recipe(folder / 'recipe.py', run), '--run', folder / 'run'


def edit_first_line(source: Path, edit) -> None:
    """Apply `edit` to the first object of the training captions."""
    file = source / 'train' / 'captions.jsonl'
    first, *others = file.read_text().splitlines()
    row = json.loads(first)
    edit(row)
    file.write_text('\n'.join([json.dumps(row), *others]))


# The command line


def test_unknown_command(complaint):
    assert "no command 'trian' (nearest: 'train')" in complaint('trian')
    assert "no command 'data pak' (nearest: 'data pack')" in complaint('data', 'pak')


def test_unknown_recipe(complaint, tmp_path):
    assert "no recipe 'easy_vqa_stage3' (nearest: 'easy_vqa_stage" in complaint('train', 'easy_vqa_stage3')


def test_no_recipe(complaint):
    assert 'needs a recipe' in complaint('train')


def test_unknown_option(complaint, tmp_path):
    said = complaint('train', 'easy_vqa_stage1', '--run', tmp_path / 'run', '--training.stepz', 3)
    assert '--training.stepz' in said and '(nearest: --training.steps' in said


def test_an_option_of_another_type(complaint, tmp_path):
    said = complaint('train', 'easy_vqa_stage1', '--run', tmp_path / 'run', '--training.steps', 'many')
    assert '--training.steps' in said and 'many' in said


def test_unknown_task(complaint, line):
    assert 'vqaa' in complaint('evaluate', line / 'instruct', '--task', 'vqaa')


# Sources


@pytest.mark.parametrize('content', [b'', b'no picture', 'truncated'])
def test_a_picture_that_cannot_be_read(complaint, source, content):
    file = source / 'train' / '0.png'
    file.write_bytes(file.read_bytes()[:-60] if content == 'truncated' else content)
    said = complaint(*pack_words(source))
    assert str(file) in said and 'captions.jsonl line 1' in said
    assert not (source.parent / 'data').exists()


def test_a_picture_that_is_missing(complaint, source):
    edit_first_line(source, lambda row: row.update(file='00.png'))
    assert "00.png: no such picture (nearest: '0.png')" in complaint(*pack_words(source))


@pytest.mark.parametrize(
    'edit, words',
    [
        (lambda row: row.update(caption='  '), 'an empty caption'),
        (lambda row: (row.pop('caption'), row.pop('questions')), 'neither a caption nor a question'),
        (lambda row: row.update(captoin='a cat'), "unknown key 'captoin' (nearest: 'caption"),
    ],
)
def test_a_caption_that_is_not_one(complaint, source, edit, words):
    edit_first_line(source, edit)
    said = complaint(*pack_words(source))
    assert words in said and 'captions.jsonl line 1' in said


def test_an_empty_source(complaint, source):
    (source / 'train' / 'captions.jsonl').write_text('')
    assert "split 'train' has no record" in complaint(*pack_words(source))


def test_a_full_disk_while_packing(complaint, source, monkeypatch):
    monkeypatch.setattr(np, 'savez', fill_the_disk)
    assert 'disk full' in complaint(*pack_words(source))


def fill_the_disk(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')


# Data sets and runs


def test_a_data_set_that_is_missing(complaint, pictures, tmp_path):
    run = recipe('language', pictures.parent / 'dat')
    assert f"no such folder (nearest: '{pictures}')" in complaint(*train_words(run, tmp_path))
    said = complaint('train', 'easy_vqa_vision', '--run', tmp_path / 'r', '--data.path', tmp_path)
    assert 'qformer data pack' in said


def test_a_split_that_is_missing_or_empty(complaint, pictures, tmp_path):
    run = recipe('language', pictures)
    said = complaint(*train_words(change(run, 'data', train_split='trian'), tmp_path))
    assert "no split 'trian' (nearest: 'train')" in said
    said = complaint(*train_words(change(run, 'data', train_split='train[:0]'), tmp_path))
    assert "split 'train[:0]'" in said and 'is empty' in said
    assert not (tmp_path / 'run' / run_dir.FINISHED).exists()


def test_a_corrected_mistake_is_not_another_run(complaint, pictures, tmp_path):
    """The mistyped command made the folder; it holds no result, so the right one may use it."""
    wrong = change(recipe('language', pictures, steps=6), 'data', train_split='trian')
    complaint(*train_words(wrong, tmp_path))
    right = change(wrong, 'data', train_split='train')
    assert loop.train(right, tmp_path / 'run').run.data.train_split == 'train'
    assert json.loads((tmp_path / 'run' / run_dir.RUN).read_text())['config']['data']['train_split'] == 'train'


def test_a_batch_larger_than_the_data_set(complaint, pictures, tmp_path):
    run = change(recipe('language', pictures), 'training', batch_size=32)
    assert "batch_size 32 exceeds the 24 records of 'train'" in complaint(*train_words(run, tmp_path))


@pytest.mark.parametrize(
    'option, value, words',
    [
        ('model.qformer.num-queries', 0, 'it must be at least 1'),
        ('model.qformer.cross-attention-freq', 0, 'it must be at least 1'),
        ('model.vit.depth', -2, 'it must be at least 1'),
        ('model.qformer.dropout', 1.5, 'it must be at least 0 and at most 1'),
        ('optimizer.peak-rate', -0.1, 'it must be at least 0'),
        ('optimizer.weight-decay', 'nan', 'it must be at least 0'),
        ('objective.itm', -1.0, 'it must be at least 0'),
        ('optimizer.warmup-steps', -1, 'it must be at least 0'),
        ('training.accumulate', 0, 'it must be at least 1'),
    ],
)
def test_a_number_that_makes_no_sense(complaint, pictures, tmp_path, option, value, words):
    said = complaint(*train_words(recipe('stage1', pictures), tmp_path), f'--{option}', value)
    assert said == f'error: {option} is {value}, {words}' and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('part', ['qformer', 'vit'])
def test_heads_that_do_not_divide_a_width(complaint, pictures, tmp_path, part):
    said = complaint(*train_words(recipe('stage1', pictures), tmp_path), f'--model.{part}.heads', 3)
    assert said.startswith(f'error: {part}/') and 'attention: 3 heads do not divide a width of ' in said
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'stage, option, words',
    [
        ('stage1', 'model.qformer.max-positions', 'tokens do not fit the Q-Former: it has 3 positions'),
        ('language', 'model.lm.max-positions', 'do not fit the language model: it has 3 positions'),
    ],
)
def test_texts_longer_than_a_table_of_positions(complaint, pictures, tmp_path, stage, option, words):
    assert words in complaint(*train_words(recipe(stage, pictures), tmp_path), f'--{option}', 3)


def test_features_into_a_run_that_has_a_tower(complaint, arrays, tmp_path):
    assert 'holds feature arrays' in complaint(*train_words(recipe('stage1', arrays), tmp_path))


def test_pictures_into_a_run_without_a_tower(complaint, pictures, tmp_path):
    said = complaint(*train_words(without_tower(recipe('stage1', pictures)), tmp_path))
    assert 'holds pictures' in said and 'model.vit' in said


def test_a_start_run_that_is_not_finished(complaint, pictures, line, tmp_path):
    shutil.copytree(line / 'vision', tmp_path / 'begun')
    (tmp_path / 'begun' / run_dir.FINISHED).unlink()
    run = dataclasses.replace(recipe('stage1', pictures), start=config.Start(vit=str(tmp_path / 'begun')))
    assert f"run '{tmp_path / 'begun'}' is not finished" in complaint(*train_words(run, tmp_path / 'new'))


def test_a_start_run_that_holds_something_else(complaint, pictures, line, tmp_path):
    run = dataclasses.replace(recipe('stage1', pictures), start=config.Start(vit=str(line / 'language')))
    assert "holds no 'vit', only ['lm']" in complaint(*train_words(run, tmp_path))


def test_a_checkpoint_of_another_configuration(complaint, pictures, line, tmp_path):
    run = recipe('stage1', pictures)
    run = change(run, 'model', vit=dataclasses.replace(small.VIT, mlp_width=64))
    run = dataclasses.replace(run, start=config.Start(vit=str(line / 'vision')))
    said = complaint(*train_words(run, tmp_path))
    assert "another configuration of 'vit'" in said and '(16, 32) there, (16, 64) here' in said


def test_a_folder_of_another_run(complaint, pictures, line, tmp_path):
    run = change(recipe('vision', pictures, steps=99), 'optimizer', peak_rate=0.5)
    said = complaint('train', small.write_recipe(tmp_path / 'r.py', run), '--run', line / 'vision')
    assert f'training.steps {small.STEPS} there, 99 here' in said and 'optimizer.peak_rate 0.01 there, 0.5 here' in said


def test_a_folder_that_holds_something_else(complaint, pictures, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'thesis.txt').write_text('mine')
    assert 'is not empty and holds no run' in complaint(*train_words(recipe('language', pictures), tmp_path))


def test_a_full_disk_while_training(complaint, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Log, 'write', fill_the_disk)
    assert 'disk full' in complaint(*train_words(recipe('language', pictures, steps=6), tmp_path))


# Use


def test_a_run_that_is_missing(complaint, tmp_path):
    assert f"no run at '{tmp_path / 'none'}'" in complaint('caption', tmp_path / 'none', 'cat.jpg')


def test_no_picture(complaint, line):
    assert 'qformer caption RUN PICTURE...' in complaint('caption', line / 'stage2')


@pytest.mark.parametrize('words', [('caption',), ('ask', 'is it red?')])
@pytest.mark.parametrize('content, said', [(None, 'no such file'), (b'GIF89a', 'Pillow'), (b'\x93NUMPY', 'Pillow')])
def test_a_picture_that_cannot_be_used(complaint, line, tmp_path, words, content, said):
    file = tmp_path / 'a.png'
    if content:
        file.write_bytes(content)
    command, *question = words
    found = complaint(command, line / 'stage2', file, *question)
    assert str(file) in found and said in found


def test_features_for_a_run_that_sees_pictures(complaint, line, tmp_path):
    np.save(tmp_path / 'a.npy', np.zeros((2, 6), np.float32))
    assert 'picture' in complaint('caption', line / 'stage2', tmp_path / 'a.npy')


@pytest.fixture(scope='module')
def features_run(arrays, tmp_path_factory) -> Path:
    """The folder of a stage-2 run over feature arrays."""
    run = without_tower(recipe('stage2', arrays, steps=6))
    return loop.train(run, tmp_path_factory.mktemp('features') / 'run').folder


def test_a_picture_for_a_run_that_reads_features(complaint, features_run, tmp_path):
    small.draw_picture('red', 'square').save(tmp_path / 'a.png')
    assert 'not an .npy array' in complaint('caption', features_run, tmp_path / 'a.png')
    assert 'no such array' in complaint('caption', features_run, tmp_path / 'b.npy')
    np.save(tmp_path / 'wide.npy', np.zeros((2, 7), np.float32))
    said = complaint('caption', features_run, tmp_path / 'wide.npy')
    assert 'features must be [P, 6] for this run, not [2, 7]' in said


def test_a_question_too_long(complaint, line, tmp_path):
    small.draw_picture('red', 'square').save(tmp_path / 'a.png')
    assert 'do not fit the language model' in complaint('ask', line / 'instruct', tmp_path / 'a.png', 'red ' * 60)


def test_weights_that_are_missing(complaint, line, tmp_path):
    shutil.copytree(line / 'stage2', tmp_path / 'stage2')
    small.draw_picture('red', 'square').save(tmp_path / 'a.png')
    assert 'are missing' in complaint('caption', tmp_path / 'stage2', tmp_path / 'a.png')


@pytest.mark.parametrize(
    'stage, kind, words',
    [('stage1', 'vqa', 'has no lm'), ('stage1', 'caption', 'has no lm'), ('vision', 'retrieval', 'has no qformer')],
)
def test_a_task_for_another_stage(complaint, line, stage, kind, words):
    assert words in complaint('evaluate', line / stage, '--task', kind)


def test_a_split_without_questions(complaint, features_run):
    assert "split 'test' has no question" in complaint('evaluate', features_run, '--task', 'vqa')


def test_a_full_disk_while_evaluating(complaint, line, monkeypatch):
    monkeypatch.setattr(task, 'TASKS', task.TASKS | {'caption': lambda *_: task.Judged({}, [])})
    monkeypatch.setattr(Path, 'write_text', fill_the_disk)
    assert 'disk full' in complaint('evaluate', line / 'stage2', '--task', 'caption', '--split', 'train')


EXPERIMENTS = [p for p in Path(experiments.__file__).parent.rglob('*.py') if 'tyro.cli(' in p.read_text()]


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda path: '/'.join(path.parts[-2:]))
def test_an_experiment_ends_wrong_input_as_the_command_does(path):
    _, _, called = path.read_text().partition("if __name__ == '__main__':")
    assert 'command(lambda: ' in called


def test_a_command_ends_with_the_number_that_it_returns_and_in_good_order_when_it_is_stopped(capsys):
    with pytest.raises(SystemExit) as stop:
        errors.command(lambda: 1)
    assert stop.value.code == 1
    errors.command(lambda: 'a fingerprint')

    def stopped():
        raise errors.Stopped('stopped after step 3')

    errors.command(stopped)
    assert capsys.readouterr().err == 'stopped after step 3\n'
