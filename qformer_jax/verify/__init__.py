"""Our numbers against recorded ones: `check(read(folder))` gives a row an array, `qformer verify` prints them."""

from .recorded.case import Case, read
from .recorded.registry import check, left_out, work
from .report import ReportRow

__all__ = ['Case', 'ReportRow', 'check', 'left_out', 'read', 'work']
