"""Read on threads, a batch ahead: the device works on one batch while the next is decoded."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item, Read = TypeVar('Item'), TypeVar('Read')


def batches(items: Iterable[Item], size: int, read: Callable[[Item], Read]) -> Iterator[list[Read]]:
    """Yield what `read` makes of the items, in order, `size` at a time; threads read the next batch meanwhile.

    An error of `read` is raised where its item's turn comes. Pillow decodes outside Python's lock, so threads suffice.
    """
    items = iter(items)
    with ThreadPoolExecutor() as pool:
        coming = [pool.submit(read, item) for item in itertools.islice(items, size)]
        while coming:
            now, coming = coming, [pool.submit(read, item) for item in itertools.islice(items, size)]
            yield [future.result() for future in now]
