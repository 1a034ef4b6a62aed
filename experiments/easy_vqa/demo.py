"""`make demo`: the whole line with one seed, its gates, and pictures of what came out.

    python -m experiments.easy_vqa.demo --out demo

Writes demo/results.json, demo/answers.png and demo/loss.png. A second run resumes or reuses.
"""

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from qformer_jax.data.dataset import Dataset
from qformer_jax.errors import command
from qformer_jax.training.logs import records

from .line import STAGES, Line


@dataclass(frozen=True)
class Options:
    """Train BLIP-2 on easy-VQA from nothing, and judge it on the official test questions."""

    out: Path = Path('demo')
    """Folder for everything that is written."""
    seed: int = 0
    """Seed of weights and data order in every stage."""


@dataclass(frozen=True)
class Gate:
    """One row of the table: a measured share, the bar it must reach, and what blindness would give."""

    name: str
    value: float
    bar: float | None
    blind: str

    @property
    def passed(self) -> bool:
        """Whether the bar is reached; a row without one is shown for what it is."""
        return self.bar is None or self.value >= self.bar


def measure(line: Line) -> list[Gate]:
    """Evaluate the finished line on the test split."""
    alignment = line.evaluate('stage1', 'retrieval')
    captions = line.evaluate('stage2', 'caption')
    zero_shot = line.evaluate('stage2', 'vqa')
    trained = line.evaluate('instruct', 'vqa')
    text_only = f'{trained["text only (commonest answer)"]:.1%} text only'
    frozen = all(line.frozen_unchanged(stage) for stage in ('stage1', 'stage2', 'instruct'))
    return [
        Gate('stage 1: picture finds its caption (24-way ITC)', alignment['picture to text R@1'], 0.95, '4.2%'),
        Gate('stage 1: matched or not (ITM)', alignment['ITM accuracy'], 0.95, '66.7% always no'),
        Gate('stage 2: caption written exactly', captions['exact match'], None, '4.2%'),
        Gate('stage 2: questions, never trained on them', zero_shot['accuracy'], None, text_only),
        Gate('instruct: questions', trained['accuracy'], 0.99, text_only),
        Gate('instruct: questions, pictures shuffled', trained['with shuffled pictures'], None, text_only),
        Gate('vision tower and language model frozen, byte for byte', float(frozen), 1.0, ''),
    ]


def show(gates: list[Gate]) -> None:
    """Print the table."""
    table = Table(title='easy-VQA, official test split (880 captioned pictures; 9,673 questions)')
    for name in ('measure', 'value', 'bar', 'without seeing', ''):
        table.add_column(name, justify='left' if name == 'measure' else 'right')
    for gate in gates:
        bar = '' if gate.bar is None else f'{gate.bar:.0%}'
        mark = '' if gate.bar is None else '[green]pass[/]' if gate.passed else '[red]FAIL[/]'
        table.add_row(gate.name, f'{gate.value:.2%}', bar, gate.blind, mark)
    Console(width=120).print(table)


def draw_answers(line: Line, path: Path, columns: int = 4, rows: int = 3) -> None:
    """Draw test pictures with a question, the model's answer and the true one."""
    lines = (line.run('instruct') / 'evaluation' / 'vqa-test.jsonl').read_text().splitlines()
    predictions = [json.loads(text) for text in lines][:: len(lines) // (columns * rows)]
    pictures = {r.image_id: r.image for r in Dataset.open(line.data).source('test')}
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows), layout='constrained')
    FigureCanvasAgg(figure)
    for place, row in enumerate(predictions[: columns * rows], 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(Image.open(io.BytesIO(pictures[row['image']])))
        axes.set_axis_off()
        truth = ' / '.join(row['answers'])
        right = row['prediction'] in row['answers']
        axes.set_title(
            f'{row["question"]}\nanswer: {row["prediction"]}   truth: {truth}',
            fontsize=9,
            color='#1b6e3c' if right else '#b3261e',
        )
    figure.savefig(path, dpi=120)


def draw_losses(line: Line, path: Path) -> None:
    """Draw the training loss of every stage."""
    figure = Figure(figsize=(3.2 * len(STAGES), 3), layout='constrained')
    FigureCanvasAgg(figure)
    for place, stage in enumerate(STAGES, 1):
        log = records(line.run(stage))
        axes = figure.add_subplot(1, len(STAGES), place)
        for kind, style in (('train', '-'), ('validation', 'o')):
            points = [(r['step'], r['loss']) for r in log if r['kind'] == kind]
            axes.plot(*zip(*points, strict=True), style, linewidth=1, markersize=4, label=kind)
        axes.set_title(stage)
        axes.set_xlabel('step')
        axes.set_ylabel('loss (nats)' if place == 1 else '')
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(options: Options) -> int:
    """Run the line, print the table, draw; returns 1 when a gate is missed."""
    began = time.monotonic()
    line = Line(options.out, options.seed)
    line.pack()
    for stage in STAGES:
        line.train(stage)
    gates = measure(line)
    results = {
        'seed': options.seed,
        'fingerprints': {stage: line.fingerprint(stage) for stage in STAGES},
        'seconds': {stage: round(line.seconds(stage), 1) for stage in STAGES},
        'seconds_of_this_call': round(time.monotonic() - began, 1),
        'numbers': {gate.name: {'value': gate.value, 'bar': gate.bar, 'passed': gate.passed} for gate in gates},
    }
    (options.out / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    draw_answers(line, options.out / 'answers.png')
    draw_losses(line, options.out / 'loss.png')
    print()
    show(gates)
    picture = line.out / 'picture.png'
    picture.write_bytes(Dataset.open(line.data).source('test')[0].image)
    print(
        f'wrote {options.out}/results.json, answers.png and loss.png in {results["seconds_of_this_call"]} s; go on with'
    )
    print(f'  qformer ask {line.run("instruct")} {picture} "what shape is in the image?"')
    print(f'  qformer caption {line.run("stage2")} {picture}')
    print('  qformer train easy_vqa_instruct --help')
    return 0 if all(gate.passed for gate in gates) else 1


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
