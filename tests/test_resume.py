"""Kill it, stop it, damage it: the same command again ends where the uninterrupted run ends, to the last bit."""

import dataclasses
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import small
from small import change, recipe, start_command

from qformer_jax import cli, config

STEPS, EVERY = 100, 15
LIMIT = 120  # seconds until a process that does not do what the test waits for fails it


def test_interrupted_runs_end_where_the_uninterrupted_one_ends(pictures, tmp_path, capsys):
    """Killed in a step, killed while a checkpoint is written, stopped by SIGTERM, its newest checkpoint damaged."""
    run = shallow(recipe('stage2', pictures, steps=STEPS))
    run = change(run, 'training', checkpoint_every=EVERY, validation_batches=1)
    run = change(run, 'objective', nested_queries=True)  # drawn from the step's key, as dropout is
    run = change(run, 'data', validation_split='test', crop_scale=(0.5, 1.0), flip=True)
    whole, torn = tmp_path / 'whole', tmp_path / 'torn'
    recipe_file = small.write_recipe(tmp_path / 'tiny.py', run)
    words = ('train', recipe_file, '--run')

    cli.run([*map(str, words), str(whole)])

    interrupt(start_command(*words, torn), signal.SIGKILL, lambda: steps_logged(torn) > EVERY + 3)
    reached = steps_logged(torn)
    assert EVERY < reached < STEPS

    interrupt(start_command(*words, torn), signal.SIGKILL, lambda: writes_a_checkpoint_after(torn, reached))
    assert not (torn / 'finished.json').exists()

    reached = steps_logged(torn)
    process = start_command(*words, torn)
    said = interrupt(process, signal.SIGTERM, lambda: steps_logged(torn) > reached + 3)
    assert process.returncode == 0
    assert said.count('SIGTERM: stopped after step') == 1 and 'Traceback' not in said
    assert 'resumed from the checkpoint of step' in said

    newest, earlier = sorted(sealed(torn))[-1], sorted(sealed(torn))[-2]
    flip_a_byte(torn / 'checkpoints' / str(newest))
    process = start_command(*words, torn)
    said = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 0, said
    assert f'checkpoint {newest} is damaged' in said and f'using checkpoint {earlier} instead' in said
    assert f'resumed from the checkpoint of step {earlier}' in said

    assert outcome(torn) == outcome(whole)

    before = outcome(torn)
    cli.run([*map(str, words), str(torn)])
    assert 'is finished already: nothing to do' in capsys.readouterr().err
    assert outcome(torn) == before


def shallow(run: config.Run) -> config.Run:
    """Return the run with one layer a part, which each process traces anew, and with dropout."""
    parts = {'vit': small.VIT, 'qformer': small.QFORMER, 'lm': small.OPT}
    return change(run, 'model', **{name: dataclasses.replace(part, depth=1) for name, part in parts.items()})


def interrupt(process: subprocess.Popen, number: int, when: Callable[[], bool]) -> str:
    """Send a signal as soon as `when()`, and return what the process said on stderr."""
    deadline = time.monotonic() + LIMIT
    while not when():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    return process.communicate(timeout=LIMIT)[1]


def steps_logged(folder: Path) -> int:
    path = folder / 'log.jsonl'
    lines = path.read_bytes().splitlines() if path.exists() else []
    return sum(b'"train"' in line for line in lines)


def sealed(folder: Path) -> set[int]:
    return {int(path.stem) for path in (folder / 'checkpoints').glob('*.json')}


def writes_a_checkpoint_after(folder: Path, step: int) -> bool:
    """Return whether a step after `step` is in the folder without its seal."""
    there = {path.name.split('.')[0] for path in (folder / 'checkpoints').iterdir() if path.is_dir()}
    return any(name.isdigit() and int(name) > step and int(name) not in sealed(folder) for name in there)


def flip_a_byte(folder: Path) -> None:
    largest = max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """Return the digests of the final weights, and the log without its timing."""
    records = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    for record in records:
        del record['timing']
    return json.loads((folder / 'finished.json').read_text()), records


def test_a_run_can_be_moved_and_continued(pictures, tmp_path):
    """What a run is does not depend on where it lies: its folder is renamed between two commands."""
    run = change(recipe('language', pictures, steps=8), 'training', checkpoint_every=4)
    recipe_file = small.write_recipe(tmp_path / 'tiny.py', run)
    cli.run(['train', str(recipe_file), '--run', str(tmp_path / 'a' / 'run')])
    moved = tmp_path / 'b'
    shutil.move(tmp_path / 'a', moved)
    expected = outcome(moved / 'run')
    (moved / 'run' / 'finished.json').unlink()
    cli.run(['train', str(recipe_file), '--run', str(moved / 'run')])
    assert outcome(moved / 'run') == expected
