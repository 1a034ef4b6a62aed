"""`python -m experiments.robustness.kills`: end commands at random moments, begin them again, and compare the results.

Training is ended 30 times, pack, convert, search, export, quantize and encode 10 times each, always by SIGKILL at a
moment drawn over the time that the command takes. Then two of the same command are started at once: one has to work,
and the other to say why not. kills.jsonl has a line for each command.
"""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from qformer_jax.data.dataset import Dataset
from qformer_jax.errors import command
from qformer_jax.runs import run_dir
from qformer_jax.training import logs

from .prepare import line, train_words

RESULTS = Path(__file__).parent / 'kills.jsonl'


@dataclass(frozen=True)
class Options:
    """End commands and begin them again."""

    home: Path
    """Folder to work in; what is there from an earlier call is used again."""
    trainings: int = 30
    """Ends of a training."""
    others: int = 10
    """Ends of each other command."""
    seed: int = 0
    """Of the moments."""
    only: tuple[str, ...] = ()
    """Of the commands, those named; default: all."""
    results: Path = RESULTS
    """File to write."""


@dataclass(frozen=True)
class Work:
    """A command, where it writes, and what its result is."""

    words: Callable[[Path], list[str]]
    """The words of `qformer`, which write below a folder."""
    result: Callable[[Path, str], str]
    """The result, from the folder and what was printed."""
    ends: int
    """How often it is ended."""
    twice: bool = True
    """Whether two at once meet: of such a small data set, one is packed before the other has begun."""


def _files(folder: Path, _: str) -> str:
    """Return the SHA-256 of all files of what was written."""
    files = sorted(p for p in (folder / 'out').rglob('*') if p.is_file())
    return hashlib.sha256(repr([(p.name, p.read_bytes()) for p in files]).encode()).hexdigest()


def _weights(folder: Path, _: str) -> str:
    """Return what a finished run holds, whose weights are there and intact."""
    done = run_dir.finished(folder / 'out')
    run_dir.load_components(done)
    return f'{done.fingerprint} {sorted(done.last.items())}'


def _records(folder: Path, _: str) -> str:
    """Return the fingerprint of a data set and the SHA-256 of its records."""
    dataset = Dataset.open(folder / 'out')
    records = [repr((r, r.features is not None and r.features.tobytes())) for r in dataset.source('train')]
    return f'{dataset.fingerprint} {hashlib.sha256(repr(records).encode()).hexdigest()}'


def _run(folder: Path, _: str) -> str:
    """Return the weights and the log of a finished run."""
    log = [
        {name: value for name, value in record.items() if name != 'timing'} for record in logs.records(folder / 'out')
    ]
    return json.dumps([json.loads((folder / 'out' / 'finished.json').read_text()), log])


def _table(_: Path, said: str) -> str:
    """Return what search printed but where its index lies."""
    return '\n'.join(text for text in said.splitlines() if not text.startswith('index:'))


def works(home: Path, options: Options) -> dict[str, Work]:
    """Return the commands by name; each writes into a folder of its own."""
    runs, n, source = home / 'line', options.others, f'{home}/source'
    data, tower = f'{home}/data', f'{home}/line/vision'
    return {
        'train': Work(lambda f: train_words(home, 'stage1', f / 'out', 40, 5), _run, options.trainings),
        'pack': Work(lambda f: ['data', 'pack', 'folder', f'{f}/out', '--path', source], _records, n, False),
        'encode': Work(lambda f: ['data', 'encode', data, f'{f}/out', '--vit', tower], _records, n),
        'convert': Work(lambda f: ['convert', f'{runs}/stage2', f'{f}/out'], _weights, n),
        'export': Work(lambda f: ['export', f'{runs}/instruct', f'{f}/out'], _files, n),
        'quantize': Work(lambda f: ['quantize', f'{runs}/instruct', f'{f}/out', '--weights', 'int8'], _weights, n),
        'search': Work(lambda f: ['search', f'{f}/run', source, 'a red circle'], _table, n),
    }


def _start(words: list[str]) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, '-m', 'qformer_jax', *words], stdout=pipe, stderr=pipe, text=True)


def _begin(folder: Path, home: Path) -> Path:
    """Return an empty folder; search finds a run there, so that its index is beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(home / 'line' / 'stage1', folder / 'run')
    shutil.copytree(home / 'line' / 'weights', folder / 'weights')
    return folder


def _whole(work: Work, folder: Path) -> tuple[str, float]:
    """Run the command to its end; return its result and how long it took (seconds)."""
    began = time.monotonic()
    process = _start(work.words(folder))
    said, error = process.communicate()
    if process.returncode:
        raise SystemExit(f'{work.words(folder)}: {error}')
    return work.result(folder, said), time.monotonic() - began


def _ended(work: Work, folder: Path, home: Path, known: str, seconds: float, draw: random.Random) -> tuple[int, int]:
    """End the command as often as it says; return how often that was, and how often the result was another one."""
    ends, other = 0, 0
    while ends < work.ends:
        _begin(folder, home)
        for _ in range(draw.randrange(1, 5)):  # ended again after it was begun again
            process = _start(work.words(folder))
            try:
                process.wait(draw.uniform(0.1, 1) * seconds)
            except subprocess.TimeoutExpired:
                ends += 1
            process.kill()
            process.communicate()
        if work.words(folder)[0] in ('convert', 'export', 'quantize') and (folder / 'out').exists():
            continue  # it had ended by itself, and a second call would say that there is one
        result, _ = _whole(work, folder)
        other += result != known
    return ends, other


def _two(work: Work, folder: Path, home: Path, known: str) -> str:
    """Start the command twice at once; return what the one that did not work said, or what was wrong."""
    _begin(folder, home)
    processes = [_start(work.words(folder)) for _ in range(2)]
    said = [(p.communicate(), p.returncode) for p in processes]
    codes = sorted(code for _, code in said)
    refused = [texts[1].strip() for texts, code in said if code == 2]
    results = [work.result(folder, texts[0]) for texts, code in said if code == 0]
    if codes != [0, 2] or results != [known]:
        return f'WRONG: exit codes {codes}, {said}'
    return refused[0].splitlines()[-1]


def main(options: Options) -> int:
    """Return 1 where a result is another one."""
    home, draw, rows = options.home.resolve(), random.Random(options.seed), []
    if not (home / 'served').is_dir():
        line(home)
    for name, work in works(home, options).items():
        if options.only and name not in options.only:
            continue
        folder = home / 'ended' / name
        known, _ = _whole(work, _begin(folder, home))
        again, seconds = _whole(work, _begin(folder, home))  # compiled by now
        ends, other = _ended(work, folder, home, known, seconds, draw)
        row = {'command': name, 'seconds': round(seconds, 1), 'same': known == again, 'ends': ends, 'other': other}
        if work.twice:
            row['two at once'] = _two(work, folder, home, known).replace(str(home), 'HOME')
        rows.append(row)
        print(json.dumps(row), flush=True)
    options.results.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    print(f'wrote {options.results}')
    return int(any(row['other'] or not row['same'] or row.get('two at once', '').startswith('WRONG') for row in rows))


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
