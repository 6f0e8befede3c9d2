"""Collector of the router's scores and logits on all tokens, whichever experts it picks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.calibrate.collectors.base import Collector, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import RouterView


class RouterScores(Collector):
    """Sum of scores, and second moments of logits."""

    name = "router_scores"
    columns = (
        Column("router_probability_sum", "sum over all T tokens of the router's score (softmax or sigmoid of the logits)"),
        Column("router_logit_gram", "row e of sum over T of logit_e * logit_e'", "[E]"),
    )

    def observe_router(self, sums: Sums, router: RouterView) -> None:
        """Add scores and products of logits."""
        sums["router_probability_sum"].add_(router.scores_TE.double().sum(0))
        logits_TE = router.logits_TE.double()
        sums["router_logit_gram"].add_(logits_TE.T @ logits_TE)
