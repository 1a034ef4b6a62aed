"""One writer a folder: a lock that the operating system holds, and lets go of when its process ends, however it ends.

The lock is a file beside the folder, `.NAME.lock`; it stays when nobody holds it, and may be deleted then.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .atomic import check_writable
from .errors import UserError


@contextlib.contextmanager
def one_writer(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder (or file), which need not exist; with `wait`, first wait until nobody else does.

    Raises UserError, naming host and process of the holder, when another one has it.
    """
    folder = folder.resolve()
    check_writable(folder.parent)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f'.{folder.name}.lock'
    lock = FileLock(file)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UserError(
            f"'{folder}' is being written by {_holder(file)}: wait until it has ended (--wait does), or name another"
        ) from None
    try:
        file.write_text(f'process {os.getpid()} on {socket.gethostname()}')
        yield
    finally:
        lock.release()


def _holder(file: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return file.read_text() or 'another process'
    return 'another process'
