"""Which numbers make sense: a range stands beside a field, in a configuration as in the options of a command.

A whole number without a range of its own is 1 to a million, any other number at least 0; NaN and infinity are in no
range.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from ..errors import UserError

LARGEST = 2**31 - 1  # of what XLA counts in 32 bits
MILLION = 1_000_000  # no size of a network, of a batch or of a text is larger


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, without `most` itself where it says `below`."""

    least: int | float = 0
    most: int | float = LARGEST
    below: bool = False

    def __contains__(self, value: int | float) -> bool:
        return self.least <= value < self.most if self.below else self.least <= value <= self.most

    def __str__(self) -> str:
        if self.most == LARGEST:
            return f'at least {self.least}'
        return f'at least {self.least} and {"below" if self.below else "at most"} {self.most:,}'


Few = Annotated[int, Range(1, 1000)]
"""A count of what costs much each: blocks, which are compiled, and texts pursued at a time, which have caches."""
FromZero = Annotated[int, Range(0, MILLION)]
"""A size or count of which 0 says something."""
Seed = Annotated[int, Range()]
"""Of random numbers."""
Share = Annotated[float, Range(0, 1)]
"""A part of a whole."""
Decay = Annotated[float, Range(0, 1, below=True)]
"""What is multiplied again and again, or a share that leaves something."""
Rate = Annotated[float, Range(0, 10)]
"""A learning rate."""


def check_ranges(part: Any, name: Callable[[str], str] = lambda path: path.replace('_', '-')) -> None:
    """Raise UserError for a number of a dataclass, or of one inside it, that is out of its range.

    `name` makes what the user knows a field by from its path: `training.steps`.
    """
    for path, value, allowed in _numbers(part):
        if value not in allowed:
            limit = f' and at most {LARGEST:,}' if value > allowed.most == LARGEST else ''
            raise UserError(f'{name(path)} is {value}, it must be {allowed}{limit}')


def _numbers(part: Any, prefix: str = '') -> Iterator[tuple[str, int | float, Range]]:
    """Yield path, value and range of each field that is one number."""
    hints = typing.get_type_hints(type(part), include_extras=True)
    for field in dataclasses.fields(part):
        value, hint = getattr(part, field.name), hints[field.name]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _numbers(value, f'{prefix}{field.name}.')
        elif typing.get_origin(hint) is Annotated and isinstance(hint.__metadata__[0], Range):
            yield f'{prefix}{field.name}', value, hint.__metadata__[0]
        elif hint in (int, float):
            yield f'{prefix}{field.name}', value, Range(1, MILLION) if hint is int else Range()
