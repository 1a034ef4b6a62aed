"""A process that makes and reads the inputs of one part, and is ended when it takes too long or too much memory."""

import contextlib
import importlib
import io
import multiprocessing
import random
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

from experiments.robustness.readers import BYTES, SECONDS, resident
from qformer_jax.errors import UserError


def _serve(pipe: Connection, part: str, home: Path, seed: int) -> None:
    """Make the inputs that the parent names by number, read them, and say how it went."""
    warnings.simplefilter('ignore')
    module = importlib.import_module(f'tests.fuzz.{part}')
    while True:
        try:
            number = pipe.recv()
        except EOFError:  # the parent has ended
            return
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                name, verdict, read = next(module.cases(home, random.Random(f'{seed} {part} {number}')))
            except Exception:
                pipe.send((f'{part} {number}', traceback.format_exc()))
                continue
            pipe.send((name, verdict))
            try:
                read()
                pipe.send(('accepted', ''))
            except UserError as error:
                pipe.send(('refused', str(error)))
            except SystemExit as error:
                text = error.code if isinstance(error.code, str) else said.getvalue()
                pipe.send(('refused', text) if error.code else ('traceback', 'ended with exit code 0'))
            except BaseException as error:
                kind = 'accepted wrongly' if isinstance(error, AssertionError) else 'traceback'
                pipe.send((kind, traceback.format_exc()))


class Reader:
    """A process that reads the inputs of one part; a new one after each that had to be ended."""

    def __init__(self, part: str, home: Path, seed: int):
        self._arguments = part, home, seed
        self._process = None

    def __call__(self, number: int) -> tuple[str, str, str]:
        """Return name, what happened, and what was said of an input."""
        if self._process is None:
            self._start()
        self._pipe.send(number)
        if not self._wait(300):  # the first one imports JAX
            return f'{self._arguments[0]} {number}', *self._end
        name, verdict = self._pipe.recv()
        if verdict not in ('refused', 'same', 'either'):
            return name, 'not made', verdict
        ended = self._wait(SECONDS)
        if not ended:
            return name, *self._end
        kind, text = self._pipe.recv()
        if kind == 'refused' and ('\n' in text.strip() or not text.strip()):
            kind = 'no line, or several'
        if kind == 'accepted' and verdict == 'refused':
            kind = 'accepted wrongly'
        if kind == 'refused' and verdict == 'same':
            kind = 'refused wrongly'
        return name, kind, text

    def _start(self) -> None:
        context = multiprocessing.get_context('spawn')
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, *self._arguments), daemon=True)
        self._process.start()
        other.close()

    def _wait(self, seconds: float) -> bool:
        """Return whether the process said something in time; else it is ended, and `_end` says why."""
        until = time.monotonic() + seconds
        while not self._pipe.poll(0.02):
            too_much = resident(self._process.pid) > BYTES
            alive = self._process.is_alive()
            if too_much or time.monotonic() > until or not alive:
                self._process.kill()
                self._process.join()
                self._end = ('above 2 GiB', '') if too_much else ('hung', '') if alive else ('died', '')
                self._process = None
                return False
        return self._process.is_alive() or self._dead()

    def _dead(self) -> bool:
        """Note that the process ended by itself."""
        self._end, self._process = ('died', ''), None
        return False
