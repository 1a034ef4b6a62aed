"""Which kind of case a folder is, and its comparison from start to end."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from ..errors import UserError
from ..typing import Params
from . import qformer_modes, report, retrieval, stage1, vit, world
from .case import Case, read
from .report import Row
from .work import Work

KINDS: tuple[tuple[str, Callable[[Case], Work]], ...] = (
    ('block_outputs', vit.work),
    ('query_only.hidden_states', qformer_modes.work),
    ('itm_hidden', stage1.work),
    ('rank0.sim_i2t', world.work),
    ('retrieval.sims', retrieval.work),
)
"""An array that only this kind of case has, and who works on it."""


@cache
def work(case: Case) -> Work:
    """Return what there is to do for a case, told by its arrays; raises UserError for a kind that is not known."""
    for array, make in KINDS:
        if array in case.arrays:
            return make(case)
    marks = ', '.join(f"'{array}'" for array, _ in KINDS)
    raise UserError(f'{case.folder}: no known kind of case: its arrays.npz has none of {marks}')


def check(case: Case, params: Params | None = None, dtype: str = 'float32') -> list[Row]:
    """Return one row a recorded array, computed with `params` instead of the recorded weights if they are given.

    Compiles once a case; tolerances come from the recorded weights.
    """
    todo = work(case)
    return todo.rows(todo.params if params is None else params, dtype)


def verify(folders: tuple[Path, ...], dtype: str) -> bool:
    """Check every case, print its table, and return whether all rows pass."""
    good = True
    for folder in folders:
        case = read(folder)
        rows = check(case, dtype=dtype)
        report.show(str(folder), rows, work(case).left_out)
        good &= all(row.passed for row in rows)
    return good
