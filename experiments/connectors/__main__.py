"""The study: every connector with the same data, steps, batch, search of the learning rate, and seeds.

    python -m experiments.connectors --out runs/connectors

Cells (a connector with one seed) run in processes side by side; each is trained and judged once, so that the command
may be stopped and called again. Then every connector's step is timed alone. Writes, in experiments/connectors/,
results.jsonl (a line a cell), table.md and pareto.png.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import track

from experiments.connectors import report
from experiments.connectors.cell import Budget, Cell
from experiments.connectors.variants import VARIANTS, Variant

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """Train and judge every connector of the study."""

    out: Path
    """Folder that `python -m experiments.connectors.prepare` filled; runs and results go there too."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and data order."""
    processes: int = 6
    """Connectors that are trained side by side on the device."""
    budget: Budget = field(default_factory=Budget)
    only: tuple[str, ...] = ()
    """Names of connectors; all, where none is given."""


def run(options: Options, variants: tuple[Variant, ...], module: str) -> list[dict]:
    """Run all cells that are not finished, a process a variant, and return what is known of each."""
    chosen = [v for v in variants if not options.only or v.name in options.only]
    waiting = [v for v in chosen if any(not c.result.exists() for c in _cells(options, v))]
    with ThreadPoolExecutor(options.processes) as pool:
        for _ in track(
            pool.map(lambda variant: _process(options, variant, module), waiting),
            'connectors', total=len(waiting), console=Console(stderr=True),
        ):  # fmt: skip
            pass
    return [json.loads(c.result.read_text()) for v in chosen for c in _cells(options, v) if c.result.exists()]


def _cells(options: Options, variant: Variant) -> list[Cell]:
    return [Cell(options.out, variant, seed, options.budget) for seed in options.seeds]


def _process(options: Options, variant: Variant, module: str) -> None:
    """Train and judge a variant's cells in a process of its own; what it says goes into a log."""
    log = options.out / 'logs' / f'{_cells(options, variant)[0].folder.parent.name}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    words = ['--out', options.out, '--name', variant.name, '--seeds', *options.seeds]
    words += [f'--budget.{k.replace("_", "-")}={v}' for k, v in vars(options.budget).items()]
    with log.open('a') as said:
        done = subprocess.run([sys.executable, '-m', module, *map(str, words)], stdout=said, stderr=said, check=False)
    if done.returncode:
        print(f'{variant.name}: ended with {done.returncode}; see {log}', file=sys.stderr)


def main(options: Options) -> None:
    """Run the study and write its results."""
    rows = run(options, VARIANTS, 'experiments.connectors.cell')
    files = report.write(rows, HERE)
    print(f'{len(rows)} cells; wrote {", ".join(map(str, files))}')


if __name__ == '__main__':
    main(tyro.cli(Options))
