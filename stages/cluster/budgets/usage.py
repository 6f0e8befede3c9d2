"""One threshold of use over all layers: M-SMoE's budget.

Dimensions: E experts, N numbers of experts.
"""

from collections.abc import Sequence

from stages.contracts.arrow import Array
from stages.contracts.budget import BudgetKind, Planner


def costs(planner: Planner, num_slots: Sequence[int]) -> Array:
    """Tokens routed to the experts that are not among the most used ones, [N].

    The least sum over all layers leaves out the least used experts of all layers. Every layer routes the same tokens to the
    same number of experts, so a threshold of tokens is one of frequencies (M-SMoE, arXiv:2310.01334). Protected experts are
    among those that are kept, however little they are used.
    """
    import numpy as np

    used_E = planner.evidence["num_routed_tokens"].astype(np.float64)
    protected = list(planner.settings.protected)
    others = np.sort(np.delete(used_E, protected))[::-1]
    return np.array([others[max(count - len(protected), 0) :].sum() for count in num_slots])


BUDGET = BudgetKind(
    name="usage",
    title="One threshold of use",
    source="M-SMoE, arXiv:2310.01334",
    limits="Use says nothing of how alike experts are; a layer that uses all of them equally is cut like one of copies.",
    costs=costs,
)
