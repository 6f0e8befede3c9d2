"""Making the next items of a stream while the one before is used."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """The items of a generator, which a thread of its own runs up to `depth` items in advance; none may be None.

    An item is begun only when all but the `depth` before it are done with, so a generator that makes its items in turn in
    `depth` + 1 buffers overwrites none that is in use. What the generator raises is raised here. Close it to end the thread.
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
