"""A generator that runs in advance, in a thread."""

import threading
from collections.abc import Generator
from contextlib import closing

import pytest

from stages.io.prefetch import ahead


def test_items_come_in_order_and_no_more_than_the_depth_are_begun_in_advance() -> None:
    begun: list[int] = []

    def items() -> Generator[int, None, None]:
        for number in range(20):
            begun.append(number)
            yield number

    for number, item in enumerate(ahead(items(), 2)):
        assert item == number
        assert len(begun) <= number + 3
    assert begun == list(range(20))


def test_the_next_item_is_made_while_this_one_is_used() -> None:
    used, made = threading.Event(), threading.Event()

    def items() -> Generator[str, None, None]:
        yield "first"
        assert used.wait(10)
        made.set()
        yield "second"

    stream = ahead(items(), 1)
    assert next(stream) == "first"
    used.set()
    assert next(stream) == "second"
    assert made.is_set()


def test_what_the_generator_raises_is_raised_where_the_items_are_used() -> None:
    def items() -> Generator[int, None, None]:
        yield 1
        raise ValueError("no second item")

    found = []
    with pytest.raises(ValueError, match="no second item"):
        found.extend(ahead(items(), 3))
    assert found == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_closing_ends_the_generator_and_its_thread() -> None:
    is_closed = threading.Event()

    def items() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            is_closed.set()

    with closing(ahead(items(), 2)) as stream:
        assert next(stream) == 1
        assert [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    assert is_closed.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
