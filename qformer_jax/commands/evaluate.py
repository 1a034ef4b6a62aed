"""`qformer evaluate`: a task on a split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config.ranges import FromZero
from .options import ConnectorFile, RunFolder, class_of


@dataclass(frozen=True)
class Evaluate:
    """Judge a finished run on a split of its data set; writes the numbers and every prediction beside the run."""

    run: RunFolder
    """Folder of the run."""
    task: Literal['vqa', 'caption', 'retrieval', 'grounding']
    """What is judged."""
    split: str = 'test'
    """Split, in tensorflow_datasets' notation."""
    data: Path | None = None
    """Data set; default: the one that the run was trained on (of several, the first)."""
    queries: FromZero = 0
    """Use so many queries, the first ones; 0: all. Only a run with --objective.nested-queries is trained for fewer; of
    any other the table says what is left."""
    connector: ConnectorFile = None


def evaluate(options: Evaluate) -> None:
    """Print the table and say where the predictions are."""
    from ..evaluation.task import evaluate as run_task

    own = class_of(options.connector)
    run_task(options.run, options.task, options.split, options.data, options.queries, own)
