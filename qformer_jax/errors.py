"""The two exceptions that the command line turns into one line: wrong input, and an orderly stop."""

import contextlib
import difflib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user gave; the command line prints it as one line and exits with code 2."""


class Stopped(Exception):
    """A signal asked a run to stop; it saved a checkpoint first, and the same command continues it (exit code 0)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (nearest: 'x')` for the known name most like `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (nearest: '{matches[0]}')" if matches else ''


@contextlib.contextmanager
def full_disk_as_user_error(folder: Path) -> Iterator[None]:
    """Turn "no space left", by Python or from a library's C++ writer (which shares only the text), into UserError."""
    try:
        yield
    except Exception as error:
        if getattr(error, 'errno', None) != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(error):
            raise
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
        raise UserError(f'{folder}: disk full ({free / 2**20:.0f} MiB free); make room and start again') from error
