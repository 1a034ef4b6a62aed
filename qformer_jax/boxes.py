"""Boxes as words of a vocabulary, as KOSMOS-2 writes them (Peng et al. 2023, section 2.1).

    <phrase>a red circle</phrase><object><patch_index_0044><patch_index_0863></object>

A picture is a grid of G x G cells, numbered row by row: of 32 x 32, cell 44 is row 1, column 12. A box is the cell of
its top left corner and that of its bottom right one.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UserError

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge of a part of a picture, as shares 0..1 of its width and height."""

GROUNDING, PHRASE, PHRASE_END, OBJECT, OBJECT_END, DELIMITER = MARKUP = (
    '<grounding>', '<phrase>', '</phrase>', '<object>', '</object>', '</delimiter_of_multi_objects/>',
)  # fmt: skip
"""What asks for boxes, and what stands around phrases, boxes, and between boxes of one phrase; KOSMOS-2's names."""

_CELL = r'<patch_index_\d{4,9}>'
_PLAIN = '|'.join([*map(re.escape, MARKUP), _CELL])
_OBJECT = re.compile(rf'(?:{PHRASE}([^<]*){PHRASE_END})?{OBJECT}((?:{_CELL}|{DELIMITER})*){OBJECT_END}')
_LEFT_OVER = re.compile(rf'(?:{OBJECT}|{OBJECT_END}|{DELIMITER}|{_CELL})+')
_BLANK = re.compile(rf'\s+(?={_PLAIN})')
SPLIT = re.compile(rf'\s*({_PLAIN})')
"""Splits a text into what stands between these words, and the words; a blank before one is no part of either."""


@dataclass(frozen=True)
class Grounded:
    """What a text says of places."""

    found: tuple[tuple[str, tuple[Box, ...]], ...]
    """Phrases (empty where a text names none) with their boxes."""
    dropped: int
    """Boxes, or attempts at some, that are none: half of a pair, cells that do not exist, corners in wrong order."""


def words(grid: int) -> tuple[str, ...]:
    """Return the words that boxes on a grid add to a vocabulary, in the order of their rows."""
    return *MARKUP, *map(_cell, range(grid * grid))


def cells(box: Box, grid: int) -> tuple[int, int]:
    """Return the cells of a box's corners; raises UserError for a box that is empty or leaves the picture.

    A corner on a line between cells belongs to the cell inside: on a grid of 4, 0.25 to 0.5 is column 1 alone.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise UserError(f'box {tuple(box)} must be (x0, y0, x1, y1) with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1')
    first = math.floor(y0 * grid) * grid + math.floor(x0 * grid)
    return first, (math.ceil(y1 * grid) - 1) * grid + math.ceil(x1 * grid) - 1


def box_between(first: int, last: int, grid: int) -> Box:
    """Return the box from the centre of one cell to that of another: no side is off by more than half a cell.

    Cells of the same row or column would give an empty box, and so give the box around them, as in KOSMOS-2; its sides
    may be off by a whole cell.
    """
    (top, left), (bottom, right) = divmod(first, grid), divmod(last, grid)
    before, after = (0, 1) if top == bottom or left == right else (0.5, 0.5)
    return (left + before) / grid, (top + before) / grid, (right + after) / grid, (bottom + after) / grid


def spell(boxes: Sequence[Box], grid: int) -> str:
    """Return the words of one or more boxes of the same phrase."""
    pairs = (''.join(map(_cell, cells(box, grid))) for box in boxes)
    return f'{OBJECT}{DELIMITER.join(pairs)}{OBJECT_END}'


def ask(phrase: str) -> str:
    """Return the text that boxes of a phrase go on from."""
    return f'{GROUNDING}{PHRASE}{phrase}{PHRASE_END}'


def read(text: str, grid: int) -> Grounded:
    """Return what a text says of places, however it was written; what is no box is counted and left out."""
    text, found, dropped = _BLANK.sub('', text), [], 0
    for match in _OBJECT.finditer(text):
        pairs = [_corners(part, grid) for part in match[2].split(DELIMITER)]
        boxes = tuple(box_between(*pair, grid) for pair in pairs if pair)
        dropped += len(pairs) - len(boxes)
        found += [((match[1] or '').strip(), boxes)] if boxes else []
    return Grounded(tuple(found), dropped + len(_LEFT_OVER.findall(_OBJECT.sub('', text))))


def plain(text: str) -> str:
    """Return a text without the words of this file."""
    return re.sub(_PLAIN, '', text)


def _cell(number: int) -> str:
    return f'<patch_index_{number:04d}>'


def _corners(pair: str, grid: int) -> tuple[int, int] | None:
    """Return the two cells of a pair, or None where it is no box."""
    numbers = [int(number) for number in re.findall(r'\d+', pair)]
    if len(numbers) != 2 or max(numbers) >= grid * grid:
        return None
    (top, left), (bottom, right) = (divmod(number, grid) for number in numbers)
    return (numbers[0], numbers[1]) if top <= bottom and left <= right else None
