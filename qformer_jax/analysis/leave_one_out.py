"""How much each query carries: what a score loses when one query is left out, and the others stay as they are.

A query is left out where the queries are read, after the Q-Former: its cosine from ITC's maximum, its logits from ITM's
mean, its token from the language model's prefix (so that text moves up by one place, as with one query fewer). So one
pass of the Q-Former serves all queries, and what a query passed on to others through self-attention stays theirs.
Two queries that say the same carry nothing each: the other one says it too.
"""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from ..errors import UserError
from ..inference import forward
from ..inference.blip2 import Blip2
from ..inference.prompts import target_rows
from ..models import masks
from ..models.blip2 import Prefix
from ..typing import Float, Int


def cosines(image_embedding: Float['N Q E'], text_embedding: Float['N E']) -> Float['N Q']:
    """Return how well each query fits the text of its picture; ITC's similarity is the best of them."""
    return np.einsum('nqe,ne->nq', image_embedding, text_embedding)


def itc_wins(image_embedding: Float['N Q E'], text_embedding: Float['N E']) -> Int['Q']:
    """Return for how many of N pictures each query fits the text best; of equal ones the first wins."""
    winners = cosines(image_embedding, text_embedding).argmax(axis=1)
    return np.bincount(winners, minlength=image_embedding.shape[1])


def itc_drop(each: Float['N Q']) -> Float['N Q']:
    """Return what the maximum of the cosines loses without each query: best minus second best for the best, else 0."""
    check(each.shape[1])
    second, best = np.sort(each, axis=1)[:, -2:].T
    is_best = np.arange(each.shape[1])[None] == each.argmax(axis=1)[:, None]
    return np.where(is_best, (best - second)[:, None], 0)


def itm_drop(each: Float['N Q']) -> Float['N Q']:
    """Return what the mean of the queries' log odds (nats) loses without each: (own - mean) / (Q - 1).

    Worked example: of 1, 2 and 6 the mean is 3, and without the last one 1.5; the drop is 1.5 = (6 - 3) / 2.
    """
    check(each.shape[1])
    return (each - each.mean(axis=1, keepdims=True)) / (each.shape[1] - 1)


def lm_drop(
    model: Blip2, prefix: Prefix, prompts: Sequence[str], targets: Sequence[str]
) -> tuple[Float['N'], Float['N Q']]:
    """Return log p (nats) of each target after [prefix, prompt], and what it loses without each query's token."""
    queries = model.run.model.qformer.num_queries
    check(queries)
    rows = target_rows(model.lm_tokenizer, prompts, targets)
    losses = partial(forward.target_losses, model.model, model.params)

    def log_p(prefix: Prefix) -> Float['N']:
        return -forward.in_batches(losses, model.batch_size, prefix, *rows).sum(axis=1)

    whole = log_p(prefix)
    without = [log_p(leave_out(prefix, query)) for query in range(queries)]
    return whole, whole[:, None] - np.stack(without, axis=1)


def leave_out(prefix: Prefix, query: int) -> Prefix:
    """Return the prefix without a query's token; the queries' are the first that exist, a connector's come after them.

    Worked example: of slots [missing, query 0, query 1, connector], leaving out query 1 lets slot 2 be missing, and
    what is missing goes to the front: [missing, missing, query 0, connector].
    """
    slot = (~prefix.mask).sum(axis=1, keepdims=True) + query
    mask = prefix.mask & (np.arange(prefix.mask.shape[1])[None] != slot)
    return jax.tree.map(np.asarray, Prefix(*masks.last(prefix.vectors, mask)))


def check(queries: int) -> None:
    """Raise UserError where there is one query only."""
    if queries < 2:
        raise UserError('this run has one query, and without it nothing is left: leave the text out')
