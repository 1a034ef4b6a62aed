"""Which kind of case a folder is, and its comparison from start to end."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from ...errors import UserError
from ...typing import Params
from .. import report
from ..report import ReportRow
from . import (
    optim,
    processors,
    qformer_modes,
    retrieval,
    stage1,
    stage1_generate,
    stage1_multiprocess,
    stage2_opt,
    stage2_t5,
    vit,
)
from .case import Case, read
from .comparison import Work

KINDS: tuple[tuple[str, Callable[[Case], Work]], ...] = (
    ('block_outputs', vit.work),
    ('query_only.hidden_states', qformer_modes.work),
    ('itm_hidden', stage1.work),
    ('rank0.sim_i2t', stage1_multiprocess.work),
    ('retrieval.sims', retrieval.work),
    ('decoder_bias', stage1_generate.work),
    ('.opt_input_ids', stage2_opt.work),
    ('inputs_t5', stage2_t5.work),
    ('.raw', processors.work),
    ('train.lr', optim.work),
)
"""How the name of an array ends that only this kind of case has, and who works on it."""

UNSTABLE = 'rounding to bfloat16 decides between words or candidates that are nearly as likely'


@cache
def work(case: Case) -> Work:
    """Return what there is to do for a case, told by its arrays; raises UserError for a kind that is not known."""
    for mark, make in KINDS:
        if any(name.endswith(mark) for name in case.arrays):
            return make(case)
    marks = ', '.join(f"'{mark}'" for mark, _ in KINDS)
    raise UserError(f'{case.folder}: no known kind of case: no array of its arrays.npz ends in one of {marks}')


def check(case: Case, params: Params | None = None, dtype: str = 'float32') -> list[ReportRow]:
    """Return one row a recorded array, computed with `params` instead of the recorded weights if they are given.

    Compiles once a case; tolerances come from the recorded weights.
    """
    todo = work(case)
    return todo.rows(todo.params if params is None else params, dtype)


def left_out(case: Case, dtype: str = 'float32') -> dict[str, str]:
    """Return what of a case is not compared, and why."""
    todo = work(case)
    turns = dict.fromkeys(sorted(todo.unstable), UNSTABLE) if dtype == 'bfloat16' else {}
    return todo.left_out | turns


def verify(folders: tuple[Path, ...], dtype: str) -> bool:
    """Check every case, print its table, and return whether all rows pass."""
    good = True
    for folder in folders:
        case = read(folder)
        rows = check(case, dtype=dtype)
        if dtype == 'float32':
            rows = work(case).explained(rows)
        report.show(str(folder), rows, left_out(case, dtype))
        good &= all(row.passed for row in rows)
    return good
