"""How much an expert matters: one number for each, of which pruning keeps the largest.

Dimensions: E experts.
"""

import numpy as np

from stages.contracts.arrow import Array
from stages.contracts.evidence import LayerEvidence


def over_routed(evidence: LayerEvidence, column: str) -> Array:
    """Mean [E] of a sum over the tokens that are routed to an expert; 0 where there are none."""
    sum_E, used_E = evidence[column], evidence["num_routed_tokens"]
    return np.divide(sum_E, used_E, out=np.zeros(len(sum_E)), where=used_E > 0)


def reap(evidence: LayerEvidence) -> Array:
    """Mean over routed tokens of gate * ||E_e(x)||, [E] (REAP, arXiv:2510.13999)."""
    return over_routed(evidence, "gated_output_norm_sum")


def largest(values_E: Array, count: int) -> list[int]:
    """Experts with the largest values; of equal ones the first."""
    return np.argsort(-values_E, kind="stable")[:count].tolist()  # type: ignore[no-any-return]
