"""`qformer quantize`: a run with its frozen towers in fewer bits, and what that costs."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .options import ConnectorFile, NewFolder, RunFolder, Wait, class_of

LAYERS_SHOWN = 5


@dataclass(frozen=True)
class Quantize:
    """Store the frozen towers of a finished run in fewer bits, and say what that costs.

    Smaller become the matrices of the vision tower and of the language model, and the latter's token table. All else
    stays as it is: the Q-Former, its projection, norms, biases and positions; a LoRA is merged first. With int8 and
    int4 only weights are stored so: they take less memory and are read faster, and computation stays as precise as
    before. The result is a run to use (caption, ask, rank, evaluate), not to train further.

    The command prints the bytes, the error of the weights (root mean square, relative to their own) and, where the data
    set is at hand, how the run does its task before and after.
    """

    run: RunFolder
    """Folder of the run (`qformer convert` makes one of a published checkpoint)."""
    dest: NewFolder
    """Folder to write."""
    weights: Literal['int8', 'int4', 'bfloat16', 'float16']
    """int8: one scale for each output; int4: one for each 64 inputs (output table: int8); else the plain type."""
    data: Path | None = None
    """Data set to judge on; default: the one that the run was trained on, if it is there."""
    split: str = 'test'
    """Split to judge on, in tensorflow_datasets' notation."""
    connector: ConnectorFile = None
    wait: Wait = False


def quantize(options: Quantize) -> None:
    """Write the run and print the tables; raises UserError for a run that is a tower alone, or quantized already."""
    from ..atomic import check_new
    from ..lock import one_writer
    from ..runs import run_dir
    from ..training.stages import STAGES

    done = run_dir.finished(options.run, class_of(options.connector))
    stage = STAGES[done.run.stage]
    if not stage.task:
        judged = ', '.join(name for name, entry in STAGES.items() if entry.task)
        raise UserError(
            f"'{options.run}' is a '{done.run.stage}' run, for stages to start from, which need its weights as they "
            f'are: quantize what they end with ({judged})'
        )
    dataset = _dataset(options, done)
    with one_writer(options.dest, options.wait):
        check_new(options.dest)
        _quantize(options, done.run.model.connector and done.run.model.connector.module)
    _judge(options, done, dataset)
    print(f'next: {stage.next_step.format(run=options.dest)}')


def _quantize(options: Quantize, connector: type | None) -> None:
    """Write the run in fewer bits, and print bytes and errors."""
    from ..inference.quantize import error, on_device
    from ..rules import flatten
    from ..runs import import_export

    model = import_export.read([options.run], connector=connector)
    flat = flatten(on_device(((path, t.read()) for path, t in model.tensors.items()), options.weights))
    lost = {path: error(path, tensor.read(), flat[path]) for path, tensor in model.tensors.items()}
    written = _write(model, flat, options)
    _print_bytes({path: t.size * t.dtype.itemsize for path, t in model.tensors.items()}, flat)
    worst = sorted((path for path in lost if lost[path]), key=lambda path: -lost[path])
    rows = [(path, f'{lost[path]:.2e}') for path in worst[:LAYERS_SHOWN]]
    _print(f'error, the largest {LAYERS_SHOWN} of {len(worst)}', ('weights', 'relative rms'), rows)
    print(f'wrote {", ".join(map(str, written))}')


def _print_bytes(before: dict[str, int], flat: dict[str, Any]) -> None:
    """Print the bytes of each component, and of all, before and after."""
    from ..inference.quantize import size

    parts = sorted({path.split('/')[0] for path in flat})
    rows = []
    for part in [*parts, '']:
        old = sum(count for path, count in before.items() if path.startswith(part and f'{part}/'))
        new = size({path: leaf for path, leaf in flat.items() if path.startswith(part and f'{part}/')})
        rows.append((part or 'all', f'{old:,}', f'{new:,}', f'{new / old:.1%}'))
    _print('bytes', ('', 'before', 'after', 'left'), rows)


def _write(model: Any, flat: dict[str, Any], options: Quantize) -> list[Path]:
    """Write the parameters as a finished run with the tokenizers of the old one; returns what was written."""
    from ..convert.lazy_tensors import in_memory
    from ..models.quantized import to_flat
    from ..runs import import_export

    small = dataclasses.replace(model, tensors=in_memory(to_flat(flat)))
    return import_export.import_checkpoint(small, options.dest)


def _dataset(options: Quantize, done: Any) -> Any:
    """Return the data set to judge on, or None where it is not here; raises UserError for what it lacks."""
    from ..data.dataset import Dataset
    from ..evaluation.task import check_split

    path = options.data or Path(done.run.data.path or 'no data set')
    if not options.data and not path.is_dir():
        return None
    dataset = Dataset.open(path)
    check_split(_task(done), dataset, options.split, done.run.data.train_split)
    return dataset


def _task(done: Any) -> str:
    from ..training.stages import STAGES

    return STAGES[done.run.stage].task


def _judge(options: Quantize, done: Any, dataset: Any) -> None:
    """Print the task's numbers before and after, or why there are none."""
    from ..evaluation import quantization
    from ..inference.blip2 import Blip2

    if dataset is None:
        print(f"not judged in use: the run's data set is not here ('{done.run.data.path}'); --data says where one is")
        return
    own = done.run.model.connector and done.run.model.connector.module
    old, new = (
        quantization.evaluate(Blip2.load(run, connector=own), dataset, options.split)
        for run in (options.run, options.dest)
    )
    rows = [(name, f'{old[name]:.4f}', f'{new[name]:.4f}', f'{new[name] - old[name]:+.4f}') for name in old]
    _print(f'{_task(done)} on {options.split}', ('', 'before', 'after', 'change'), rows)


def _print(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title)
    for i, column in enumerate(columns):
        view.add_column(column, justify='right' if i else 'left')
    for row in rows:
        view.add_row(*row)
    Console().print(view)
