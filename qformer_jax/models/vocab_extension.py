"""Rows added to a language model's vocabulary: they learn, and its own tables stay as they are, to the byte.

Words of its own have ids 0..N-1, added ones N, N+1, ... in the order of `boxes.words`. The component `grounding` holds
`word_embedding` [A, L] and, where the model writes with another table than it reads with, `output_embedding` [A, L].
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from .. import boxes, config
from ..rules import flatten, unflatten
from ..typing import Array, Float, Int, Params
from .grid_embedding import grid_embedding
from .lora import Adapted

TABLES = (('lm/word_embedding', 'grounding/word_embedding', 0), ('lm/lm_head/kernel', 'grounding/output_embedding', 1))
"""Each table of a language model, the rows added to it, and the axis that counts words."""


@struct.dataclass
class Extended:
    """What stands in the place of a table: the table, and the rows that were added."""

    table: Any
    """[N, L], or an output kernel [L, N], which may be adapted (LoRA)."""
    added: Any
    """[A, L]."""
    axis: int = struct.field(pytree_node=False)
    """Axis of the table that counts words."""

    def __getitem__(self, ids: Int['*T']) -> Float['*T L']:
        """Return the vectors of ids, as an array gives them; of a table [N, L]."""
        own = ids < len(self.table)
        known = self.table[jnp.where(own, ids, 0)]
        return jnp.where(own[..., None], known, self.added[jnp.where(own, 0, ids - len(self.table))])

    def merged(self) -> Array:
        """Return table and rows as one array of the table's type."""
        table = self.table.merged() if isinstance(self.table, Adapted) else self.table
        rows = np.asarray(self.added).astype(table.dtype)
        return np.concatenate([table, rows.T if self.axis else rows], axis=self.axis)


def init(c: config.GroundingConfig, lm: Params, key: Array) -> Params:
    """Return fresh rows as large as the language model's: the mean of its table, and its deviation about it.

    The row of a place is the sum of a vector of its row and one of its column in the grid, both of which change slowly
    from each to the next: neighbours begin alike, and what is learned of one place is half learned of others.
    """
    flat, rows = flatten(lm), {}
    for i, (table, added, axis) in enumerate(TABLES):
        if (own := flat.get(table.removeprefix('lm/'))) is not None:
            own = jnp.asarray(own.T if axis else own, jnp.float32)
            fresh = _unit(c.grid, own.shape[1], jax.random.fold_in(key, i))
            rows[added.removeprefix('grounding/')] = own.mean(axis=0, keepdims=True) + own.std() * fresh
    return unflatten(rows)


def _unit(grid: int, width: int, key: Array) -> Float['A L']:
    """Return rows of variance about 1 for all added words."""
    marks, down, across = jax.random.split(key, 3)
    return jnp.concatenate(
        [jax.random.normal(marks, (len(boxes.MARKUP), width)), grid_embedding(grid, width, down, across)]
    )


def extend(params: Params, c: config.GroundingConfig | None) -> Params:
    """Return the parameters with added rows at their tables, and no component `grounding`: what `apply` takes."""
    if c is None or c.in_table:
        return params
    flat = flatten(params)
    for table, added, axis in TABLES:
        if added in flat:
            flat[table] = Extended(flat[table], flat.pop(added), axis)
    return unflatten(flat)


def merge(params: Params, c: config.GroundingConfig | None) -> Params:
    """Return the parameters with added rows at the end of their tables: a language model with more words."""
    flat = flatten(extend(params, c))
    return unflatten({path: leaf.merged() if isinstance(leaf, Extended) else leaf for path, leaf in flat.items()})


def merged(m: config.Blip2Config) -> config.Blip2Config:
    """Return the configuration of a model whose added rows are at the end of its tables."""
    if m.grounding is None or m.grounding.in_table:
        return m
    lm = replace(m.lm, vocab_size=m.lm.vocab_size + len(boxes.words(m.grounding.grid)))
    return replace(m, lm=lm, grounding=replace(m.grounding, in_table=True))
