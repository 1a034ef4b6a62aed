"""The cells of a study as a table and a picture: mean and range over the seeds, beside what each variant costs."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SHARES = (
    'icon to name R@1, ITC alone', 'name to icon R@1, ITC alone', 'icon to name R@1', 'name to icon R@1',
    'ITM accuracy', 'name, exact match', 'place', 'easy-VQA',
)  # fmt: skip
NATS = 'shuffled minus matched (nats/token)'
COSTS = (
    'LLM tokens', 'trained parameters', 'MFLOP, connector', 'MFLOP, LLM', 'ms a step', 'MiB a step', 'peak rate',
    'peak rate of stage 1',
)  # fmt: skip
QUALITY = ('name, exact match', 'place', 'easy-VQA')
"""What the picture averages."""


def write(rows: Sequence[dict], folder: Path) -> list[Path]:
    """Write results.jsonl, table.md and pareto.png; returns their paths."""
    files = [folder / name for name in ('results.jsonl', 'table.md', 'pareto.png')]
    files[0].write_text(''.join(json.dumps(row) + '\n' for row in rows))
    files[1].write_text(table(rows) + '\n')
    pareto(rows, files[2])
    return files


def of_variant(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Return the rows of each variant, in the order of their first."""
    found = {}
    for row in rows:
        found.setdefault(row['variant'], []).append(row)
    return found


def table(rows: Sequence[dict]) -> str:
    """Return a Markdown table, a row a variant; where the range reaches the best one's, the mean is bold: a tie.

    Variants that have fewer seeds than others, as when a study was stopped, say so behind their names.
    """
    measures = [name for name in (*SHARES, NATS) if any(name in row for row in rows)]
    ties = {name: _lowest_of_best(rows, name) for name in measures}
    costs = [name for name in COSTS if any(name in row for row in rows)]
    lines = [
        '| connector | ' + ' | '.join([*measures, *costs]) + ' |',
        '|---|' + '---:|' * (len(measures) + len(costs)),
    ]
    groups = of_variant(rows)
    most = max(map(len, groups.values()))
    for name, group in groups.items():
        name += f' ({len(group)} of {most} seeds)' if len(group) < most else ''
        cells = [_cell(group, measure, ties[measure]) for measure in measures]
        lines.append(f'| {name} | ' + ' | '.join([*cells, *(_cost(group[0], cost) for cost in costs)]) + ' |')
    return '\n'.join(lines)


def _values(group: Sequence[dict], measure: str) -> list[float]:
    return [row[measure] for row in group if measure in row]


def _lowest_of_best(rows: Sequence[dict], measure: str) -> float:
    """Return the lowest seed of the variant whose mean is best."""
    groups = [_values(group, measure) for group in of_variant(rows).values()]
    return min(max((group for group in groups if group), key=np.mean))


def _cell(group: Sequence[dict], measure: str, tie: float) -> str:
    values = _values(group, measure)
    if not values:
        return 'n/a'
    show = '{:.2f}' if measure == NATS else '{:.1%}'
    low, mean, high = (show.format(f(values)) for f in (min, np.mean, max))
    mean = f'**{mean}**' if max(values) >= tie else mean
    return mean if low == high else f'{mean} ({low.rstrip("%")} to {high.rstrip("%")})'


def _cost(row: dict, name: str) -> str:
    if name not in row:
        return 'not measured'
    return f'{row[name]:,.0f}' if row[name] >= 10 else f'{row[name]:.2g}'


def pareto(rows: Sequence[dict], path: Path) -> None:
    """Draw quality (the mean of three tasks) against the language model's tokens, and against all FLOPs of a row."""
    figure = Figure(figsize=(14, 6), layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    groups = of_variant(rows)
    tokens = [group[0]['LLM tokens'] for group in groups.values()]
    counts = sorted(set(tokens))
    beside = [tokens[:i].count(x) - (tokens.count(x) - 1) / 2 for i, x in enumerate(tokens)]
    axes_of = (
        ('tokens that the language model reads of a picture', list(map(counts.index, tokens)), beside),
        (
            'MFLOP a row, connector and language model',
            [group[0]['MFLOP, connector'] + group[0]['MFLOP, LLM'] for group in groups.values()],
            [0.0] * len(groups),
        ),
    )
    for axes, (label, costs, aside) in zip(panels, axes_of, strict=True):
        points = [(x, [_quality(row) for row in group]) for x, group in zip(costs, groups.values(), strict=True)]
        _frontier(axes, points)
        for number, ((x, values), shift, name) in enumerate(zip(points, aside, groups, strict=True), 1):
            mean, x = np.mean(values), x + shift * 0.06
            spread = [[mean - min(values)], [max(values) - mean]]
            axes.errorbar(x, mean, yerr=spread, fmt='o', color=f'C{number % 10}', capsize=3, label=f'{number} {name}')
            axes.annotate(str(number), (x, mean), xytext=(4, 4), textcoords='offset points', fontsize=8)
        axes.set_xlabel(label)
    panels[0].set_xticks(range(len(counts)), [str(count) for count in counts])
    panels[1].set_xscale('log')
    panels[0].set_ylabel(f'mean of {", ".join(QUALITY)}; bars: seeds')
    panels[1].legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def _quality(row: dict) -> float:
    return float(np.mean([row[name] for name in QUALITY]))


def _frontier(axes, points: list[tuple[float, list[float]]]) -> None:
    """Draw the line that nothing cheaper is above."""
    best, line = -1.0, []
    for x, values in sorted(points, key=lambda point: (point[0], -np.mean(point[1]))):
        if np.mean(values) > best:
            best = float(np.mean(values))
            line.append((x, best))
    axes.plot(*zip(*line, strict=True), color='grey', linewidth=1, zorder=0, drawstyle='steps-post')
