"""The least increase of the layers' output errors.

Dimensions: E experts, N numbers of experts.
"""

from collections.abc import Sequence

from stages.contracts.arrow import Array
from stages.contracts.budget import BudgetKind, Planner


def costs(planner: Planner, num_slots: Sequence[int]) -> Array:
    """Squared error of the layer's routed output under the method's plan, summed over a sample of tokens, [N].

    An approximation for merged experts: their outputs are taken to be the weighted means of their members' outputs, which is
    what merging the weights gives where experts are linear in their weights. An expert that is kept has its own output.
    """
    import numpy as np

    from stages.cluster.output_error import merged_error

    return np.array([merged_error(planner.evidence, planner.plan(count)) for count in num_slots])


BUDGET = BudgetKind(
    name="error",
    title="Least output error",
    source="hcsmoe",
    limits="What merging does to an expert's nonlinearity is not seen, nor what one layer's error does to the next.",
    costs=costs,
    requires=frozenset({"sampled_output_gram", "sampled_gates"}),
    adds_outputs=True,
)
