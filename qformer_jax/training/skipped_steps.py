"""The records of the first step that was skipped, since its gradients were not finite: `RUN/skipped.json`."""

from pathlib import Path

import msgspec

from .. import json_file
from ..errors import UserError
from ..runs.run_dir import SKIPPED

_SHOWN = 5


class _Skipped(msgspec.Struct):
    step: int
    records: list[str]


def note(folder: Path, step: int, records: list[str]) -> None:
    """Keep a step's records, unless those of an earlier step are there."""
    if not (folder / SKIPPED).exists():
        json_file.write(folder / SKIPPED, {'step': step, 'records': records})


def first(folder: Path) -> str:
    """Return what is known of the first skipped step, for a line to the user."""
    try:
        found = json_file.read(folder / SKIPPED, _Skipped, 'it is a note, and may be deleted')
    except UserError:  # of an earlier version's run, which kept none
        return 'the records of the first one are not known'
    more = f' and {len(found.records) - _SHOWN} more' if len(found.records) > _SHOWN else ''
    shown = ', '.join(found.records[:_SHOWN])
    return f'the first was step {found.step}, of the records {shown}{more} ({folder / SKIPPED})'
