"""Mutants of the parts that the conversion tables name: another epsilon in each norm, another GELU in each MLP."""

import re
from collections.abc import Iterator

from qformer_jax.convert.table import Row
from qformer_jax.models import qformer

from .mutant import Mutant, option, replaced
from .tables import FAMILIES, Family

OTHER = {'gelu': 'gelu_tanh', 'quick_gelu': 'gelu', 'relu': 'gelu'}


def mutants() -> Iterator[Mutant]:
    """Return them all, read off the tables."""
    for family in FAMILIES:
        shows = tuple(name for name in family.cases if name.startswith('low_variance'))
        for path in _paths(family, '/scale'):
            for factor in (0.1, 10.0):
                change = option(_regex(path), 'epsilon', lambda eps, factor=factor: factor * eps)
                yield Mutant('epsilon', f'{family.name}: {path} times {factor:g}', shows, change)
        for path in _paths(family, '/up/kernel'):
            change = option(_regex(path), 'activation', OTHER.__getitem__)
            yield Mutant('activation', f'{family.name}: {path}', family.cases, change)
    tanh = replaced(qformer, 'gelu', lambda _: lambda x: qformer.jax.nn.gelu(x, approximate=True))
    yield Mutant('activation', 'Q-Former: qformer/lm_head', ('small_stage1', 'qformer_modes'), tanh)


def _paths(family: Family, end: str) -> list[str]:
    paths = [path for row in family.table if isinstance(row, Row) for path in row.paths]
    return [path.removesuffix(end) for path in paths if path.endswith(end)]


def _regex(path: str) -> str:
    """Return the regex of a part; cases of a tower or a Q-Former alone leave the first name out."""
    first, rest = path.split('/', 1)
    return f'({first}/)?' + re.escape(rest).replace(r'\{i\}', r'\d+')
