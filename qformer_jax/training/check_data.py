"""What a data set cannot give a run, said before its first step: a check that comes later loses what was trained."""

from dataclasses import dataclass

from rich.console import Console
from rich.progress import track

from .. import config
from ..data import pipeline
from ..data.dataset import Dataset
from ..data.preprocess import Need
from ..errors import UserError
from .stages import STAGES


@dataclass
class Longest:
    """The texts of one kind of row so far."""

    count: int = 0
    cut: int = 0
    tokens: int = 0
    """Of the longest."""
    record: str = ''
    """Whose it is."""


def check_data(run: config.Run, dataset: Dataset, devices: int) -> list[str]:
    """Read every record that the run will read, and return what is worth saying of them, a line each.

    The run's batches are split over so many `devices`.
    Raises UserError when a split is unknown, empty or too small, a record is damaged, a text leaves no room for what is
    to be learned, or a larger share of the texts than `data.cut_texts` is longer than its row.
    """
    splits = [run.data.train_split]
    if run.data.validation_split:
        _check_held_out(run, dataset, devices)
        splits.append(run.data.validation_split)
    said = _check_variety(run, dataset)
    for split in splits:
        for field, longest in lengths(run, dataset, split).items():
            said += _check_share(run, split, field, longest)
    return said


def _check_variety(run: config.Run, dataset: Dataset) -> list[str]:
    """Return a warning where all records to train on hold the same image; reads on until another one comes."""
    if not STAGES[run.stage].row_format.pictures:
        return []
    count, first = 0, None
    for part in dataset.parts:
        for record in part.source(run.data.train_split):
            content = record.image or record.frames or (record.features.shape, record.features.tobytes())
            if count and content != first:
                return []
            count, first = count + 1, content
    return [
        f"warning: all {count:,} records of '{run.data.train_split}' hold the same image: nothing of images is learned"
    ]


def _check_held_out(run: config.Run, dataset: Dataset, devices: int) -> None:
    stage, split = STAGES[run.stage], run.data.validation_split
    sizes = pipeline.held_out_sizes(run, stage.row_format, dataset, split, devices)
    if stage.needs_negatives and min(sizes) < 2:
        raise UserError(
            f"'{split}' holds one record that {run.stage} can use, and a pair needs a negative: widen the split"
        )


def lengths(run: config.Run, dataset: Dataset, split: str) -> dict[str, Longest]:
    """Return the longest texts of a split by the field that bounds them, such as `max_text`; reads all its records."""
    console, found = Console(stderr=True), {}
    needs = pipeline.needs(run, STAGES[run.stage].row_format, dataset, split)
    for name, need in track(needs, 'reading texts', None, console=console, disable=not console.is_terminal):
        if need.start >= need.length:
            raise UserError(
                f"data.{option(need.field)} is {need.length}, and what stands before the answer of '{name}' takes "
                f'{need.start} tokens: give --data.{option(need.field)} {need.tokens}, or more'
            )
        _add(found.setdefault(need.field, Longest()), name, need)
    return found


def _add(longest: Longest, name: str, need: Need) -> None:
    longest.count += 1
    longest.cut += need.tokens > need.length
    if need.tokens > longest.tokens:
        longest.tokens, longest.record = need.tokens, name


def _check_share(run: config.Run, split: str, field: str, longest: Longest) -> list[str]:
    """Return a line about texts that are cut, if there are any; raises UserError when they are too many."""
    if not longest.cut:
        return []
    share, name, length = longest.cut / longest.count, option(field), getattr(run.data, field)
    line = (
        f"{longest.cut:,} of {longest.count:,} texts of '{split}' ({share:.1%}) are longer than the {length} tokens of "
        f"data.{name}, which cuts them; the longest, of '{longest.record}', has {longest.tokens}"
    )
    if share > run.data.cut_texts:
        raise UserError(
            f'{line}. That is more than data.cut-texts allows ({run.data.cut_texts:.1%}): give --data.{name} '
            f'{longest.tokens}{positions(run, field, longest.tokens)}, or --data.cut-texts 1 to have them cut'
        )
    return [line]


def positions(run: config.Run, field: str, tokens: int) -> str:
    """Return the option that a model with too few positions needs beside a longer row."""
    qformer = run.model.qformer
    if field == 'max_text' and qformer and tokens > qformer.max_positions:
        return f' --model.qformer.max-positions {tokens}'
    return ''


def option(field: str) -> str:
    return field.replace('_', '-')
