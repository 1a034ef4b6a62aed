"""The two exceptions that a command turns into one line: wrong input, and an orderly stop."""

import contextlib
import difflib
import errno
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user gave; the command line prints it as one line and exits with code 2."""


class Stopped(Exception):
    """A signal asked a run to stop; it saved a checkpoint first, and the same command continues it (exit code 0)."""


_NOT_OURS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
"""What only the user can change, wherever it is met; any other error of the system is a fault of ours."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (nearest: 'x')` for the known name most like `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (nearest: '{matches[0]}')" if matches else ''


def nearest_file(file: Path) -> str:
    """Return the nearest name in the folder of a file that is missing, as `nearest` does."""
    try:
        return nearest(file.name, [sibling.name for sibling in file.parent.iterdir()])
    except (OSError, ValueError):  # no such folder, or no name of one
        return ''


def command(function: Callable[[], object]) -> None:
    """Do what a command does; a number that it returns is its exit code; a stop or wrong input is said in one line.

    Nothing is said where nobody reads any more (`qformer --help | head -1`). Names of files that are no text in the
    terminal's encoding are shown with escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in tests, it is something else
            stream.reconfigure(errors='backslashreplace')
    try:
        if isinstance(code := function(), int):
            sys.exit(code)
    except BrokenPipeError:
        pass
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
    except UserError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
        reason = 'disk full: could not write' if error.errno == errno.ENOSPC else f'{error.strerror.lower()}:'
        sys.exit(_complain(f'{reason} {error.filename or ""}'))
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # Python flushes once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str) -> int:
    print(f'error: {one_line(message)}', file=sys.stderr)
    return 2


def one_line(message: str) -> str:
    """Return a message with its line ends and control characters escaped: names of files and keys may hold them."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in message)


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
