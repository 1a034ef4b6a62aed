"""`python -m experiments.robustness`: damage files of runs, weights, data sets and exported folders, and read them.

Each mutation has a verdict (mutations.py). A reader works in a process of its own, which is ended after 20 seconds or
above 2 GiB. Wrong are: anything but one line (a traceback), a refusal that should not be, and an answer that should not
be, or is another one than before. results.jsonl has a line for each part and mutation; wrong ones are printed whole.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.progress import track

from qformer_jax.errors import command
from qformer_jax.runs import run_dir

from . import mutations
from .prepare import line, train_words
from .readers import Reader

RESULTS = Path(__file__).parent / 'results.jsonl'
PARTS = 'run', 'data', 'features', 'served', 'half'
"""What `readers.py` reads."""
UNREAD = ('provenance.json', 'dataset_info.json', 'features.json')
"""Files that say something to people and to other libraries: we read nothing of them."""


@dataclass(frozen=True)
class Options:
    """Damage files and read them."""

    home: Path
    """Folder to work in; what is there from an earlier call is used again."""
    count: int = 1000
    """Mutations, over all parts."""
    half: int = 40
    """Of them, those of a half-done run, whose reading is a training."""
    seed: int = 0
    """Of what is drawn."""
    results: Path = RESULTS
    """File to write."""


def _half_done(home: Path) -> None:
    """Leave a run of stage 1 that was stopped after its second step of four."""
    from qformer_jax import cli
    from qformer_jax.errors import Stopped
    from qformer_jax.training import loop

    save = loop._save

    def stopping(trainer, log, evaluate, number, validate):
        save(trainer, log, evaluate, number, validate)
        trainer.checkpoints.wait()
        raise Stopped

    loop._save = stopping
    try:
        cli.run(train_words(home, 'stage1', home / 'line' / 'half'))
    except Stopped:
        pass
    finally:
        loop._save = save


def files_of(home: Path, part: str) -> list[Path]:
    """Return the files that a part consists of."""
    used = run_dir.finished(home / 'line' / 'instruct').last.values()
    patterns = {
        'run': ('line/instruct/*.json', *(f'line/weights/{digest}.safetensors' for digest in used)),
        'data': ('data/*',),
        'features': ('features/*',),
        'served': ('served/*.json', 'served/*.safetensors', 'served/*.stablehlo'),
        'half': ('line/half/run.json', 'line/half/log.jsonl', 'line/half/checkpoints/*.json',
                 'line/half/checkpoints/*/*/*'),
    }  # fmt: skip
    return sorted({file for pattern in patterns[part] for file in home.glob(pattern) if file.is_file()})


def _cases(home: Path, options: Options, draw: random.Random) -> Iterator[tuple[str, Path, mutations.Mutation]]:
    """Yield part, file (from `home`) and mutation."""
    counts = {part: (options.count - options.half) // (len(PARTS) - 1) for part in PARTS} | {'half': options.half}
    for part in PARTS:
        files = files_of(home, part)
        for _ in range(counts[part]):
            file = draw.choice(files)
            kinds = mutations.BYTES
            if file.suffix in ('.json', '.txt'):
                kinds += mutations.TEXT if b'"' in file.read_bytes() else ()
            if file.suffix == '.json':
                kinds += mutations.JSON
            yield part, file.relative_to(home), draw.choice(kinds)


def _judge(verdict: mutations.Verdict, file: Path, kind: str, text: str, known: str) -> str:
    """Return what is wrong, or nothing."""
    if kind in ('traceback', 'ended'):
        return kind
    if kind == 'answer' and text != known:
        return 'another answer'
    if kind == 'refused' and len(text.splitlines()) != 1:
        return 'no line, or several'
    if file.name in UNREAD or 'checkpoints' in file.parts or file.name == 'log.jsonl':
        return ''  # nobody reads it, or an earlier step takes the place of a damaged one
    if verdict == 'refused' and kind == 'answer':
        return 'not refused'
    return 'refused' if verdict == 'same' and kind == 'refused' else ''


def main(options: Options) -> int:
    """Return 1 where something is wrong."""
    home = options.home.resolve()
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(home / 'compiled')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    if not (home / 'served').is_dir():
        shutil.rmtree(home, ignore_errors=True)
        line(home)
        _half_done(home)
    draw, read, whole = random.Random(options.seed), Reader(), home / 'damaged'
    known, tally, wrong = {}, Counter(), []
    for part in PARTS:
        copy(home, whole)
        kind, known[part] = read(part, whole)
        if kind != 'answer':
            raise SystemExit(f'{part}, undamaged: {kind}: {known[part]}')
    cases = list(_cases(home, options, draw))
    for part, file, mutation in track(cases, 'damaging'):
        copy(home, whole)
        verdict = mutation(whole / file, draw)
        kind, text = read(part, whole)
        if found := _judge(verdict, file, kind, text, known[part]):
            wrong.append(f'{part}: {file}: {mutation.__name__}: {found}: {text[-1500:]}')
            print(wrong[-1], flush=True)
        tally[part, mutation.__name__, found or kind] += 1
    rows = [{'part': p, 'mutation': m, 'found': f, 'count': n} for (p, m, f), n in sorted(tally.items())]
    options.results.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    print(f'{len(cases)} mutations, {len(wrong)} wrong; wrote {options.results}')
    return int(bool(wrong))


def copy(home: Path, whole: Path) -> None:
    """Lay the undamaged files anew."""
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    for name in ('line', 'data', 'features', 'served', 'source'):
        shutil.copytree(home / name, whole / name)


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
