"""Files and folders that appear whole or not at all: written beside, then renamed."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .errors import UserError, full_disk_as_user_error

_USED = '.used'  # in a scratch folder, locked while a process uses it; not the folder: another may be made in it


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
    with scratch_folder(dest.parent) as folder, full_disk_as_user_error(dest):
        scratch = folder / dest.name
        yield scratch
        os.replace(scratch, dest)


@contextmanager
def scratch_folder(parent: Path, prefix: str = '.writing-') -> Iterator[Path]:
    """Lend a new folder in `parent`, which is gone at the end; first clear those that killed processes left there.

    Each is locked by the process that uses it, so nobody clears another's. Raises UserError where none can be made.
    """
    with _locked(parent):  # nobody looks between the making of a folder and its lock
        for left in parent.glob(f'{prefix}*'):
            with _locked(left / _USED, wait=False) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)
        try:
            folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        except OSError as error:
            raise UserError(f"'{parent}' cannot be written ({error.strerror.lower()})") from error
        lock = ExitStack()
        lock.enter_context(_locked(folder / _USED))
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(place: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder, or of a file that need not exist.

    Gives whether it is held: not where another process has it, or the file system knows no locks.
    """
    try:
        descriptor = os.open(place, os.O_RDONLY if place.is_dir() else os.O_RDWR | os.O_CREAT)
    except OSError:  # a moment later its folder is no longer there
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


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
