"""Every mistake that a user can make ends in one line that starts with `error: `, and exit code 2."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import small
from small import change, recipe, without_tower

import experiments
from qformer_jax import cli, config, errors, lock
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
        ('model.qformer.dropout', 1.5, 'it must be at least 0 and below 1'),
        ('optimizer.peak-rate', -0.1, 'it must be at least 0'),
        ('optimizer.weight-decay', 'nan', 'it must be at least 0'),
        ('objective.itm', -1.0, 'it must be at least 0'),
        ('optimizer.warmup-steps', -1, 'it must be at least 0'),
        ('training.accumulate', 0, 'it must be at least 1'),
    ],
)
def test_a_number_that_makes_no_sense(complaint, pictures, tmp_path, option, value, words):
    said = complaint(*train_words(recipe('stage1', pictures), tmp_path), f'--{option}', value)
    assert said.startswith(f'error: --{option} is {value}, {words}') and not (tmp_path / 'run').exists()


ODD = {int: (-1, 10**30, 2**64), float: (math.nan, math.inf, -math.inf, -1.0, 1e30)}


def numbers_of(run: config.Run) -> list[tuple[tuple[str, ...], type]]:
    """Return every field of a configuration that is one number, by its path, and whether it is a whole one."""
    found = []
    for part in ('model', 'data', 'objective', 'optimizer', 'training'):
        open_parts = [((part,), getattr(run, part))]
        while open_parts:
            path, tree = open_parts.pop()
            for field in dataclasses.fields(tree):
                value = getattr(tree, field.name)
                if dataclasses.is_dataclass(value) and not isinstance(value, type):
                    open_parts.append(((*path, field.name), value))
                elif type(value) in (int, float):
                    found.append(((*path, field.name), type(value)))
    return found


def with_number(tree, path: tuple[str, ...], value):
    name, *rest = path
    inner = with_number(getattr(tree, name), rest, value) if rest else value
    return dataclasses.replace(tree, **{name: inner})


def complete_run() -> config.Run:
    """Return a run that has every part."""
    run = recipe('stage2', 'nowhere')
    more = {'lora': config.LoraConfig(), 'time': config.TimeConfig(), 'grounding': config.GroundingConfig()}
    more |= {'gates': config.GatesConfig(heads=2), 'connector': config.ConnectorConfig(feature_width=16)}
    return change(run, 'model', **more)


@pytest.mark.parametrize(
    'path, kind', numbers_of(complete_run()), ids=lambda it: '.'.join(it) if type(it) is tuple else ''
)
def test_no_number_takes_an_odd_value(path, kind):
    """Neither of a recipe, nor of the same configuration in Python."""
    run = complete_run()
    loop.check(run)
    for value in ODD[kind]:
        with pytest.raises(errors.UserError, match=path[-1].replace('_', '.')):
            loop.check(with_number(run, path, value))


@pytest.mark.parametrize(
    'option, values, words',
    [
        ('training.seed', [2**64], 'it must be at least 0'),
        ('training.seed', [2**31], 'it must be at least 0'),
        ('training.steps', ['1e30'], "invalid literal for int() with base 10: '1e30'"),
        ('training.steps', [10**9], 'it must be at least 1 and at most 100'),
        ('model.vit.depth', [2**31 - 1], 'it must be at least 1'),
        ('data.max-text', [2**31 - 1], 'it must be at least 0'),
        ('optimizer.beta1', [1], 'it must be at least 0 and below 1'),
        ('optimizer.beta2', ['nan'], 'it must be at least 0 and below 1'),
        ('data.cut-texts', [1.5], 'it must be at least 0 and at most 1'),
        ('data.crop-scale', [-1, 0], 'expected two shares, 0 < smallest <= largest <= 1'),
        ('data.crop-scale', ['nan', 1], 'expected two shares'),
        ('data.crop-scale', [2, 3], 'expected two shares'),
        ('data.crop-scale', [1, 0.5], 'expected two shares'),
        ('data.crop-scale', [0, 1], 'expected two shares'),
        ('optimizer.rate-rules', ['.*', 'nan'], "'.*' learns at nan times the rate"),
        ('optimizer.rate-rules', ['.*', -1], "'.*' learns at -1.0 times the rate"),
        ('optimizer.rate-rules', ['.*', '1e300'], "'.*' learns at 1e+300 times the rate"),
        ('model.qformer.text-side', ['none'], "model.qformer.text-side is 'none', it must be 'full'"),
        ('model.qformer.text-side', ['retrieval'], "is 'retrieval', it must be 'full'"),
    ],
)
def test_an_option_that_would_ruin_the_run(complaint, tmp_path, option, values, words):
    run = recipe('stage1', tmp_path / 'no_data')
    said = complaint(*train_words(run, tmp_path), f'--{option}', *values)
    assert option in said and words in said and not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'words, option, values',
    [
        (('caption', 'RUN', 'PICTURE'), 'max-new-tokens', (0, -1, 'nan', 2**64)),
        (('caption', 'RUN', 'PICTURE'), 'num-beams', (0, -1, 2**64)),
        (('caption', 'RUN', 'PICTURE'), 'num-return', (0, -1, 2**64)),
        (('ask', 'RUN', 'PICTURE', 'what?'), 'temperature', (-1, 'nan', 'inf')),
        (('ask', 'RUN', 'PICTURE', 'what?'), 'top-p', ('nan', -1, 2)),
        (('ask', 'RUN', 'PICTURE', 'what?'), 'top-k', (-1, 2**64)),
        (('ask', 'RUN', 'PICTURE', 'what?'), 'seed', (-1, 2**64)),
        (('chat', 'RUN', 'PICTURE'), 'max-new-tokens', (0, 2**64)),
        (('search', 'RUN', 'FOLDER', 'red'), 'top', (0, -1, 2**64)),
        (('search', 'RUN', 'FOLDER', 'red'), 'rerank', (-5, 2**64)),
        (('evaluate', 'RUN', '--task', 'vqa'), 'queries', (-1, 2**64)),
        (('convert', 'RUN', 'DEST'), 'queries', (-1, 2**64)),
        (('data', 'encode', 'DATA', 'OUT', '--vit', 'RUN'), 'batch-size', (0, -1, 2**64)),
    ],
)
def test_an_option_of_a_command_out_of_its_range(complaint, words, option, values):
    for value in values:
        said = complaint(*words, f'--{option}', value)
        assert f'--{option}' in said and str(value) in said, 'said before anything is looked for'


def test_no_text_is_drawn_where_nothing_is_likely(complaint):
    assert 'top_p 0.0 must be in (0, 1]' in complaint('caption', 'RUN', 'PICTURE', '--top-p', 0)


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
@pytest.mark.parametrize(
    'content, said', [(None, 'no such picture'), (b'GIF89a', 'not a picture'), (b'\x93NUMPY', 'not a picture')]
)
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
    monkeypatch.setattr(task, 'TASKS', task.TASKS | {'caption': lambda *_: task.TaskResult({}, [])})
    monkeypatch.setattr(Path, 'write_text', fill_the_disk)
    assert 'disk full' in complaint('evaluate', line / 'stage2', '--task', 'caption', '--split', 'train')


WRITERS = {
    'pack': ('data', 'pack', 'folder', 'OUT', '--path', 'nowhere'),
    'encode': ('data', 'encode', 'nowhere', 'OUT', '--vit', 'nowhere'),
    'convert': ('convert', 'nowhere', 'OUT'),
    'quantize': ('quantize', 'STAGE2', 'OUT', '--weights', 'int8'),
    'export': ('export', 'STAGE2', 'OUT'),
    'search': ('search', 'RUNS/none', 'nowhere', 'red'),
    'train': ('train', 'RECIPE', '--run', 'OUT'),
}


def writer_words(name: str, line: Path, tmp_path: Path) -> tuple[list, Path]:
    """Return the words of a command that writes, and what it writes."""
    places = {'OUT': tmp_path / 'out', 'STAGE2': line / 'stage2', 'RUNS/none': tmp_path / 'runs' / 'none'}
    places['RECIPE'] = small.write_recipe(tmp_path / 'recipe.py', recipe('vision', tmp_path / 'no_data'))
    return [places.get(w, w) for w in WRITERS[name]], tmp_path / 'runs' / 'cache' if name == 'search' else places['OUT']


@pytest.mark.parametrize('name', WRITERS)
def test_two_do_not_write_in_one_place(complaint, line, tmp_path, name):
    """What the commands would read is not there: who writes is asked first."""
    words, out = writer_words(name, line, tmp_path)
    with lock.one_writer(out):
        said = complaint(*words)
    assert re.search(rf"'{out}' is being written by process {os.getpid()} on {socket.gethostname()}: .*--wait", said)
    assert not out.exists()
    assert 'is being written' not in complaint(*words) if name not in ('quantize', 'export') else True


HOLD = """
import pathlib, sys, time
from qformer_jax.lock import one_writer
with one_writer(pathlib.Path(sys.argv[1])):
    print('holding', flush=True)
    sys.stdin.read()
"""


def test_a_command_waits_for_another_process(line, tmp_path):
    """Refused without --wait; with it, done once the other one has ended, even by a signal that it cannot catch."""
    small.write_pictures(tmp_path / 'source')
    words = ['data', 'pack', 'folder', str(tmp_path / 'out'), '--path', str(tmp_path / 'source')]
    holder = subprocess.Popen(
        [sys.executable, '-c', HOLD, tmp_path / 'out'], cwd=small.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b'holding\n'
    with pytest.raises(errors.UserError, match=rf'is being written by process {holder.pid} on '):
        cli.run(words)
    waiting = threading.Thread(target=cli.run, args=([*words, '--wait'],))
    waiting.start()
    waiting.join(timeout=0.5)
    assert waiting.is_alive() and not (tmp_path / 'out').exists()
    holder.kill()
    waiting.join(timeout=60)
    assert (tmp_path / 'out' / 'dataset_info.json').is_file()
    holder.communicate()


@pytest.fixture
def unread(monkeypatch):
    """Loading a model is a failure: what can be known before is said before."""
    monkeypatch.setattr('qformer_jax.inference.blip2.Blip2.load', lambda *_, **__: pytest.fail('a model was loaded'))
    monkeypatch.setattr('qformer_jax.runs.weight_store.load', lambda *_, **__: pytest.fail('weights were read'))


@pytest.mark.parametrize(
    'words',
    [
        ('embed', 'STAGE1', 'PICTURE', '--out', 'FILE/v.safetensors'),
        ('attention', 'STAGE1', 'PICTURE', '--out', 'FILE/a'),
        ('queries', 'STAGE1', '--out', 'FILE/q'),
        ('ground', 'STAGE2', 'PICTURE', 'red', '--out', 'FILE/g'),
        ('convert', 'STAGE1', 'FILE/c'),
        ('convert', 'STAGE1', 'FILE/c.pth', '--to', 'lavis'),
        ('quantize', 'STAGE2', 'FILE/q', '--weights', 'int8'),
        ('export', 'STAGE2', 'FILE/e'),
        ('data', 'encode', 'DATA', 'FILE/e', '--vit', 'VISION'),
        ('data', 'pack', 'folder', 'FILE/d', '--path', 'SOURCE'),
        ('train', 'RECIPE', '--run', 'FILE/r'),
    ],
    ids=lambda words: words[0],
)
def test_a_place_that_cannot_be_written(complaint, line, pictures, tmp_path, words, unread):
    places = {'PICTURE': tmp_path / 'a.png', 'DATA': pictures, 'SOURCE': tmp_path / 'source'}
    places |= {stage.upper(): line / stage for stage in small.STAGES}
    places['RECIPE'] = small.write_recipe(tmp_path / 'recipe.py', recipe('vision', pictures))
    small.draw_picture('red', 'square').save(tmp_path / 'a.png')
    small.write_pictures(tmp_path / 'source')
    (tmp_path / 'file').write_text('mine')
    words = [places.get(w, w.replace('FILE', str(tmp_path / 'file'))) for w in words]
    assert 'cannot be written' in complaint(*words)
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize(
    'words', [('quantize', 'RUN', 'OUT', '--weights', 'int8'), ('export', 'RUN', 'OUT'), ('convert', 'RUN', 'OUT')]
)
def test_a_destination_that_exists(complaint, line, tmp_path, words, unread):
    (tmp_path / 'out').mkdir()
    said = complaint(*[{'RUN': line / 'stage2', 'OUT': tmp_path / 'out'}.get(w, w) for w in words])
    assert f"'{tmp_path / 'out'}' exists: name a new one" in said


@pytest.mark.parametrize(
    'words, said',
    [
        (('evaluate', 'instruct', '--task', 'vqa', '--split', 'tset'), "no split 'tset' (nearest: 'test')"),
        (('evaluate', 'instruct', '--task', 'grounding'), "split 'test' has no phrase with boxes"),
        (('queries', 'stage1', '--split', 'tset'), "no split 'tset' (nearest: 'test')"),
        (('quantize', 'stage2', 'OUT', '--weights', 'int8', '--split', 'tset'), "no split 'tset' (nearest: 'test')"),
        (('quantize', 'stage2', 'OUT', '--weights', 'int8', '--data', 'nowhere'), 'nowhere: no such folder'),
    ],
)
def test_a_split_is_looked_at_before_the_model(complaint, line, tmp_path, words, said, unread):
    stages = {stage: line / stage for stage in small.STAGES}
    assert said in complaint(*[{**stages, 'OUT': tmp_path / 'out'}.get(w, w) for w in words])
    assert not (tmp_path / 'out').exists()


def test_an_encoded_data_set_is_not_replaced_by_another(complaint, line, pictures, unread):
    said = complaint('data', 'encode', pictures, pictures, '--vit', line / 'vision')
    assert f'{pictures}: holds another packed data set' in said


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
