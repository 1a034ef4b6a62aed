"""One training for any number of queries, against one training for each number.

    python -m experiments.nested --out runs/nested                                  (easy-VQA, 80 minutes of a CPU core)
    python -m experiments.nested --out runs/digits --data digits --counts 1 2 3 4 6 8    (handwritten digits: no tower)

Five ways to m queries, each through stage 1 (retrieval) and stage 2 (captions):

    alone    trained with m queries, as every other m
    nested   trained once with nested queries, for as many steps as one of those; the first m queries
    longer   the same, stage 2 for as many steps as all separate trainings together; stage 2 only
    cut      trained once with all queries, plainly; the first m of them
    best     the same; the m that carry most in stage 1 (`qformer queries`); stage 1 only

Writes a JSON line for each way, m and seed to nested.jsonl, and draws them in nested.png; what is trained or written
already is not made again. The run of `experiments.easy_vqa.line` may lie in the same folder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qformer_jax import recipes
from qformer_jax.errors import command

from .datasets.digits.make import make
from .easy_vqa.line import Line

RESULTS = Path(__file__).with_suffix('.jsonl')
WAYS = ('alone', 'nested', 'longer', 'cut', 'best')
MEASURES = ('ITC R@1', 'ITM accuracy', 'caption, exact match')


@dataclass(frozen=True)
class Options:
    """Train and judge nested queries beside separate trainings."""

    out: Path = Path('runs/nested')
    """Folder of the data set and of the runs."""
    data: Literal['digits', 'easy_vqa'] = 'easy_vqa'
    """Data set, and the recipes of its line."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and data order."""
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of queries to judge; the largest is that of the trainings that are cut."""
    steps: tuple[int, int] = (0, 0)
    """Steps of stage 1 and stage 2; 0: the recipe's."""
    results: Path = RESULTS
    """Where the lines go."""


@dataclass(frozen=True)
class Seed:
    """The trainings with one seed."""

    options: Options
    number: int

    @cached_property
    def line(self) -> Line:
        """Where data and towers lie."""
        return Line(self.options.out, self.number)

    def prepare(self) -> None:
        """Pack the data and train the towers, where that is not done."""
        if self.options.data == 'easy_vqa':
            self.line.pack()
            self.line.train('vision')
            self.line.train('language')
            return
        if not self.line.data.exists():
            make(self.options.out / 'source')
            self.line.command('data', 'pack', 'features', self.line.data, '--path', self.options.out / 'source')
        self._train('language', self.line.run('language'))

    def _train(self, stage: str, folder: Path, *words: object) -> Path:
        given = '--data.path', self.line.data, '--training.seed', self.number
        self.line.command('train', f'{self.options.data}_{stage}', '--run', folder, *given, *words)
        return folder

    def trained(self, stage: Literal['stage1', 'stage2'], queries: int, nested: bool, times: int = 1) -> Path:
        """Return the run of a stage with so many queries (and times the steps), after training what it starts from."""
        name = f'{"nested" if nested else "plain"}{queries}_{stage}'
        folder = self.line.run(f'{name}_{times}_times' if times > 1 else name)
        words = ['--model.qformer.num-queries', queries]
        words += ['--objective.nested-queries'] if nested else []
        if stage == 'stage2':
            words += ['--start.checkpoint', self.trained('stage1', queries, nested)]
            words += ['--start.lm', self.line.run('language')]
        elif self.options.data == 'easy_vqa':
            words += ['--start.vit', self.line.run('vision')]
        usual = recipes.load(f'{self.options.data}_{stage}')[0].training.steps
        steps = times * (self.options.steps[stage == 'stage2'] or usual)
        if steps != usual:
            words += ['--training.steps', steps, '--optimizer.warmup-steps', min(25, steps // 4)]
            words += ['--training.checkpoint-every', steps]
        return self._train(stage, folder, *words)

    def best(self, queries: int) -> Path:
        """Return the plain stage-1 run with those of its queries that carry most."""
        whole = self.trained('stage1', max(self.options.counts), nested=False)
        order, folder = whole.with_name('order'), whole.with_name(f'best{queries}_stage1')
        if not order.exists():
            self.line.command('queries', whole, '--split', 'train[:256]', '--out', order)
        if not folder.exists():
            self.line.command('convert', whole, folder, '--queries', queries, '--order', order / 'queries.npz')
        return folder

    def judge(self, way: str, queries: int) -> dict[str, float]:
        """Return what a way to so many queries reaches on the test split."""
        if way == 'best':
            return self._stage1(self.best(queries), 0)
        trained, cut = (queries, 0) if way == 'alone' else (max(self.options.counts), queries)
        nested, times = way in ('nested', 'longer'), len(self.options.counts) if way == 'longer' else 1
        captions = self._numbers(self.trained('stage2', trained, nested, times), 'caption', cut)
        found = {
            'caption, exact match': captions['exact match'],
            'caption loss (nats/token)': captions['loss, own picture (nats/token)'],
        }
        return found if way == 'longer' else self._stage1(self.trained('stage1', trained, nested), cut) | found

    def _stage1(self, run: Path, cut: int) -> dict[str, float]:
        found = self._numbers(run, 'retrieval', cut)
        return {'ITC R@1': found['picture to text R@1'], 'ITM accuracy': found['ITM accuracy']}

    def _numbers(self, run: Path, task: str, cut: int) -> dict[str, float]:
        words = ['--queries', cut] if cut else []
        self.line.command('evaluate', run, '--task', task, '--data', self.line.data, *words)
        name = f'{task}-test' + (f'-{cut}-queries' if cut else '')
        return json.loads((run / 'evaluation' / f'{name}.json').read_text())['numbers']


def draw(rows: Sequence[dict], path: Path) -> None:
    """Draw each measure over the number of queries: means, and the range over seeds."""
    figure = Figure(figsize=(12, 4), layout='constrained')
    FigureCanvasAgg(figure)
    for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        for number, way in enumerate(WAYS):
            found = {}
            for row in rows:
                if row['way'] == way and measure in row:
                    found.setdefault(row['queries'], []).append(row[measure])
            if found:
                counts = sorted(found)
                axes.plot(counts, [np.mean(found[m]) for m in counts], f'C{number}', marker='o', label=way)
                lows, highs = ([end(found[m]) for m in counts] for end in (min, max))
                axes.fill_between(counts, lows, highs, color=f'C{number}', alpha=0.15)
        axes.set_xscale('log', base=2)
        axes.set(title=measure, xlabel='queries')
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(options: Options) -> None:
    """Run the study, write each line as it is known, and draw them."""
    known = options.results.read_text().splitlines() if options.results.exists() else []
    done = [json.loads(line) for line in known]
    for number in options.seeds:
        seed = Seed(options, number)
        seed.prepare()
        for way in WAYS:
            for queries in options.counts:
                what = {'data': options.data, 'seed': number, 'way': way, 'queries': queries}
                what |= {'of': max(options.counts), 'steps': list(options.steps)}
                if any(what.items() <= row.items() for row in done):
                    continue
                device = f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}'
                done.append(what | seed.judge(way, queries) | {'hardware': device})
                with options.results.open('a') as file:
                    file.write(json.dumps(done[-1]) + '\n')
    picture = options.results.with_suffix('.png')
    draw([row for row in done if row['data'] == options.data], picture)
    print(f'wrote {options.results} and {picture}')


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
