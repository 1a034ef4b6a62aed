"""One training for any number of queries, against a training for each number.

    python -m experiments.ablations.nested --out runs/connectors

Judges the cells that `python -m experiments.ablations` trained, with fewer of their queries:

    alone     trained with m queries, as every other m
    nested    trained once with nested queries (1, 2, 4, ..., 32); the first m of them
    cut       trained once with 32 queries, plainly; the first m of them
    carrying  the same, the m that carry most in stage 1 (`qformer queries`), without further training; stage 1 only

Writes nested.jsonl (a line a way, m and seed), nested.md and nested.png here; what was judged is not judged again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.ablations.variants import ALONE, NESTED
from experiments.connectors.cell import Budget, Cell
from qformer_jax import cli
from qformer_jax.training import start

HERE = Path(__file__).parent
MOST = NESTED.model.qformer.num_queries
WAYS = {'alone': None, 'nested': NESTED, 'cut': ALONE[MOST], 'carrying': ALONE[MOST]}
"""Way -> the variant of which the first m queries are taken."""
MEASURES = (
    'icon to name R@1', 'icon to name R@1, ITC alone', 'ITM accuracy', 'name, exact match', 'place', 'easy-VQA',
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Judge nested queries beside separate trainings."""

    out: Path
    """Folder of the study."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and data order."""
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of queries to judge."""


def judge(options: Options, way: str, count: int, seed: int) -> dict[str, float]:
    """Return what a way to so many queries reaches."""
    cell = Cell(options.out, WAYS[way] or ALONE[count], seed, Budget())
    aligned = start.finished(cell.folder / 'stage1')
    if way == 'carrying':
        return cell.judge_alignment(_carrying(cell, aligned, count))
    cut = 0 if way == 'alone' or count == MOST else count
    return cell.judge_alignment(aligned, cut) | cell.judge_answers(start.finished(cell.folder / 'instruct'), cut)


def _carrying(cell: Cell, aligned: start.Finished, count: int) -> start.Finished:
    """Return the stage-1 run with those queries that carry most over pictures that it was validated on."""
    order, folder = cell.folder / 'order', cell.folder / f'stage1_{count}_carrying'
    if not (order / 'queries.npz').exists():
        data = '--data', cell.features('icons'), '--split', 'train[:5%]'
        cli.run([str(word) for word in ('queries', aligned.folder, '--out', order, *data)])
    if not folder.exists():
        words = 'convert', aligned.folder, folder, '--queries', count, '--order', order / 'queries.npz'
        cli.run([str(word) for word in words])
    return start.finished(folder)


def table(rows: Sequence[dict]) -> str:
    """Return a Markdown table: a line a measure and way, a column a number of queries."""
    counts = sorted({row['queries'] for row in rows})
    lines = ['| measure | way | ' + ' | '.join(map(str, counts)) + ' |', '|---|---|' + '---:|' * len(counts)]
    for measure in MEASURES:
        for way in WAYS:
            cells = [_values(rows, way, count, measure) for count in counts]
            if any(cells):
                lines.append(f'| {measure} | {way} | ' + ' | '.join(map(_cell, cells)) + ' |')
    return '\n'.join(lines)


def _values(rows: Sequence[dict], way: str, count: int, measure: str) -> list[float]:
    return [row[measure] for row in rows if (row['way'], row['queries']) == (way, count) and measure in row]


def _cell(values: list[float]) -> str:
    if not values:
        return ''
    return f'{np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})'.replace('% to', ' to')


def draw(rows: Sequence[dict], path: Path) -> None:
    """Draw each measure over the number of queries: means, and the range over seeds."""
    figure = Figure(figsize=(12, 6), layout='constrained')
    FigureCanvasAgg(figure)
    for axes, measure in zip(figure.subplots(2, 3).flat, MEASURES, strict=True):
        for way in WAYS:
            found = {count: _values(rows, way, count, measure) for count in sorted({row['queries'] for row in rows})}
            found = {count: values for count, values in found.items() if values}
            if not found:
                continue
            means = [np.mean(values) for values in found.values()]
            (line,) = axes.plot(list(found), means, marker='o', label=way)
            lows, highs = (list(map(f, found.values())) for f in (min, max))
            axes.fill_between(list(found), lows, highs, color=line.get_color(), alpha=0.15)
        axes.set(title=measure, xlabel='queries')
        axes.set_xscale('log', base=2)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main(options: Options) -> None:
    """Judge, and write the results."""
    rows = []
    for way in WAYS:
        for count in options.counts:
            for seed in options.seeds:
                rows.append({'way': way, 'queries': count, 'seed': seed} | judge(options, way, count, seed))
    files = [HERE / f'nested{suffix}' for suffix in ('.jsonl', '.md', '.png')]
    files[0].write_text(''.join(json.dumps(row) + '\n' for row in rows))
    files[1].write_text(table(rows) + '\n')
    draw(rows, files[2])
    print(f'wrote {", ".join(map(str, files))}')


if __name__ == '__main__':
    main(tyro.cli(Options))
