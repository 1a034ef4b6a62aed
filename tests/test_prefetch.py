"""Reading ahead: in order, in full batches, and before it is asked for."""

import threading

import pytest

from qformer_jax.data import prefetch


def test_everything_comes_in_order_in_full_batches():
    assert list(prefetch.batches(iter(range(7)), 3, lambda n: n * n)) == [[0, 1, 4], [9, 16, 25], [36]]
    assert list(prefetch.batches([], 3, str)) == []


def test_the_next_batch_is_read_while_one_is_in_use():
    begun = threading.Event()
    rows = prefetch.batches(range(4), 2, lambda n: begun.set() if n == 3 else n)
    assert next(rows) == [0, 1]
    assert begun.wait(20), 'item 3 was not read before its batch was asked for'
    rows.close()


def test_an_error_comes_when_its_turn_comes():
    rows = prefetch.batches([1, 2, 0, 4], 2, lambda n: 4 // n)
    assert next(rows) == [4, 2]
    with pytest.raises(ZeroDivisionError):
        next(rows)
