"""Mutants: small wrongs put into our code one at a time; verification against the recorded cases must notice each."""

import re
from collections.abc import Iterator, Sequence

from . import language, masks, objectives, optimizer, parts, processors, tables, writing
from .mutant import Mutant

KINDS = (processors, optimizer, tables, parts, masks, objectives, language, writing)


def every(wanted: Sequence[str]) -> Iterator[Mutant]:
    """Return the mutants whose `kind: name` matches one of the regexes; all of them without one."""
    for kind in KINDS:
        for mutant in kind.mutants():
            if not wanted or any(re.search(pattern, str(mutant)) for pattern in wanted):
                yield mutant
