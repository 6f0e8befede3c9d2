"""Functions by name, imported when they are needed: what computes is slow to import, and a driver on Ray never needs it."""

import importlib
from collections.abc import Callable

from pipeline.driver.process import collection_paused


def resolve(function: str) -> Callable[..., object]:
    """The function that "package.module:function" names."""
    module, _, name = function.partition(":")
    with collection_paused():
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
