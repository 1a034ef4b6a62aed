"""The two exceptions that the command line turns into one line: wrong input, and an orderly stop."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave; the command line prints it as one line and exits with code 2."""


class Stopped(Exception):
    """A signal asked a run to stop; it saved a checkpoint first, and the same command continues it (exit code 0)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (nearest: 'x')` for the known name most like `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (nearest: '{matches[0]}')" if matches else ''
