"""Nested queries: the first m of Q alone are a Q-Former too, for any m at run time.

Our name; the method is that of the Matryoshka Query Transformer (MQT, Hu et al. 2024, section 3): each step of training
keeps the first m queries only, and m is drawn anew. The shapes stay, the others are masked: nobody sees them, they see
but are not read, and so they learn nothing in that step. In use they are cut off, which gives the same.

MQT draws m evenly from 2, 4, 6, ..., 256. Ours comes from 1, 2, 4, ... below Q, and Q, as the widths of Matryoshka
representations do (Kusupati et al. 2022, section 3; widths between them interpolate): of 32 queries, the last one
learns in every sixth step and not in every 32nd.
"""

import jax
import jax.numpy as jnp

from ..typing import Array, Bool


def counts(num_queries: int) -> tuple[int, ...]:
    """Return the numbers of queries that training draws from: of 6, these are 1, 2, 4 and 6."""
    return (*(2**i for i in range((num_queries - 1).bit_length())), num_queries)


def draw(key: Array, num_queries: int) -> Bool['Q']:
    """Return which queries exist in a step: the first m, each of `counts` as likely as the others."""
    kept = jax.random.choice(key, jnp.array(counts(num_queries)))
    return jnp.arange(num_queries) < kept
