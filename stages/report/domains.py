"""What a report says about the domains of a calibration text: how they agree on experts, and what each plan keeps of each.

Dimensions: D domains, E experts.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from stages.contracts.arrow import Array
from stages.contracts.evidence import read_evidence
from stages.contracts.layer_plan import LayerPlan, read_plan
from stages.contracts.paths import domain_dir, plan_file

Shares = Mapping[int, Array]
"""By layer: the share of each expert in the saliency of each domain, [D, E]. Saliency is REAP's (arXiv:2510.13999), as a sum:
gate * ||E_e(x)|| over routed tokens."""


def saliency_shares(calibrate_dir: Path, domains: Sequence[str], layers: Sequence[int]) -> Shares:
    """Read from the evidence. All zero for a domain without saliency."""
    shares: dict[int, Array] = {}
    for layer in layers:
        folders = [domain_dir(calibrate_dir, domain) for domain in domains]
        saliency_DE = np.stack([read_evidence(folder, layer)["gated_output_norm_sum"] for folder in folders])
        total_D1 = saliency_DE.sum(1, keepdims=True)
        shares[layer] = np.divide(saliency_DE, total_D1, out=np.zeros_like(saliency_DE), where=total_D1 > 0)
    return shares


def rank_correlations(domains: Sequence[str], shares: Shares) -> list[dict[str, Any]]:
    """Spearman's rank correlation of the experts' saliency for each two domains: mean over layers, and the least.
    None where it is not defined, because a domain ranks no expert before another."""
    found = []
    for one, other in combinations(range(len(domains)), 2):
        values = [float(spearmanr(share_DE[one], share_DE[other]).statistic) for share_DE in shares.values()]
        is_known = bool(np.isfinite(values).all())
        found.append(
            {
                "domains": [domains[one], domains[other]],
                "mean": sum(values) / len(values) if is_known else None,
                "least": min(values) if is_known else None,
            }
        )
    return found


def coverage(domains: Sequence[str], shares: Shares, plan_dir: Path) -> dict[str, dict[str, float]]:
    """Of each domain, the share of saliency on experts that stay: mean over layers, and the least.

    An expert stays where it is a slot by itself, or has the most weight in one.
    """
    share_DL = np.stack(
        [share_DE[:, _staying(read_plan(plan_file(plan_dir, layer)))].sum(1) for layer, share_DE in shares.items()], axis=1
    )
    return {
        domain: {"mean": float(share_L.mean()), "least": float(share_L.min())}
        for domain, share_L in zip(domains, share_DL, strict=True)
    }


def _staying(plan: LayerPlan) -> list[int]:
    return [max(slot.members, key=lambda member: member.weight).expert for slot in plan.slots]
