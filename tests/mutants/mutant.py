"""One wrong at a time: what a mutant is, how it is put into the product, and whether a recorded case notices it."""

import inspect
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax

from qformer_jax import verify
from qformer_jax.errors import UserError
from qformer_jax.typing import Params

from .subject import Subject

THEIRS = 'huggingface/'
CASES = Path(__file__).parents[1] / 'goldens' / 'lavis'


PutIn = Callable[[Subject], AbstractContextManager[Params | None]]


@dataclass(frozen=True)
class Mutant:
    """A wrong, and the cases that may notice it, cheapest first."""

    kind: str
    name: str
    cases: tuple[str, ...]
    put_in: PutIn
    """Makes the wrong hold for a while; what it gives are wrong parameters, None where the code is wrong."""
    compiled: bool = False
    """Whether only parameters are wrong, so that a compiled function serves."""
    arrays: str = '.*'
    """Regex of the arrays that may notice it: where a case takes long, the others are not computed."""

    def __str__(self) -> str:
        return f'{self.kind}: {self.name}'


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    case: str
    """The case that noticed it; empty: none did."""
    noticed: tuple[str, ...]
    """The rows that failed, or what the converter said."""
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether a case noticed."""
        return bool(self.case)


@cache
def read(name: str) -> Subject:
    """Return a case, its tolerances measured; raises UserError when our code does not pass it as it is.

    Names that start with `huggingface/` are models of theirs, the others recorded cases of LAVIS.
    """
    subject = _theirs(name.removeprefix(THEIRS)) if name.startswith(THEIRS) else _recorded(CASES / name)
    failed = [row.name for row in subject.work.rows(subject.work.params, 'float32') if not row.passed]
    if failed:
        raise UserError(f'{name} fails without any mutant: {", ".join(failed)}')
    return subject


def _recorded(folder: Path) -> Subject:
    case = verify.read(folder)
    work = verify.work(case)
    return Subject(case.state if work.params else {}, work)


def _theirs(kind: str) -> Subject:
    from . import huggingface  # needs PyTorch

    return huggingface.read(kind)


def run(mutant: Mutant) -> Outcome:
    """Return whether one of its cases notices the mutant."""
    seconds = 0.0
    for name in mutant.cases:
        subject, start = read(name), time.perf_counter()
        noticed = _noticed(mutant, subject)
        seconds += time.perf_counter() - start
        if noticed:
            return Outcome(mutant, name, noticed, seconds)
    return Outcome(mutant, '', (), seconds)


def _noticed(mutant: Mutant, subject: Subject) -> tuple[str, ...]:
    """Return the rows that fail.

    What jit compiled before would not see a change of code: nothing is compiled, or the few arrays anew.
    """
    work, compiled = subject.work, mutant.compiled
    if mutant.arrays != '.*':
        few = {name: x for name, x in work.expected.items() if re.match(mutant.arrays, name)}
        work, compiled = replace(work, function=inspect.unwrap(work.function), expected=few, gradients={}), True
    try:
        with mutant.put_in(subject) as params, nullcontext() if compiled else jax.disable_jit():
            rows = work.rows(work.params if params is None else params, 'float32')
            return tuple(row.name for row in rows if not row.passed)
    except UserError as error:
        return (f'refused: {error}',)


def replaced(owner: object, name: str, make: Callable[[Any], Any]) -> PutIn:
    """Return the change of a module's function or constant to `make(the right one)`; AttributeError if it moved."""
    right = getattr(owner, name)

    @contextmanager
    def put_in(_: Subject) -> Iterator[None]:
        with mock.patch.object(owner, name, make(right)):
            yield

    return put_in


def method(kind: type[nn.Module], name: str, change: Callable[..., Any]) -> PutIn:
    """Return the change of a network's method to `change(the right one, *arguments)`; AttributeError if it moved."""
    getattr(kind, name)

    def intercept(following, args, kwargs, context):
        if isinstance(context.module, kind) and context.method_name == name:
            return change(following, *args, **kwargs)
        return following(*args, **kwargs)

    return lambda _: nn.intercept_methods(intercept)


def option(path: str, name: str, change: Callable[[Any], Any]) -> PutIn:
    """Return the change of an option (epsilon, activation) of the parts of a network at `path`, a regex."""

    def intercept(following, args, kwargs, context):
        part = context.module
        if context.method_name != '__call__' or not re.fullmatch(path, '/'.join(part.path)):
            return following(*args, **kwargs)
        right = getattr(part, name)
        object.__setattr__(part, name, change(right))  # parts are frozen
        try:
            return following(*args, **kwargs)
        finally:
            object.__setattr__(part, name, right)

    return lambda _: nn.intercept_methods(intercept)
