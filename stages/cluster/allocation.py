"""Distributes a number of experts over layers so that the sum of what the layers lose is least.

Dimensions: N numbers of experts that a layer may keep, R totals.
"""

from collections.abc import Sequence

import numpy as np

from stages.contracts.budget import LayerCosts
from stages.contracts.errors import InputError


def allocate(layers: Sequence[LayerCosts], total: int, place: str) -> list[int]:
    """Experts that each layer keeps, of the numbers that it may, adding up to `total` at the least sum of costs.

    Exact: dynamic programming over the layers (a knapsack with one choice a layer), whatever the shape of the costs. Of equal
    sums the one in which the last layer that differs keeps more. Raises InputError, naming the place, for a total that no
    choice adds up to.
    """
    least_R = np.full(total + 1, np.inf)
    least_R[0] = 0.0
    chosen: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for layer in layers:
        next_R, choice_R = np.full(total + 1, np.inf), np.zeros(total + 1, dtype=np.int64)
        for count, cost in sorted(zip(layer.num_slots, layer.costs_N.tolist(), strict=True), reverse=True):
            if count > total:
                continue
            with_R = np.full(total + 1, np.inf)
            with_R[count:] = least_R[: total + 1 - count] + cost
            is_better_R = with_R < next_R
            next_R[is_better_R], choice_R[is_better_R] = with_R[is_better_R], count
        least_R = next_R
        chosen.append(choice_R)
    if not np.isfinite(least_R[total]):
        fewest, most = (sum(pick(layer.num_slots) for layer in layers) for pick in (min, max))
        raise InputError(
            f"{place}: the layers may keep {fewest} to {most} experts in all, in steps of budget.multiple_of, and "
            f"clustering.num_experts asks for {total}; change num_experts, budget.least or budget.multiple_of"
        )
    found: list[int] = []
    for choice_R in reversed(chosen):
        found.append(int(choice_R[total]))
        total -= found[-1]
    return found[::-1]
