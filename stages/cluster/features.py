"""Names of the features by which experts are compared, and the columns of evidence that they need beyond those of every run.

What computes them is a table of `stages.cluster.linkage`, which imports scipy.
"""

from typing import Literal

Feature = Literal["expert_output", "router_logits", "gated_output", "weight", "token_wise"]
"""Mean output over all tokens; router logits over all tokens; mean of the outputs times gates over routed tokens; all weights
of an expert; outputs token by token, not their mean."""

_COLUMNS = {"gated_output": "gated_output_sum", "weight": "weight_gram", "token_wise": "output_gram"}


def columns_of(feature: Feature) -> frozenset[str]:
    """The further column of a feature, if it has one."""
    return frozenset({_COLUMNS[feature]} if feature in _COLUMNS else ())
