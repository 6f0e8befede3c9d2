"""Evidence on several domains of the calibration text as one, by weights of the domains.

Dimensions: D domains, E experts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linprog

from stages.cluster.spec import Mix
from stages.contracts.arrow import Array
from stages.contracts.evidence import LayerEvidence, OutputGroups, read_evidence
from stages.contracts.paths import domain_dir

SALIENCY = "gated_output_norm_sum"
"""Column of the saliency that `max_min` shares out: REAP's (arXiv:2510.13999), as a sum."""


def read_mixed(
    calibrate_dir: Path, layer: int, required: Iterable[str], mix: Mix | None, num_kept: int | None
) -> LayerEvidence:
    """The evidence of a layer. mix: None for a text without domains. num_kept: experts of which `max_min` assumes that they
    stay; None for half of them. Raises InputError as `read_evidence` does."""
    if mix is None:
        return read_evidence(calibrate_dir, layer, required)
    required = list(required)
    parts = [read_evidence(domain_dir(calibrate_dir, domain), layer, required) for domain in mix.domains]
    if mix.weights is None:
        return mixed(parts, max_min_weights(parts, num_kept or -(-parts[0].num_experts // 2)))
    return mixed(parts, np.array(mix.weights))


def mixed(parts: Sequence[LayerEvidence], weight_D: Array) -> LayerEvidence:
    """Evidence in which domain d has the share weight_D[d] of all tokens, whatever number it has. The weights sum to one.

    A sum over tokens becomes sum_d weight_d T / T_d sum_d, with T_d tokens of domain d and T of all. With equal weights and
    equal numbers of tokens these are plain sums.
    """
    first, num_tokens = parts[0], sum(part.num_tokens for part in parts)
    tokens_D = np.array([part.num_tokens for part in parts])
    factor_D = weight_D * num_tokens / tokens_D
    factors: list[float | int] = [1 if np.isclose(factor, 1, rtol=1e-12, atol=0) else float(factor) for factor in factor_D]

    def weighted(value_of: Callable[[LayerEvidence], Any]) -> Any:
        return sum(factor * value_of(part) for factor, part in zip(factors, parts, strict=True))

    def column(name: str) -> Array:
        match first.over_domains.get(name, "sum"):
            case "max":
                return reduce(np.maximum, (part[name] for part in parts))
            case "same":
                return first[name]
            case "tokens":
                return np.concatenate([part[name] for part in parts], axis=1)
            case "weighted_tokens":
                return np.concatenate([factor * part[name] for factor, part in zip(factors, parts, strict=True)], axis=1)
            case _:
                return weighted(lambda part: part[name])  # type: ignore[no-any-return]

    groups = first.groups and OutputGroups(
        weighted(lambda part: _groups(part).num_tokens_G), weighted(lambda part: _groups(part).output_sum_EGD)
    )
    return replace(
        first,
        num_tokens=num_tokens,
        num_output_tokens=sum(part.num_output_tokens for part in parts),
        columns={name: column(name) for name in first.columns},
        groups=groups,
    )


def _groups(evidence: LayerEvidence) -> OutputGroups:
    assert evidence.groups is not None
    return evidence.groups


def max_min_weights(parts: Sequence[LayerEvidence], num_kept: int) -> Array:
    """Weights [D] by which the saliency that is kept in the domain that keeps least is as large as it can be.

    With s_de the share of expert e in the saliency of domain d, and z_e how much of the expert is kept, that is max_z min_d
    sum_e z_e s_de for 0 <= z <= 1 and sum_e z_e = num_kept. By duality of linear programs it equals

        min over lambda >= 0, sum_d lambda_d = 1 of the sum of the num_kept largest values of sum_d lambda_d s_de,

    a convex problem, solved as a linear program (HiGHS): the experts with the largest values under lambda are those to keep.
    The weights are lambda as it applies to sums over the same number of tokens. A domain without any saliency counts nothing.
    """
    saliency_DE = np.stack([part[SALIENCY] for part in parts])
    total_D = saliency_DE.sum(1)
    counts_D = total_D > 0
    if not counts_D.any():
        return np.full(len(parts), 1 / len(parts))
    share_DE = saliency_DE[counts_D] / total_D[counts_D, None]
    num_domains, num_experts = share_DE.shape
    # variables: lambda [D], the value mu that the last kept expert has, and what each expert has above it [E]
    cost = np.concatenate([np.zeros(num_domains), [num_kept], np.ones(num_experts)])
    above_EV = np.hstack([share_DE.T, -np.ones((num_experts, 1)), -np.eye(num_experts)])
    one_1V = np.concatenate([np.ones(num_domains), np.zeros(1 + num_experts)])[None]
    bounds = [(0, None)] * num_domains + [(None, None)] + [(0, None)] * num_experts
    solved = linprog(cost, A_ub=above_EV, b_ub=np.zeros(num_experts), A_eq=one_1V, b_eq=[1], bounds=bounds, method="highs")
    assert solved.x is not None, solved.message  # bounded below by 0, and lambda = 1 / D is feasible
    weight_D = np.zeros(len(parts))
    tokens_D = np.array([part.num_tokens for part in parts])
    weight_D[counts_D] = solved.x[:num_domains] * tokens_D[counts_D] / total_D[counts_D]
    return weight_D / weight_D.sum()  # type: ignore[no-any-return]
