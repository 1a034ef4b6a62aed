"""Mutants made from the conversion tables: rows that exchange their parameters, kernels that are not transposed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from qformer_jax import config
from qformer_jax.convert import lavis
from qformer_jax.convert.lazy_tensors import in_memory
from qformer_jax.convert.table import (
    IDENTITY,
    SPLIT_QKV_TRANSPOSE,
    TRANSPOSE,
    Row,
    Table,
    Transform,
    check_complete,
    check_derived,
    row_of,
    to_jax,
)
from qformer_jax.rules import flatten, unflatten
from qformer_jax.typing import Params

from .mutant import THEIRS, Mutant, read
from .subject import Subject


@dataclass(frozen=True)
class Family:
    """A conversion table, and the cases with such parameters, cheapest first."""

    name: str
    table: Table
    cases: tuple[str, ...]


FAMILIES = (
    Family('EVA', lavis.EVA_VIT, ('low_variance_eva_vit', 'eva_vit')),
    Family('CLIP', lavis.CLIP_VIT, ('low_variance_clip_vit', 'clip_vit')),
    Family(
        'Q-Former',
        lavis.QFORMER,
        ('small_stage1', 'low_variance_qformer_modes', 'low_variance_opt_stage2', 'qformer_modes'),
    ),
    Family('OPT', lavis.language_model(config.OptConfig()), ('low_variance_opt_stage2', 'opt_stage2')),
    Family('T5', lavis.language_model(config.T5Config()), ('low_variance_t5_stage2', 't5_stage2')),
)
SPLIT_QKV_KEEP = Transform(lambda x: tuple(np.split(x, 3)), lambda *x: np.concatenate(x))
UNTRANSPOSED = {TRANSPOSE: IDENTITY, SPLIT_QKV_TRANSPOSE: SPLIT_QKV_KEEP}
Place = tuple[int, int]
"""A row of a table, and one of its paths."""
Known = dict[Place, np.ndarray]


def huggingface_families() -> tuple[Family, ...]:
    """Return the tables of formats that LAVIS does not read."""
    from . import huggingface  # needs PyTorch

    kinds = (*huggingface.MODELS, huggingface.GGUF)
    return tuple(Family(kind, huggingface.table(kind), (f'{THEIRS}{kind}',)) for kind in kinds)


def mutants(families: tuple[Family, ...] | None = None) -> Iterator[Mutant]:
    """Return every exchange of two parameters of the same shape, and every square kernel that is not transposed."""
    for family in (*FAMILIES, *huggingface_families()) if families is None else families:
        known = filled(family)
        for one, other in _alike(family, known):
            yield _mutant('row', family, _exchanged(family.table, one, other), (one, other))
        for place in _square(family, known):
            yield _mutant('transpose', family, _untransposed(family.table, place[0]), (place,))


def filled(family: Family) -> Known:
    """Return every parameter that a table fills, in the family's first case and the lowest such layer."""
    known = flatten(read(family.cases[0]).work.params)
    out = {}
    for n, row in enumerate(family.table):
        for m, path in enumerate(row.paths if isinstance(row, Row) else ()):
            found = [known[layer] for layer in (path.replace('{i}', str(i)) for i in range(2)) if layer in known]
            out |= {(n, m): found[0]} if found else {}
    return out


def _alike(family: Family, known: Known) -> Iterator[tuple[Place, Place]]:
    """Return pairs of the same shape but not equal; a row that counts layers against one that does not is no table."""

    def kind(place: Place) -> tuple:
        return known[place].shape, '{i}' in family.table[place[0]].key

    pairs = ((a, b) for a, b in combinations(known, 2) if kind(a) == kind(b))
    return ((a, b) for a, b in pairs if not np.array_equal(known[a], known[b]))


def _square(family: Family, known: Known) -> Iterator[Place]:
    """Return the kernels whose wrong orientation has the right shape."""
    return (
        (n, m)
        for (n, m), x in known.items()
        if m == 0 and family.table[n].transform in UNTRANSPOSED and x.shape[0] == x.shape[1]
    )


def _exchanged(table: Table, one: Place, other: Place) -> Table:
    rows = [list(row.paths) if isinstance(row, Row) else None for row in table]
    (a, i), (b, j) = one, other
    rows[a][i], rows[b][j] = rows[b][j], rows[a][i]
    return tuple(
        row if paths is None else replace(row, paths=tuple(paths)) for row, paths in zip(table, rows, strict=True)
    )


def _untransposed(table: Table, n: int) -> Table:
    return (*table[:n], replace(table[n], transform=UNTRANSPOSED[table[n].transform]), *table[n + 1 :])


def _mutant(kind: str, family: Family, wrong: Table, places: tuple[Place, ...]) -> Mutant:
    @contextmanager
    def put_in(case: Subject) -> Iterator[Params]:
        yield _converted(wrong, case)

    name = ' <-> '.join(family.table[n].paths[m] for n, m in places)
    return Mutant(kind, f'{family.name}: {name}', family.cases, put_in, compiled=True)


def _converted(wrong: Table, case: Subject) -> Params:
    """Return the parameters of a case with those that the table fills read by the wrong one."""
    right = case.work.params
    torch_state = in_memory({key: x for key, x in case.state.items() if row_of(wrong, key)})
    jax_state = in_memory(flatten(right)) | to_jax(wrong, torch_state)
    check_complete(jax_state, right)
    check_derived(wrong, torch_state, jax_state)
    return unflatten({path: tensor.read() for path, tensor in jax_state.items()})
