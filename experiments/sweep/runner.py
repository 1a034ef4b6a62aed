"""Runs the cells of a study that are not finished, in processes side by side, and writes its table.

Each cell is trained and judged once, so that a study may be stopped and called again. Then every variant's step is
timed alone. A study's folder gets results.jsonl (a line a cell), table.md and pareto.png.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track

from experiments.sweep import cost, report
from experiments.sweep.cell import Budget, Cell
from experiments.sweep.prepare import DATA
from experiments.sweep.variant import Variant
from qformer_jax.errors import UserError, nearest
from qformer_jax.runs import run_dir


@dataclass(frozen=True)
class Options:
    """Train and judge every variant of the study."""

    out: Path
    """Folder that `python -m experiments.sweep.prepare` filled; runs and results go there too."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and data order."""
    processes: int = 6
    """Variants that are trained side by side."""
    gpus: int = 1
    """GPUs that they share in turn."""
    budget: Budget = field(default_factory=Budget)
    only: tuple[str, ...] = ()
    """Names of variants to train, all where none is given; the table has whatever is finished."""


def run(options: Options, variants: tuple[Variant, ...]) -> list[dict]:
    """Run the chosen cells that are not finished, a process a variant, and return what is known of any.

    Raises UserError for a variant that is not in the study, or whose data nobody has prepared.
    """
    waiting = [variant for variant in _chosen(options, variants) if _missing(options, variant)]
    _check_prepared(options, waiting)
    with ThreadPoolExecutor(options.processes) as pool:
        for _ in track(
            pool.map(lambda place: _process(options, *place), enumerate(waiting)),
            'variants', total=len(waiting), console=Console(stderr=True),
        ):  # fmt: skip
            pass
    rows = []
    for variant in variants:
        done = [cell for cell in _cells(options, variant) if cell.result.exists()]
        rows += [json.loads(cell.result.read_text()) | _timed(done[0]) for cell in done]
    return rows


def _timed(cell: Cell) -> dict[str, float]:
    """Return what a step of instruction tuning takes, alone on the device; measured once."""
    file = cell.folder.parent / 'timing.json'
    if not file.exists():
        done = run_dir.finished(cell.instructed(json.loads(cell.result.read_text())['peak rate']))
        file.write_text(json.dumps(cost.measured(done.run, run_dir.load_components(done))))
    return json.loads(file.read_text())


def _chosen(options: Options, variants: tuple[Variant, ...]) -> list[Variant]:
    names = [variant.name for variant in variants]
    for name in options.only:
        if name not in names:
            raise UserError(f"--only '{name}' is not in this study{nearest(name, names)}; it has {'; '.join(names)}")
    return [v for v in variants if not options.only or v.name in options.only]


def _cells(options: Options, variant: Variant) -> list[Cell]:
    return [Cell(options.out, variant, seed, options.budget) for seed in options.seeds]


def _missing(options: Options, variant: Variant) -> list[Cell]:
    return [cell for cell in _cells(options, variant) if not cell.result.exists()]


def _check_prepared(options: Options, waiting: list[Variant]) -> None:
    """Raise UserError where something is missing that cells read."""
    for variant in waiting:
        cell = Cell(options.out, variant, options.seeds[0], options.budget)
        for needed in (*map(cell.features, DATA), cell.language, cell.begins):
            if needed and not needed.exists():
                raise UserError(
                    f"'{variant.name}' reads {needed}, which is not there: python -m experiments.sweep.prepare "
                    'makes it, or for another tower block or MiniLM python -m experiments.ablations.prepare'
                )


def _process(options: Options, number: int, variant: Variant) -> None:
    """Train and judge a variant's cells in a process of its own; what it says goes into a log."""
    log = options.out / 'logs' / f'{_cells(options, variant)[0].folder.parent.name}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    words = ['--out', options.out, '--name', variant.name, '--seeds', *options.seeds]
    words += [f'--budget.{k.replace("_", "-")}={v}' for k, v in vars(options.budget).items()]
    with log.open('a') as said:
        command = [sys.executable, '-m', 'experiments.sweep', *map(str, words)]
        gpu = {'CUDA_VISIBLE_DEVICES': str(number % options.gpus)}
        done = subprocess.run(command, stdout=said, stderr=said, check=False, env=os.environ | gpu)
    if done.returncode:
        print(f'{variant.name}: ended with {done.returncode}; see {log}', file=sys.stderr)


def study(options: Options, variants: tuple[Variant, ...], folder: Path) -> None:
    """Run a study and write its results into `folder`; exits with an error where cells are missing."""
    if not options.seeds:
        raise UserError('--seeds names no seed')
    if min(options.processes, options.gpus) < 1:
        raise UserError('--processes and --gpus must be at least 1')
    rows = run(options, variants)
    if rows:
        print(f'{len(rows)} cells; wrote {", ".join(map(str, report.write(rows, folder)))}')
    missing = sum(len(_missing(options, variant)) for variant in _chosen(options, variants))
    if missing:
        sys.exit(f'{missing} cells are missing: see above; the same command goes on')
