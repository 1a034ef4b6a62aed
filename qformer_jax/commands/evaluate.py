"""`qformer evaluate`: a task on a split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config.ranges import FromZero
from .options import ConnectorFile, RunFolder, class_of


@dataclass(frozen=True)
class Evaluate:
    """Judge a finished run on a split of its data set, by one task.

    The numbers are printed, and written with every prediction into the run's folder. An evaluation that was done before
    is not done again.
    """

    run: RunFolder
    """Folder of the run."""
    task: Literal['vqa', 'caption', 'retrieval', 'grounding']
    """Answers to questions, captions, pictures and texts found by each other (stage 1), or boxes."""
    split: str = 'test'
    """Split to judge on, or a part of it, as tensorflow_datasets writes it: `validation[:100]`."""
    data: Path | None = None
    """Data set; default: the one that the run was trained on (of several, the first)."""
    queries: FromZero = 0
    """Use only this many queries, the first ones; 0: all. Only a run with --objective.nested-queries is trained for
    fewer; for any other the table says what is left."""
    connector: ConnectorFile = None


def evaluate(options: Evaluate) -> None:
    """Print the table and say where the predictions are."""
    from ..evaluation.task import evaluate as run_task

    own = class_of(options.connector)
    run_task(options.run, options.task, options.split, options.data, options.queries, own)
