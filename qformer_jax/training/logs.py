"""The log of a run: one JSON line a record, TensorBoard events and a picture derived from it, and the progress bar."""

import json
import math
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..atomic import replacing
from ..errors import UserError

SECONDS_BETWEEN_LINES = 10.0


class Log:
    """`folder/log.jsonl`, and the same numbers as TensorBoard events under `folder/tensorboard/`.

    Opening drops the records after `step` (a run that resumes there writes them again; -1 drops all) and
    derives the events anew. Raises UserError when a line before the last is no record.
    """

    def __init__(self, folder: Path, step: int):
        kept = [record for record in records(folder) if record['step'] <= step]
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / 'log.jsonl.tmp'
        scratch.write_text(''.join(map(_line, kept)))
        os.replace(scratch, folder / 'log.jsonl')
        shutil.rmtree(folder / 'tensorboard', ignore_errors=True)
        from tensorboardX import FileWriter  # imports torch where that is installed: seconds

        self._events = FileWriter(str(folder / 'tensorboard'))
        for record in kept:
            self._add_events(record)
        self._file = (folder / 'log.jsonl').open('a')

    def write(
        self, step: int, kind: Literal['train', 'validation'], values: dict[str, float], timing: dict[str, float]
    ) -> None:
        """Append one record and flush it; `timing` holds what differs between two equal runs (seconds, rates)."""
        record = {'step': step, 'kind': kind, **values, 'timing': timing}
        self._file.write(_line(record))
        self._file.flush()
        self._add_events(record)

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        self._events.close()

    def _add_events(self, record: dict) -> None:
        values = {name: value for name, value in record.items() if name not in ('step', 'kind', 'timing')}
        values |= {f'timing/{name}': value for name, value in record['timing'].items()}
        # One event a record: an event a value took half a millisecond of each step, six times as long.
        from tensorboardX.proto.summary_pb2 import Summary

        kind = record['kind']
        tagged = [
            Summary.Value(tag=f'{kind}/{name}', simple_value=math.nan if value is None else value)
            for name, value in values.items()
        ]
        self._events.add_summary(Summary(value=tagged), record['step'])


def _line(record: dict) -> str:
    """Return a record as a line of JSON, which knows no NaN and no infinity: they are null."""
    return json.dumps(_finite(record), allow_nan=False) + '\n'


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def records(folder: Path) -> list[dict]:
    """Return the records of `folder/log.jsonl`, without a torn last line; [] when there is no log.

    A number that was not finite is None; earlier versions wrote NaN and Infinity as they are, and are read, too.
    Raises UserError when another line is no record.
    """
    path = folder / 'log.jsonl'
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_finite(json.loads(line)))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f'{path}, line {number}: not a JSON record; remove that line') from error
    return found


def draw_curves(folder: Path) -> Path:
    """Draw every logged loss over the steps into `folder/loss.png`; raises UserError when there is none."""
    log = records(folder)
    names = sorted({name for record in log for name in record if 'loss' in name})  # `loss` sorts first
    if not names:
        raise UserError(f'no losses to draw in {folder / "log.jsonl"}: train first, or name the folder of a run')
    columns = min(len(names), 2)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.2 * rows + 0.4), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(f'Losses of {folder.absolute().name}', fontweight='bold')
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, columns, place)
        _draw_loss(axes, log, name)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False)
    with replacing(folder / 'loss.png') as picture:
        figure.savefig(picture, dpi=150)
    return folder / 'loss.png'


def _draw_loss(axes: Axes, log: list[dict], name: str) -> None:
    """Draw one panel: training thin, its trailing mean thick, validation as dots."""
    steps, losses = _points(log, 'train', name)
    window = max(1, len(losses) // 30)
    mean = np.convolve(losses, np.ones(window) / window, 'valid') if len(losses) else losses
    axes.plot(steps, losses, color='#4878a8', linewidth=0.7, alpha=0.5, label='training')
    axes.plot(steps[window - 1 :], mean, color='#1f4e79', linewidth=1.8, label=f'training, mean of {window} records')
    axes.plot(*_points(log, 'validation', name), 'o', color='#d1602a', markersize=5, label='validation')
    axes.set_title(name.replace('_', ' '), fontsize=11)
    axes.set_xlabel('step')
    axes.set_ylabel('nats')
    axes.grid(color='#dddddd', linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)


def _points(log: list[dict], kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, values) of the finite values of one kind."""
    found = [(r['step'], r[name]) for r in log if r['kind'] == kind and r.get(name) is not None]
    steps, values = np.array(found, float).reshape(-1, 2).T
    return steps, values


class Progress:
    """Shows on stderr how far a stage of `steps` steps is: a bar in a terminal, else a line every ten seconds."""

    def __init__(self, name: str, steps: int, start: int = 0):
        self._name, self._steps, self._start = name, steps, start
        self._bar = _bar()
        self._line = ''

    def __enter__(self) -> 'Progress':
        self._began = self._printed = time.monotonic()
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._steps, completed=self._start, numbers='')
        return self

    def update(self, step: int, loss: float, rows_per_second: float, data_wait: float) -> None:
        """Show that `step` steps are done; `data_wait` is the share (0 to 1) of the time that waited for data."""
        numbers = f'loss {loss:.4f}  {rows_per_second:.0f} rows/s  data wait {data_wait:.0%}'
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        now = time.monotonic()
        elapsed = now - self._began
        left = elapsed / max(step - self._start, 1) * (self._steps - step)
        clock = f'elapsed {timedelta(seconds=round(elapsed))}  left {timedelta(seconds=round(left))}'
        self._line = f'{self._name} {step}/{self._steps}  {numbers}  {clock}'
        if now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            self._print()

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        self._print()

    def _print(self) -> None:
        if self._line:
            print(self._line, file=sys.stderr, flush=True)
        self._line = ''


def _bar() -> Bar | None:
    """Return rich's progress bar, or None when stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    numbers = TextColumn('{task.fields[numbers]}')
    name = TextColumn('[bold]{task.description}')
    return Bar(name, BarColumn(), MofNCompleteColumn(), numbers, TimeElapsedColumn(), TimeRemainingColumn(),
               console=console)  # fmt: skip
