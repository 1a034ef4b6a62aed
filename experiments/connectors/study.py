"""Cells of connectors, run side by side, timed and tabulated: this study's, and those of the ablations."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from experiments import sweep
from experiments.connectors import cost, report
from experiments.connectors.cell import Budget, Cell
from experiments.connectors.prepare import DATA
from experiments.connectors.variants import Variant
from qformer_jax.errors import UserError
from qformer_jax.runs import run_dir


@dataclass(frozen=True)
class Options(sweep.Options):
    """Train and judge every variant over the data that `python -m experiments.connectors.prepare` made in OUT."""

    budget: Budget = field(default_factory=Budget)


def run(options: Options, variants: tuple[Variant, ...], folder: Path) -> None:
    """Run a study and write its results into `folder`; exits with an error where cells are missing.

    Raises UserError for a variant that is not in the study, or whose data nobody has prepared.
    """
    sweep.check(options)
    cells = {v.name: [Cell(options.out, v, seed, options.budget) for seed in options.seeds] for v in variants}
    chosen = sweep.chosen(options, cells)
    waiting = sweep.missing(chosen)
    for found in waiting.values():
        check_prepared(found[0])
    sweep.side_by_side(options, waiting, lambda name: _worker(options, name))
    rows = [row | timed(cell, row['peak rate']) for cell, row in sweep.finished(cells)]
    if rows:
        print(f'{len(rows)} cells; wrote {", ".join(map(str, report.write(rows, folder)))}')
    if missing := sum(map(len, sweep.missing(chosen).values())):
        sys.exit(f'{missing} cells are missing: see above; the same command goes on')


def _worker(options: Options, name: str) -> list[object]:
    budget = (f'--budget.{k.replace("_", "-")}={v}' for k, v in vars(options.budget).items())
    return ['experiments.connectors.cell', '--out', options.out, '--name', name, '--seeds', *options.seeds, *budget]


def check_prepared(cell: Cell) -> None:
    """Raise UserError where something is missing that a cell reads."""
    for needed in (*map(cell.features, DATA), cell.language, cell.begins):
        if needed and not needed.exists():
            raise UserError(
                f"'{cell.variant.name}' reads {needed}, which is not there: python -m experiments.connectors.prepare "
                'makes it, or for another tower block or MiniLM python -m experiments.ablations.prepare'
            )


def timed(cell: Cell, rate: float) -> dict[str, float]:
    """Return what a step of instruction tuning takes, alone on the device; measured once a variant."""
    file = cell.folder.parent / 'timing.json'
    if not file.exists():
        done = run_dir.finished(cell.instructed(rate))
        file.write_text(json.dumps(cost.measured(done.run, run_dir.load_components(done))))
    return json.loads(file.read_text())
