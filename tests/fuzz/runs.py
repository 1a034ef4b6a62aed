"""Runs, weights, data sets and exported folders, damaged: answers stay the same, or one line names the file."""

import random
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from experiments.robustness import mutations, prepare
from experiments.robustness import readers as of
from experiments.robustness.__main__ import UNREAD, copy, files_of

PARTS = 'run', 'data', 'features', 'served'


def make(home: Path) -> None:
    """Train a small line, encode a data set and export a folder."""
    prepare.line(home)


@cache
def known(home: Path, part: str) -> str:
    """Return what the undamaged files say."""
    return of.READERS[part](home)


def read(part: str, home: Path, whole: Path, verdict: mutations.Verdict) -> None:
    """Read what was damaged; an answer must be the one from before."""
    said = of.READERS[part](whole)
    assert said == known(home, part), 'another answer'
    assert verdict != 'refused', 'read as if nothing had happened'


def cases(home: Path, draw: random.Random) -> Iterator[tuple[str, mutations.Verdict, Callable[[], None]]]:
    """Yield without end: a name, its verdict, and the function that reads the damaged copy."""
    whole = home / 'damaged'
    while True:
        part = draw.choice(PARTS)
        known(home, part)
        shutil.rmtree(whole, ignore_errors=True)
        copy(home, whole)
        file = draw.choice(files_of(home, part)).relative_to(home)
        kinds = mutations.BYTES
        if file.suffix in ('.json', '.txt'):
            kinds += mutations.TEXT if b'"' in (home / file).read_bytes() else ()
        damage = draw.choice(kinds + (mutations.JSON if file.suffix == '.json' else ()))
        verdict = damage(whole / file, draw)
        verdict = 'either' if file.name in UNREAD else verdict
        yield f'{part}: {file}: {damage.__name__}', verdict, partial(read, part, home, whole, verdict)
