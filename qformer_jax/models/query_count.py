"""Another number of queries for a trained Q-Former: fewer of them, or more.

Queries have no positions, so any of them form a Q-Former; which ones are a good choice is another question. After
training with nested queries (`nested.py`) the first m are; otherwise those that carry most are a better start, in the
order that `qformer queries` finds.
New ones are copies, in turn, of those that are there, and noise of a tenth of the table's deviation: each begins by
reading what its original reads (a cosine of 0.995 to it), where a fresh vector would read nothing that the layers know,
and without noise both would get equal gradients for ever.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import config
from ..errors import UserError
from ..typing import Array, Float, Int

NOISE = 0.1
"""Deviation of a copy from its original, as a share of the table's deviation."""
TABLE = 'qformer/query_token'
"""The parameter [Q, D] whose shape depends on the number of queries; of queries that are alike, the only one."""


def resized(c: config.Blip2Config, count: int) -> config.Blip2Config:
    """Return the configuration with so many queries; raises UserError without a Q-Former, or for none."""
    if not c.qformer:
        raise UserError('this run has no Q-Former, and so no queries to count')
    if count < 1:
        raise UserError(f'{count} queries: at least 1 is needed')
    check_alike(c.qformer)
    return replace(c, qformer=replace(c.qformer, num_queries=count))


def read_order(path: Path, there: int) -> Int['Q']:
    """Return the order of queries that `qformer queries` wrote; raises UserError where it is no order of so many."""
    try:
        with np.load(path) as file:
            order = file['order']
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"'{path}' holds no order of queries: give the queries.npz of `qformer queries RUN`") from error
    if sorted(order.tolist()) != list(range(there)):
        raise UserError(f"'{path}' orders {len(order)} queries, but this model has {there}: it is another run's")
    return order


def check_alike(c: config.QformerConfig) -> None:
    """Raise UserError where a query is more than its vector: mixed out of a bank, or tied to a part of the picture."""
    for name, plain in (('query_bank', 1), ('local_queries', 0), ('gated_residual', False)):
        if getattr(c, name) != plain:
            option = f'model.qformer.{name.replace("_", "-")}'
            raise UserError(f'the number of queries cannot change: {option} makes each more than a vector of its own')


def resize(table: Float['Q D'], count: int, order: Int['Q'] | None = None) -> Array:
    """Return the table [count, D] of the first queries in an order (default: their own), and of copies behind them.

    Of 3 queries in the order 2, 0, 1, two are 2, 0, and five 2, 0, 1, 2 with noise, 0 with noise.
    """
    order = np.arange(len(table)) if order is None else order
    if count <= len(table):
        return table[order[:count]]
    table = np.asarray(table)
    grown = table[np.resize(order, count)].astype(np.float32)
    noise = np.random.default_rng(0).normal(size=grown.shape) * NOISE * table.astype(np.float32).std()
    new = (np.arange(count) >= len(table))[:, None]
    return np.where(new, grown + noise, grown).astype(table.dtype)
