"""A command's options from its words; tyro's boxed complaint as one line."""

import contextlib
import io
import re
from typing import Any

import tyro

from ..config.ranges import check_ranges
from ..errors import UserError

_BORDER = re.compile(r'[╭╰]|\W*(──|---)')  # of a box, or a line across it; the second where the terminal is not UTF-8


def parse(kind: Any, arguments: list[str], **options: Any) -> Any:
    """Return tyro's result; its boxed error message becomes one line of a UserError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = tyro.cli(kind, args=arguments, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(said.getvalue())) from None
    check_ranges(found, _option)
    return found


def _option(path: str) -> str:
    """Return the option of a field: groups of options have no name on the command line, a recipe's parts have."""
    name = path.removeprefix('config.') if path.startswith('config.') else path.rpartition('.')[2]
    return f'--{name.replace("_", "-")}'


def _one_line(box: str) -> str:
    """Return the text of tyro's error box; of the options that it suggests, the names only."""
    lines = [line.strip('│| ') for line in box.splitlines() if not _BORDER.match(line)]
    complaint, _, suggested = ' '.join(lines).partition(' Perhaps you meant: ')
    names = [name for name in re.findall(r'(?<!\S)--[\w.-]+', suggested) if name != '--help']
    return complaint + (f' (nearest: {", ".join(names)})' if names else '')
