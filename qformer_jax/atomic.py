"""Files and folders that appear whole or not at all: written beside, then renamed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError, full_disk_as_user_error


@contextmanager
def all_or_nothing(dest: Path) -> Iterator[Path]:
    """Lend a path beside `dest` and move what was written there to `dest` at the end; nothing remains of a failure.

    Raises UserError when `dest` exists, its folder cannot be written, or the disk is full.
    """
    check_new(dest)
    with replacing(dest) as scratch:
        yield scratch


@contextmanager
def replacing(dest: Path) -> Iterator[Path]:
    """Lend a path beside `dest`, of the same name, and put what was written there in the place of `dest` at the end.

    Raises UserError when the folder cannot be written or the disk is full; `dest` is then what it was before.
    """
    check_writable(dest.parent)
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix='.writing-') as folder, full_disk_as_user_error(dest):
        scratch = Path(folder) / dest.name
        yield scratch
        os.replace(scratch, dest)


def write_text(dest: Path, text: str) -> None:
    """Write a text file as `replacing` does, in UTF-8."""
    with replacing(dest) as scratch:
        scratch.write_text(text, encoding='utf-8')


def check_new(dest: Path) -> None:
    """Raise UserError when `dest` exists."""
    if dest.exists():
        raise UserError(f"'{dest}' exists: name a new one, or remove it first")


def check_writable(folder: Path) -> None:
    """Raise UserError when nothing can be written in a folder, which need not exist yet: asked before the work."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"'{folder}' cannot be written ({there}: {error.strerror.lower()})") from error
