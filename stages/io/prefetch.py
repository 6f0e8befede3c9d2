"""Computes the next items of a stream while the current one is in use."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """The items of a generator, computed up to `depth` items ahead in a separate thread. Items must not be None.

    At most `depth` + 1 items exist at a time. So a generator may fill `depth` + 1 buffers in turn without overwriting one in
    use. Exceptions of the generator are raised here. Close this generator to end the thread.
    """
    with closing(items), ThreadPoolExecutor(1, "ahead") as pool:
        pending = deque(pool.submit(next, items, None) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not None:
                yield item
                pending.append(pool.submit(next, items, None))
        finally:
            for future in pending:
                future.cancel()
