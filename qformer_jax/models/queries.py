"""Where the queries start: as learned vectors, or as mixtures of them that each picture chooses.

Our name for the second is dynamic queries. They follow Learning Dynamic Query Combinations (Cui et al. 2023), where the
queries are a detector's: each is a convex mixture of some entries of a bank, by weights that a small network reads from
the pooled picture. Of a bank of 6 entries, two queries mix three each:

    bank     0 1 2 3 4 5        A mixture stays between its entries, so what the layers learned of one holds
    query 0  x x x              nearby for all. No text is read: a picture's queries serve every text.
    query 1        x x x

Their second branch, which trains the bank whatever the pictures are, is `objective.static_queries`; theirs decodes the
whole bank, ours each query's mean, which costs as much as the first branch however large the bank is.
"""

import jax
import jax.numpy as jnp

from ..typing import Float
from .layers import at_least_float32


def means(bank: Float['R D'], each: int) -> Float['Q D']:
    """Return the even mixture of each query's entries, whatever the picture; of one entry, the entry itself."""
    return bank.reshape(-1, each, bank.shape[-1]).mean(axis=1)


def mixtures(bank: Float['R D'], logits: Float['B R'], each: int) -> Float['B Q D']:
    """Return each picture's mixtures, with the softmax of each query's `each` logits as weights."""
    weights = jax.nn.softmax(at_least_float32(logits).reshape(logits.shape[0], -1, each))
    return jnp.einsum('bqr,qrd->bqd', weights, bank.reshape(-1, each, bank.shape[-1]))
