"""The study behind the demo: every stage with three seeds, plain and instruction-aware queries.

    python -m experiments.easy_vqa.study --out study --seeds 0 1 2

Writes one JSON line a seed to experiments/easy_vqa/results.jsonl and prints the Markdown table of all of them. A second
call resumes or reuses what is there.
"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from qformer_jax.errors import command

from .line import STAGES, Line

RESULTS = Path(__file__).parent / 'results.jsonl'


@dataclass(frozen=True)
class Options:
    """Train and judge the easy-VQA line with several seeds."""

    out: Path = Path('study')
    """Folder of the runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and data order."""


def study_seed(line: Line) -> dict:
    """Train and judge one seed; returns its row."""
    stages = (*STAGES, 'instruct_aware')
    for stage in stages:
        line.train(stage)
    alignment, captions = line.evaluate('stage1', 'retrieval'), line.evaluate('stage2', 'caption')
    plain, aware = line.evaluate('instruct', 'vqa'), line.evaluate('instruct_aware', 'vqa')
    return {
        'seed': line.seed,
        'hardware': f'{platform.machine()}, {jax.device_count()} {jax.default_backend()} device(s)',
        'jax': jax.__version__,
        'fingerprints': {stage: line.fingerprint(stage) for stage in stages},
        'seconds': {stage: round(line.seconds(stage), 1) for stage in stages},
        'frozen unchanged': all(line.frozen_unchanged(stage) for stage in stages[2:]),
        'ITC, 24-way': alignment['picture to text R@1'],
        'ITM accuracy': alignment['ITM accuracy'],
        'caption, exact match': captions['exact match'],
        'caption loss, shuffled minus matched': captions['shuffled minus matched'],
        'zero-shot VQA after captions': line.evaluate('stage2', 'vqa')['accuracy'],
        'VQA, plain queries': plain['accuracy'],
        'VQA, plain, shuffled pictures': plain['with shuffled pictures'],
        'VQA, instruction-aware queries': aware['accuracy'],
        'VQA, instruction-aware, shuffled pictures': aware['with shuffled pictures'],
        'VQA, text only': plain['text only (commonest answer)'],
    }


def table(rows: list[dict]) -> str:
    """Return the Markdown table: one column a seed, and the range."""
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    lines = [
        '| measure (test split) | ' + ' | '.join(f'seed {r["seed"]}' for r in rows) + ' | range |',
        '|---|' + '---|' * (len(rows) + 1),
    ]
    for name in names:
        values = [row[name] for row in rows]
        show = '{:.2f} nats/token' if 'loss' in name else '{:.2%}'
        cells = [show.format(value) for value in [*values, min(values), max(values)]]
        lines.append(f'| {name} | {" | ".join(cells[:-2])} | {cells[-2]} to {cells[-1]} |')
    return '\n'.join(lines)


def main(options: Options) -> None:
    """Run the study and write its results."""
    rows = []
    for seed in options.seeds:
        line = Line(options.out, seed)
        line.pack()
        rows.append(study_seed(line))
        RESULTS.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    print(table(rows))
    print(f'wrote {RESULTS}')


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
