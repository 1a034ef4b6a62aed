"""Variants x seeds: what is finished is not run again, and each result is a line of JSON.

A cell is a variant with one seed. Small studies run theirs one after the other (`in_turn`); large ones a process a
variant, side by side on as many GPUs as there are (`side_by_side`), each cell leaving its result in its own folder.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import track

from qformer_jax.errors import UserError, nearest

Row = dict[str, object]


class Cell(Protocol):
    """A variant with one seed."""

    @property
    def folder(self) -> Path:
        """Where its runs lie, in a folder of its variant."""

    @property
    def result(self) -> Path:
        """What is known of it once it is finished."""


Cells = dict[str, list[Cell]]
"""The cells of a study by the names of its variants, in the order of its table."""


@dataclass(frozen=True)
class Options:
    """Train and judge every variant of the study."""

    out: Path
    """Folder of prepared data; runs and results go there too."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and data order."""
    processes: int = 6
    """Variants that are trained side by side."""
    gpus: int = 1
    """GPUs that they share in turn."""
    only: tuple[str, ...] = ()
    """Names of variants to train, all where none is given; the table has whatever is finished."""


def check(options: Options) -> None:
    """Raise UserError where nothing would run."""
    if not options.seeds:
        raise UserError('--seeds names no seed')
    if min(options.processes, options.gpus) < 1:
        raise UserError('--processes and --gpus must be at least 1')


def chosen(options: Options, cells: Cells) -> Cells:
    """Return the cells of the variants that `only` names; raises UserError for one that is not in the study."""
    for name in options.only:
        if name not in cells:
            raise UserError(f"--only '{name}' is not in this study{nearest(name, cells)}; it has {'; '.join(cells)}")
    return {name: found for name, found in cells.items() if not options.only or name in options.only}


def missing(cells: Cells) -> Cells:
    """Return the cells without a result, of the variants that have such."""
    left = {name: [cell for cell in found if not cell.result.exists()] for name, found in cells.items()}
    return {name: found for name, found in left.items() if found}


def finished(cells: Cells) -> list[tuple[Cell, Row]]:
    """Return the cells that have a result, and that."""
    done = (cell for found in cells.values() for cell in found if cell.result.exists())
    return [(cell, json.loads(cell.result.read_text())) for cell in done]


def side_by_side(options: Options, cells: Cells, worker: Callable[[str], Sequence[object]]) -> None:
    """Run each variant's cells in a process of its own: `python -m`, and the words that `worker` gives for its name."""
    with ThreadPoolExecutor(options.processes) as pool:
        waiting = [(number, cells[name][0].folder.parent.name, worker(name)) for number, name in enumerate(cells)]
        ended = pool.map(lambda each: run_process(options, *each), waiting)
        for _ in track(ended, 'variants', total=len(waiting), console=Console(stderr=True)):
            pass


def run_process(options: Options, number: int, name: str, words: Sequence[object]) -> None:
    """Run a process on one of the GPUs; what it says goes into a log."""
    log = options.out / 'logs' / f'{name}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    gpu = {'CUDA_VISIBLE_DEVICES': str(number % options.gpus)}
    with log.open('a') as said:
        command = [sys.executable, '-m', *map(str, words)]
        done = subprocess.run(command, stdout=said, stderr=said, check=False, env=os.environ | gpu)
    if done.returncode:
        print(f'{name}: ended with {done.returncode}; see {log}', file=sys.stderr)


def in_turn(judge: Callable[[str, int], Row], variants: Iterable[str], seeds: Iterable[int], results: Path) -> None:
    """Train and judge one cell after the other; keep and print each one's row."""
    variants = tuple(variants)
    for seed in seeds:
        for variant in variants:
            row = judge(variant, seed)
            keep(row, results)
            print(json.dumps(row))


def keep(row: Row, path: Path) -> None:
    """Put a row among the results, in the place of one of the same variant, seed and steps."""
    lines = path.read_text().splitlines() if path.exists() else []
    known = {_place(each): each for each in map(json.loads, lines)} | {_place(row): row}
    path.write_text(''.join(json.dumps(known[place]) + '\n' for place in sorted(known)))


def _place(row: Row) -> tuple[int, str, int]:
    return row['steps'], row['variant'], row['seed']
