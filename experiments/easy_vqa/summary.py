"""The results table of the README: the demo with seed 0, the range over the study's seeds, and the blind baseline.

python -m experiments.easy_vqa.summary          (prints the table from results.jsonl)
"""

import json

from .study import RESULTS

ROWS = (
    ('stage 1: the image finds its caption among 24 (ITC)', 'ITC, 24-way', '4.2 %'),
    ('stage 1: a match or not, hard negatives (ITM)', 'ITM accuracy', '66.7 %, always "no"'),
    ('stage 2: caption exactly right', 'caption, exact match', '4.2 %'),
    ('stage 2: questions, trained on captions only', 'zero-shot VQA after captions', 'text'),
    ('instruction tuning: questions', 'VQA, plain queries', 'text'),
    ('the same, images shuffled', 'VQA, plain, shuffled pictures', 'text'),
    ('the Q-Former reads the question too', 'VQA, instruction-aware queries', 'text'),
)
"""What the README calls a measure, what results.jsonl calls it, and what a model reaches that sees no image."""


def table() -> str:
    """Return the table, in Markdown."""
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    first = next(row for row in results if row['seed'] == 0)
    text = f'{first["VQA, text only"]:.1%}, question text only'.replace('%', ' %')
    lines = ['| easy-VQA, official test split | seed 0 | three seeds | blind baseline |', '|---|---:|---:|---|']
    for name, key, blind in ROWS:
        values = [100 * row[key] for row in results]
        span = f'{min(values):.1f} to {max(values):.1f} %'
        lines.append(f'| {name} | {100 * first[key]:.1f} % | {span} | {text if blind == "text" else blind} |')
    return '\n'.join(lines)


def seconds() -> list[float]:
    """Return the seconds that the training steps of the demo's five stages took, a number a seed."""
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return [sum(spent for stage, spent in row['seconds'].items() if stage != 'instruct_aware') for row in results]


if __name__ == '__main__':
    print(table())
    print(f'\nseconds of training steps: {", ".join(f"{x:.0f}" for x in seconds())}')
