"""Vectors for the cells of a grid, of which neighbours are alike: what is to say or to see places begins with them."""

import jax
import jax.numpy as jnp
import numpy as np

from ..typing import Array, Float


def grid_embedding(grid: int, width: int, down: Array, across: Array) -> Float['P W']:
    """Return a vector a cell, row by row, of variance about 1: its row's and its column's, sums of slow cosines.

    `down` and `across` are the keys of the draws.
    """
    count = max(grid // 2, 1)
    waves = (2 / count) ** 0.5 * np.cos(np.pi * np.linspace(0, 1, grid)[:, None] * np.arange(1, count + 1)[None])
    rows, columns = (jnp.asarray(waves) @ jax.random.normal(key, (count, width)) for key in (down, across))
    return ((rows[:, None] + columns[None]) / 2**0.5).reshape(-1, width)
