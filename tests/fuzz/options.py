"""Options of `qformer train`: a run that is accepted has sizes and rates that can be computed."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
import tyro

from experiments.robustness import prepare
from experiments.robustness.mutations import Verdict
from qformer_jax import cli, config, recipes
from qformer_jax.commands.parse import parse
from qformer_jax.commands.train import Train
from qformer_jax.data import pipeline
from qformer_jax.data.dataset import Dataset
from qformer_jax.models import blip2
from qformer_jax.training import init_params, optimizer
from qformer_jax.training.check import check
from qformer_jax.training.check_data import check_data
from qformer_jax.training.stages import STAGES

RECIPES = ('easy_vqa_vision', 'easy_vqa_language', 'easy_vqa_stage1', 'easy_vqa_stage2', 'easy_vqa_instruct')
ODD = (
    *('nan', 'inf', '-inf', '-1', '0', '1', '2', '3', '0.5', '1.5', '1e30', '-0.0', str(2**64), str(2**31), '', 'x'),
    *('None', 'True', "('vit/.*', None)", '[', '*', '\u00e9', 'train', 'test', 'all', 'train[', 'train[:0%]'),
    *('bfloat16', 'float64', '/dev/null', '/dev/zero', '.'),
)
DEEPEST = 64
"""Blocks; more are legal, and take long to write down."""


def make(home: Path) -> None:
    """Pack a small data set."""
    cli.run(['data', 'pack', 'folder', str(home / 'data'), '--path', str(prepare.pictures(home / 'source'))])


def fields(part: object, prefix: str = '') -> Iterator[str]:
    """Yield the options of a recipe."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        name = f'{prefix}{field.name}'.replace('_', '-')
        if dataclasses.is_dataclass(value):
            yield from fields(value, f'{name}.')
        elif value is not None:
            yield name


def read(words: list[str], home: Path) -> None:
    """Do what `qformer train` does before its first step, but for what it starts from."""
    default, _ = recipes.load(words[0])
    options = parse(tyro.conf.AvoidSubcommands[Train], words[1:], prog='qformer train', default=Train(default))
    run: config.Run = options.config
    check(run)
    dataset = Dataset.open(run.data.path)
    run = init_params.complete(run, dataset)
    check_data(run, dataset, devices=1)
    rates = np.asarray(optimizer.rates(run.optimizer, min(run.training.steps, 10_000)))
    assert np.isfinite(rates).all() and (rates >= 0).all(), rates
    parts = [part for part in (run.model.vit, run.model.qformer, run.model.lm) if part]
    if max(part.depth for part in parts) <= DEEPEST:
        shapes = blip2.shapes(run.model)
        assert all(0 not in x.shape for x in jax.tree.leaves(shapes)), 'a parameter without a value'
    options = {'training': True, 'features': False}
    if run.training.batch_size <= 64:
        next(pipeline.batches(run, STAGES[run.stage].row_format, dataset, run.data.train_split, **options))


def cases(home: Path, draw: random.Random) -> Iterator[tuple[str, Verdict, Callable[[], None]]]:
    """Yield without end: words of a command, what to expect, and the function that reads them."""
    while True:
        recipe = draw.choice(RECIPES)
        default, _ = recipes.load(recipe)
        words = [recipe, '--run', str(home / 'run'), '--data.path', str(home / 'data')]
        words += ['--training.batch-size', '8', '--optimizer.warmup-steps', '1']
        for _ in range(draw.randrange(1, 3)):
            option = draw.choice(sorted(fields(default)))
            words += [f'--{option}', *(draw.choice(ODD) for _ in range(draw.choice((1, 1, 1, 2))))]
        yield ' '.join(words[9:]), 'either', partial(read, words, home)
