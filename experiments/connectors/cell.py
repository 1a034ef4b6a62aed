"""One cell of a table: a variant with one seed, trained and judged.

    python -m experiments.connectors.cell --out runs/connectors --name "Q-Former" --seeds 0

Stage 1 on the captions of all three data sets (where there is a text side), then instruction tuning through the frozen
language model: what is on the icon, where is it, and easy-VQA's questions. Each stage's peak rate is the better one of
two: seed 0 trains with both, and all seeds take what served it best.
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
import tyro

from experiments.ablations.variants import VARIANTS as ABLATIONS
from experiments.connectors import cost
from experiments.connectors.language import CAPTION
from experiments.connectors.prepare import DATA
from experiments.connectors.variants import VARIANTS, Variant
from qformer_jax import config
from qformer_jax.errors import command
from qformer_jax.evaluation import task
from qformer_jax.rules import TEXT_SIDE
from qformer_jax.runs import run_dir
from qformer_jax.training import loop
from qformer_jax.training.logs import records

STAGE1_RATES = (3e-4, 1e-3)
INSTRUCT_RATES = (5e-4, 2e-3)


@dataclass(frozen=True)
class Budget:
    """What every variant gets."""

    stage1_steps: int = 800
    """Steps of stage 1."""
    steps: int = 1200
    """Steps of instruction tuning."""
    batch_size: int = 128
    """Rows a step."""


@dataclass(frozen=True)
class Cell:
    """A variant with one seed under `out`."""

    out: Path
    variant: Variant
    seed: int
    budget: Budget

    @property
    def folder(self) -> Path:
        """Where its runs lie."""
        return self.out / 'runs' / re.sub(r'\W+', '_', self.variant.name).strip('_') / f'seed{self.seed}'

    @property
    def result(self) -> Path:
        """What is known of it once it is finished."""
        return self.folder / 'result.json'

    def features(self, name: str) -> Path:
        """Return the data set of that name, as this variant reads it."""
        return self.out / self.variant.features / name

    @property
    def language(self) -> Path:
        """The frozen language model."""
        return self.out / 'runs' / 'language'

    @property
    def begins(self) -> Path | None:
        """The run that stage 1 begins as, where it is not random."""
        return self.out / 'runs' / self.variant.begins if self.variant.begins else None

    def data(self) -> config.Data:
        """Return what both stages read."""
        first, *others = map(str, map(self.features, DATA))
        return config.Data(
            path=first, mixed_with=tuple(others), validation_split='validation', max_text=16, max_lm_text=24,
            crop_scale=(1.0, 1.0), flip=False, question_prompt=('{question}',), caption_prompt=(CAPTION,),
        )  # fmt: skip

    def stage1(self, rate: float) -> run_dir.Finished:
        """Train stage 1 with this peak rate, or find it done."""
        model = replace(self.variant.model, lm=None, connector=None)
        run = config.Run(
            stage='stage1',
            model=model,
            data=self.data(),
            objective=replace(self.variant.objective, instruction_aware=False),
            optimizer=_optimizer(rate, self.budget.stage1_steps, (*self.variant.rate_rules, ('.*', 1.0))),
            training=self._training(self.budget.stage1_steps),
            start=config.Start(checkpoint=str(self.begins or '')),
        )
        return loop.train(run, self.folder / f'stage1_{rate:g}')

    def instruct(self, rate: float, aligned: run_dir.Finished | None) -> run_dir.Finished:
        """Train through the frozen language model with this peak rate, from stage 1 where there was one."""
        resting = () if self.variant.reads else ((TEXT_SIDE, None),)
        rules = (('lm/.*', None), *resting, *self.variant.rate_rules, ('.*', 1.0))
        run = config.Run(
            stage='instruct',
            model=self.variant.model,
            data=self.data(),
            objective=replace(self.variant.objective, static_queries=0.0),
            optimizer=_optimizer(rate, self.budget.steps, rules),
            training=self._training(self.budget.steps),
            start=config.Start(checkpoint=str(aligned.folder) if aligned else '', lm=str(self.language)),
        )
        return loop.train(run, self.instructed(rate))

    def instructed(self, rate: float) -> Path:
        """Return the folder of instruction tuning with this peak rate."""
        return self.folder / f'instruct_{rate:g}'

    def _training(self, steps: int) -> config.Training:
        return config.Training(
            steps=steps, batch_size=self.budget.batch_size, seed=self.seed, checkpoint_every=steps, validation_batches=4
        )

    def search(self) -> tuple[dict[float, float], dict[float, float]]:
        """Return what seed 0 reaches in validation with each peak rate, trained to the end.

        First the loss of stage 1 ({} where there is none), then, behind the better of these, the share of right answers
        after instruction tuning: its loss would not do, which rises with each name that is confidently missed, when
        more and more of them are right, nor would fewer steps, where a rate that is too high may lead. Other seeds read
        it in seed 0's result.
        """
        first, aligned, losses = replace(self, seed=0), None, {}
        if first.result.exists():
            known = json.loads(first.result.read_text())['search'].values()
            return tuple({float(rate): x for rate, x in found.items()} for found in known)
        if self.variant.stage1:
            losses = {rate: _validated(first.stage1(rate)) for rate in STAGE1_RATES}
            aligned = first.stage1(min(losses, key=losses.get))
        return losses, {rate: first.served(first.instruct(rate, aligned)) for rate in INSTRUCT_RATES}

    def run(self) -> dict:
        """Train and judge, or read what is known."""
        if self.result.exists():
            return json.loads(self.result.read_text())
        losses, shares = self.search()
        stage1_rate = min(losses, key=losses.get, default=0.0)
        aligned = self.stage1(stage1_rate) if self.variant.stage1 else None
        rate = max(shares, key=shares.get)
        done = self.instruct(rate, aligned)
        found = {
            'variant': self.variant.name,
            'seed': self.seed,
            'hardware': f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}',
            'fingerprint': done.fingerprint,
            'peak rate': rate,
            'peak rate of stage 1': stage1_rate,
            'search': {'loss of stage 1': losses, 'right answers': shares},
            'steps': self.budget.steps,
            'steps of stage 1': self.budget.stage1_steps if aligned else 0,
            **(self.evaluate_alignment(aligned) if aligned else {}),
            **self.evaluate_answers(done),
            **cost.of(done.run),
        }
        self.result.write_text(json.dumps(found, indent=1))
        return found

    def evaluate_alignment(self, done: run_dir.Finished) -> dict[str, float]:
        """Return what the stage-1 run retrieves of the held-out vendor."""
        found = task.evaluate(done.folder, 'retrieval', 'vendor', self.features('icons'))
        return {
            'icon to name R@1': found['picture to text, re-ranked R@1'],
            'name to icon R@1': found['text to picture, re-ranked R@1'],
            'icon to name R@1, ITC alone': found['picture to text R@1'],
            'name to icon R@1, ITC alone': found['text to picture R@1'],
            'ITM accuracy': found['ITM accuracy'],
            'ITM, always no': found['ITM, always no'],
        }

    def evaluate_answers(self, done: run_dir.Finished) -> dict[str, float]:
        """Return how well it names icons of the held-out vendor, finds them, and answers easy-VQA's questions."""
        captions, places, answers = self._asked(done, 'vendor', 'test')
        return {
            'name, exact match': captions['exact match'],
            'shuffled minus matched (nats/token)': captions['shuffled minus matched'],
            'place': places['accuracy'],
            'easy-VQA': answers['accuracy'],
            'easy-VQA, shuffled': answers['with shuffled pictures'],
        }

    def served(self, done: run_dir.Finished) -> float:
        """Return the mean share of names, places and answers that are right in validation."""
        captions, places, answers = self._asked(done, 'validation', 'validation')
        return (captions['exact match'] + places['accuracy'] + answers['accuracy']) / 3

    def _asked(self, done: run_dir.Finished, icons: str, easy_vqa: str) -> list[dict[str, float]]:
        """Return what it answers of a split of the icons, of the canvases, and of easy-VQA."""
        tasks = ('caption', icons, 'icons'), ('vqa', icons, 'canvases'), ('vqa', easy_vqa, 'easy_vqa')
        return [task.evaluate(done.folder, name, split, self.features(data)) for name, split, data in tasks]


def _validated(done: run_dir.Finished) -> float:
    """Return a run's last validation loss."""
    return [r['loss'] for r in records(done.folder) if r['kind'] == 'validation'][-1]


def _optimizer(rate: float, steps: int, rules: config.Rules) -> config.Optimizer:
    return config.Optimizer(
        peak_rate=rate, final_rate=rate / 20, warmup_steps=max(1, steps // 20), clip_norm=1.0, rate_rules=rules
    )


@dataclass(frozen=True)
class Options:
    """Train and judge one variant of the study with some seeds; what is finished is not run again."""

    out: Path
    """Folder that `python -m experiments.connectors.prepare` filled."""
    name: Literal[*(variant.name for variant in (*VARIANTS, *ABLATIONS))]
    """Of the variant."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and data order."""
    budget: Budget = field(default_factory=Budget)


def main(options: Options) -> None:
    """Run the cells of the variant of that name."""
    variant = next(v for v in (*VARIANTS, *ABLATIONS) if v.name == options.name)
    for seed in options.seeds:
        Cell(options.out, variant, seed, options.budget).run()


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
