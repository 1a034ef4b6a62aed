"""The language model that a run starts from: its tokenizer goes with it, and it must be the one that the recipe states.

A data set trains a tokenizer of its own when it is packed. That one serves a language model that begins from nothing;
a pretrained one understands the ids that it was taught, so its run's tokenizer takes the place of the data set's. A
LoRA that its run trained beside it comes too, or is merged before: it is never left behind, nor put over another model.
"""

import dataclasses
from pathlib import Path

from .. import config
from ..data import mixture
from ..data.dataset import Dataset
from ..data.pack import BYTE_BPE
from ..errors import UserError
from ..runs import run_dir

FREE = ('vocab_size', 'max_positions', 'activation')
"""What a recipe may state otherwise: rows (0: the tokenizer's; shapes are compared anyway), the longest row, and T5's
GELU (LAVIS trains with another one than Flan-T5 was made with)."""


def source(run: config.Run) -> run_dir.Finished | None:
    """Return the finished run that gives the language model, or None where it begins from nothing, or is absent."""
    for path in (run.start.checkpoint, run.start.lm) if run.model.lm else ():
        if path and 'lm' in (done := run_dir.finished(path)).last:
            return done
    return None


def open_dataset(run: config.Run) -> Dataset:
    """Open the run's data set, or several as one, with the tokenizer of the language model that the run starts from.

    Raises UserError when there is no data set, when several do not go together, when that language model has no
    tokenizer, or is another one than the recipe's, and for a LoRA without its language model, or the reverse.
    """
    datasets, done = [Dataset.open(path) for path in (run.data.path, *run.data.mixed_with)], source(run)
    _check_lora(run, done)
    if done is None:
        return mixture.join(datasets)
    _check_same(run.model.lm, done)
    path = done.folder / BYTE_BPE
    if not path.is_file():
        raise UserError(
            f"'{done.folder}' has a language model without its tokenizer: qformer convert it with --lm-tokenizer"
        )
    return mixture.join([dataclasses.replace(dataset, lm_file=path) for dataset in datasets])


def _check_same(stated: config.LmConfig, done: run_dir.Finished) -> None:
    """Raise UserError when the recipe states another model: not every difference shows in a shape."""
    there, here = (dataclasses.asdict(lm) for lm in (done.run.model.lm, stated))
    if there['family'] != here['family']:
        raise UserError(
            f"'{done.folder}' holds a language model of the kind '{there['family']}', the recipe states "
            f"'{here['family']}': set the recipe's model.lm to {done.run.model.lm}"
        )
    rows = [f'{n} {there[n]} there, {here[n]} here' for n in there if n not in FREE and there[n] != here[n]]
    if rows:
        raise UserError(f"'{done.folder}' holds another language model than model.lm states: {'; '.join(rows)}")


def _check_lora(run: config.Run, done: run_dir.Finished | None) -> None:
    """Raise UserError where a LoRA would be left behind, would count otherwise, or would meet another base."""
    stated, there = run.model.lora, done.run.model.lora if done else None
    if stated and not done:
        raise UserError('model.lora adapts a trained language model: name its run (start.lm, or start.checkpoint)')
    if not there:
        return
    if stated != there or done.folder != Path(run.start.checkpoint):
        raise UserError(
            f"'{done.folder}' holds a language model with a LoRA, {there}: make it start.checkpoint of a recipe with "
            f'this model.lora (it is {stated}), or merge it first: qformer convert {done.folder} MERGED'
        )
    other = run_dir.finished(run.start.lm).last.get('lm') if run.start.lm else done.last['lm']
    if other != done.last['lm']:
        raise UserError(
            f"the LoRA in '{done.folder}' was trained on the language model {done.last['lm']}, and start.lm "
            f"'{run.start.lm}' is another one, {other}: leave start.lm out, or merge the LoRA first (qformer convert)"
        )
