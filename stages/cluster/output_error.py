"""Errors of a layer's routed output on the sampled tokens, from inner products of the experts' outputs.

With the outputs E_e(x) of a token and gates q_e before and p_e after, the squared error |sum_e (p_e - q_e) E_e(x)|^2 is
d^T G d, where d = p - q and G_ef = <E_e(x), E_f(x)>. What a shared expert adds is the same before and after.

Dimensions: E experts of the source, N sampled tokens.
"""

import numpy as np

from stages.contracts.arrow import Array
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan


def square(gram_ENE: Array, weight_EN: Array) -> float:
    """Sum over tokens of |sum_e weight_e E_e(x)|^2. gram_ENE: inner products; row e, token n, column f."""
    return float(np.einsum("en,enf,fn->", weight_EN, gram_ENE, weight_EN, optimize=True))


def merged_error(evidence: LayerEvidence, plan: LayerPlan) -> float:
    """Squared error of the output under a tied plan, summed over the sampled tokens.

    A slot's output is taken to be the weighted sum of its members' outputs, and its gate is the sum of those of the experts
    that it stands for. Not for plans that drop experts: their gates would have to be known.
    """
    gram_ENE, gate_EN = evidence["sampled_output_gram"], evidence["sampled_gates"]
    passed_EE = np.zeros((evidence.num_experts, evidence.num_experts))
    for slot in plan.slots:
        for member in slot.members:
            passed_EE[list(slot.experts), member.expert] += member.weight
    return square(gram_ENE, passed_EE.T @ gate_EN - gate_EN)
