"""Which kinds of budgets there are. Adding one adds a file here and one line."""

import importlib
from functools import cache

from stages.contracts.budget import BudgetKind, BudgetKinds

MODULES = (
    "stages.cluster.budgets.uniform",
    "stages.cluster.budgets.usage",
    "stages.cluster.budgets.heights",
    "stages.cluster.budgets.error",
)
"""Each holds a BUDGET."""


@cache
def budgets() -> BudgetKinds:
    """All kinds, by name."""
    found = [importlib.import_module(module).BUDGET for module in MODULES]
    assert all(isinstance(kind, BudgetKind) for kind in found)
    return {kind.name: kind for kind in found}
