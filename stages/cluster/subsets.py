"""Sets of experts, and the one whose layer output is nearest to that of all experts.

Dimensions: E experts, N sampled tokens, k experts a token, S experts of a set.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import comb

import numpy as np

from stages.cluster.order import by_content
from stages.cluster.rerouting import RoutingRule, rule_of
from stages.contracts.arrow import Array
from stages.contracts.errors import InputError
from stages.contracts.evidence import LayerEvidence


class OutputErrors:
    """Errors of a layer's routed output under a router that has some of its experts alone.

    |sum_e (p_e - q_e) E_e|^2 = p^T G p - 2 p^T G q + q^T G q, where p has k entries: k^2 products a token.
    """

    def __init__(self, evidence: LayerEvidence) -> None:
        gate_EN = evidence["sampled_gates"]
        self._gram_NEE = np.ascontiguousarray(evidence["sampled_output_gram"].transpose(1, 0, 2))
        self._logit_NE = np.ascontiguousarray(evidence["sampled_logits"].T)
        self._bias_E = evidence["router_choice_bias"]
        self._toward_NE = np.einsum("nef,fn->ne", self._gram_NEE, gate_EN)
        self._square = float(np.einsum("ne,en->", self._toward_NE, gate_EN))
        self.rule: RoutingRule = rule_of(self._logit_NE, self._bias_E, gate_EN.T, f"layer {evidence.layer}")

    def of(self, experts: Sequence[int]) -> float:
        """Squared error summed over the sampled tokens."""
        picked_Nk, gate_Nk = self.rule.route(self._logit_NE, self._bias_E, experts)
        tokens_N1 = np.arange(len(picked_Nk))[:, None]
        gram_Nkk = self._gram_NEE[tokens_N1[:, :, None], picked_Nk[:, :, None], picked_Nk[:, None, :]]
        among = np.einsum("ni,nij,nj->", gate_Nk, gram_Nkk, gate_Nk)
        toward = (gate_Nk * self._toward_NE[tokens_N1, picked_Nk]).sum()
        return float(among - 2 * toward) + self._square


def least_error(evidence: LayerEvidence, size: int, protected: Sequence[int], most: int, seed: int) -> list[int]:
    """The set of `size` experts, the protected among them, with the least output error; of equal ones the first tried."""
    free = sorted(set(range(evidence.num_experts)) - set(protected))
    num_free = size - len(protected)
    if num_free < 0:
        raise InputError(
            f"layer {evidence.layer}: clustering.protect is super and {len(protected)} experts are super experts, of which "
            f"{size} slots cannot hold all; raise clustering.num_experts, or set protect to none"
        )
    errors = OutputErrors(evidence)
    # by content, so that neither ties nor the seed depend on the numbers of the experts
    rank_E = np.argsort(by_content(evidence["output_sum"]))
    free.sort(key=lambda expert: rank_E[expert])
    best = min(_sets(evidence, free, num_free, most, seed), key=lambda chosen: errors.of([*protected, *chosen]))
    return sorted([*protected, *best])


def _sets(evidence: LayerEvidence, free: list[int], size: int, most: int, seed: int) -> Iterator[tuple[int, ...]]:
    """All sets of so many of the free experts; where there are more than `most`, the most used and others at random."""
    if comb(len(free), size) <= most:
        yield from combinations(free, size)
        return
    used_E: Array = evidence["num_routed_tokens"]
    yield tuple(sorted(free, key=lambda expert: -used_E[expert])[:size])
    chance = np.random.default_rng((seed, evidence.layer))
    for _ in range(most - 1):
        yield tuple(free[place] for place in chance.choice(len(free), size, replace=False))
