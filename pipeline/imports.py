"""Imports functions by name when they are needed: stage code is slow to import, and a driver on Ray never runs it."""

import importlib
from collections.abc import Callable

from pipeline.driver.process import collection_paused


def resolve(function: str) -> Callable[..., object]:
    """The function named by "package.module:function"."""
    module, _, name = function.partition(":")
    with collection_paused():
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
