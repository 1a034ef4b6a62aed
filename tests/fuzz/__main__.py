"""`python -m tests.fuzz`: give readers odd and damaged input, and count what they make of it.

Every input has a verdict: `refused` (one line that says what is wrong), `same` (it is read), or `either`. What is read
is compared with what was written, by the part itself. A reader works in a process of its own, which is ended after 20
seconds or above 2 GiB. Wrong are a traceback, several lines, an end by force, and an answer or refusal against the
verdict; each is printed whole, with the command that repeats it.
"""

import importlib
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from qformer_jax.errors import command

from .reader import Reader

PARTS = 'pictures', 'sources', 'options', 'convert', 'runs'
"""Modules of this folder: `make(home)` writes what is damaged, `cases(home, draw)` yields name, verdict and reader."""


@dataclass(frozen=True)
class Options:
    """Give readers odd and damaged input for some time."""

    home: Path = Path('runs/fuzz')
    """Folder to work in; what is there from an earlier call is used again."""
    seconds: float = 60.0
    """How long, over all parts."""
    parts: tuple[Literal[PARTS], ...] = PARTS
    """Which readers."""
    seed: int = 0
    """Of what is drawn."""
    number: int | None = None
    """Only this input of the one part, to see it again."""


RIGHT = 'refused', 'accepted'


def main(options: Options) -> int:
    """Return 1 where something is wrong."""
    home, tally, readers = options.home.resolve(), Counter(), {}
    for part in options.parts:
        if not (home / part / '.made').exists():
            (home / part).mkdir(parents=True, exist_ok=True)
            importlib.import_module(f'tests.fuzz.{part}').make(home / part)
            (home / part / '.made').touch()
        readers[part] = Reader(part, home / part, options.seed)
    began, number = time.monotonic(), options.number or 0
    while options.number is None or number == options.number:
        for part, reader in readers.items():
            name, kind, text = reader(number)
            tally[part, kind] += 1
            if kind not in RIGHT or options.number is not None:
                print(f'{part}, {name}: {kind}: {text}')
                print(
                    f'  again: python -m tests.fuzz --parts {part} --seed {options.seed} --number {number}', flush=True
                )
        number += 1
        if time.monotonic() - began > options.seconds:
            break
    for part in options.parts:
        print(json.dumps({'part': part} | {kind: n for (name, kind), n in sorted(tally.items()) if name == part}))
    wrong = {kind: n for (_, kind), n in tally.items() if kind not in RIGHT}
    refused, bad = sum(n for (_, kind), n in tally.items() if kind == 'refused'), sum(wrong.values())
    right = tally.total() - refused - bad
    said = f'{refused} gave one clear line, {right} were accepted rightly, {bad} went wrong'
    print(f'{tally.total()} inputs: {said} {wrong or ""}')
    return int(bool(wrong))


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
