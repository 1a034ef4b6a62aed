"""How a recipe fits a data set: options that cut no text and need no more records than there are; first commands."""

import dataclasses
import shlex
from pathlib import Path

from .. import config, recipes
from ..config.ranges import MILLION
from ..data import pipeline
from ..data.dataset import Dataset
from ..errors import UserError
from .check_data import option, positions
from .init_params import complete, longest
from .stages import STAGES

FEW = 20
"""Records; where `train` has fewer, a tenth of it is no split to validate on."""
MANY = 20_000
"""Records; with more, `first_commands` does not read them all to know how long their texts are."""
_RECIPES = {
    False: {stage: f'easy_vqa_{stage}' for stage in ('vision', 'stage1', 'language', 'stage2', 'instruct')},
    True: {stage: f'digits_{stage}' for stage in ('stage1', 'language', 'stage2', 'instruct')},
}
"""Whether the records hold features -> the recipes that train tiny networks from nothing, in their order."""
_STARTS = {
    'stage1': {'vit': 'vision'},
    'stage2': {'checkpoint': 'stage1', 'lm': 'language'},
    'instruct': {'checkpoint': 'stage2'},
}
"""Stage -> the option of `start` -> the stage whose run it names."""


def fitting(run: config.Run, dataset: Dataset) -> list[str]:
    """Return the options with which a recipe trains on a data set as it is, such as `--data.max-text 12`.

    No text is cut, the batch is no larger than the split, and validation has two records at least, or none. Raises
    UserError where the recipe does not fit: a split is missing, or holds nothing that the stage reads.
    """
    run, words, row_format = complete(run, dataset), [], STAGES[run.stage].row_format
    data = run.data

    def records(split: str) -> int:
        whole = dataclasses.replace(run, training=dataclasses.replace(run.training, batch_size=MILLION))
        return pipeline.held_out_sizes(whole, row_format, dataset, split, devices=1)[0]

    if data.validation_split and len(dataset.counts['train']) < FEW:
        held_out = 'test' if 'test' in dataset.splits and records('test') > 1 else ''
        words.append(f'--data.train-split train --data.validation-split {held_out or repr("")}')
        data = dataclasses.replace(data, train_split='train', validation_split=held_out)
    for field, tokens in longest(dataclasses.replace(run, data=data), dataset).items():
        if tokens > getattr(data, field):
            words.append(f'--data.{option(field)} {tokens}{positions(run, field, tokens)}')
    if (count := records(data.train_split)) < run.training.batch_size:
        words.append(f'--training.batch-size {2 ** (count.bit_length() - 1)}')
    return words


def first_commands(data: Path) -> list[str]:
    """Return the commands that train tiny networks on a new data set and judge them, in their order."""
    dataset, runs = Dataset.open(data), Path('runs') / data.name
    captions, questions = dataset.counts['train'][:, [0, 1]].sum(axis=0)
    general = [f'qformer train RECIPE --run RUN --data.path {quote(data)}']
    if not captions or sum(map(len, dataset.counts.values())) > MANY:
        return general
    commands, names = [], _RECIPES[bool(dataset.feature_shape)]
    for stage, name in names.items():
        if stage == 'instruct' and not questions:
            continue
        run = recipes.load(name)[0]
        words = [f'qformer train {name} --run {quote(runs / stage)} --data.path {quote(data)}']
        words += [f'--start.{p} {quote(runs / s)}' for p, s in _STARTS.get(stage, {}).items() if s in names]
        try:
            commands.append(' '.join([*words, *fitting(run, dataset)]))
        except UserError:  # some data sets, such as one record, are for recipes that the user writes
            return general
        if task := STAGES[stage].task:
            split = split_option(data, run.data.validation_split if len(dataset.counts['train']) >= FEW else '')
            commands.append(f'qformer evaluate {quote(runs / stage)} --task {task}{split}')
    return commands


def split_option(data: Path | str, validation: str) -> str:
    """Return the option that names what a run is judged on: none for `test`, which commands take by themselves."""
    splits = Dataset.open(data).splits
    if 'test' in splits:
        return ''
    others = [split for split in splits if split != 'train']
    return f' --split {quote(others[0] if others else validation or "train")}'


def quote(word: Path | str) -> str:
    """Return a word as a shell reads it."""
    return shlex.quote(str(word))
