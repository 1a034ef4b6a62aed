"""Rows of a comparison: how far we are from a recorded array, how far we may be, and the table that says so."""

from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

WIDTH = 160  # of the table where there is no terminal that has one


@dataclass(frozen=True)
class ReportRow:
    """One recorded array, compared."""

    name: str
    difference: float
    """Largest absolute difference; infinite where shapes differ or a number is not one."""
    scale: float
    """Largest absolute entry of the recorded array."""
    tolerance: float
    """Largest difference that passes."""
    note: str = ''
    """What else there is to say."""

    @property
    def passed(self) -> bool:
        """Whether the difference is tolerable."""
        return self.difference <= self.tolerance

    @property
    def relative(self) -> float:
        """The difference in units of the scale."""
        return self.difference / self.scale if self.scale else self.difference


def compare(name: str, computed: np.ndarray, expected: np.ndarray, tolerance: float) -> ReportRow:
    """Return the row of one array."""
    shapes = '' if computed.shape == expected.shape else f'is {list(computed.shape)} here, {list(expected.shape)} there'
    return ReportRow(name, difference(computed, expected), scale(expected), tolerance, shapes)


def difference(computed: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference; equal infinities differ by 0, NaN and other shapes by infinity."""
    if computed.shape != expected.shape:
        return np.inf
    computed, expected = np.asarray(computed, np.float64), np.asarray(expected, np.float64)
    with np.errstate(invalid='ignore'):
        gap = np.where(computed == expected, 0, np.abs(computed - expected))
    return float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max(initial=0))


def scale(array: np.ndarray) -> float:
    """Return the largest finite absolute entry."""
    array = np.abs(np.asarray(array, np.float64))
    return float(array[np.isfinite(array)].max(initial=0))


def show(title: str, rows: list[ReportRow], left_out: dict[str, str]) -> None:
    """Print the table, what was not compared and why, and one line that sums up."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(title=title, title_justify='left')
    table.add_column('array', overflow='fold')
    for column in ('max abs difference', 'relative', 'tolerance'):
        table.add_column(column, justify='right', no_wrap=True)
    table.add_column('')
    for row in rows:
        numbers = (f'{x:.2e}' for x in (row.difference, row.relative, row.tolerance))
        verdict = 'pass' if row.passed else '[red]FAIL[/red]'
        table.add_row(row.name, *numbers, f'{verdict} {row.note}'.strip())
    console.print(table)
    for why in dict.fromkeys(left_out.values()):
        names = [name for name in left_out if left_out[name] == why]
        console.print(f'not compared, {why}: {", ".join(names)}')
    console.print(summary(title, rows))


def summary(title: str, rows: list[ReportRow]) -> str:
    """Return one line: how many rows pass, and the names of those that do not."""
    failed = [row.name for row in rows if not row.passed]
    if failed:
        return f'{title}: {len(failed)} of {len(rows)} FAIL: {", ".join(failed)}'
    return f'{title}: all {len(rows)} pass'
