"""Our numbers against recorded ones: `check(read(folder))` gives a row an array, `qformer verify` prints them."""

from .case import Case, read
from .kinds import check, left_out, work
from .report import Row

__all__ = ['Case', 'Row', 'check', 'left_out', 'read', 'work']
