"""NAEE's pruning against layers that are made and run without the dropped experts, for every set of experts.

Dimensions: D hidden size, E experts, N tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from stages.cluster import subsets
from stages.cluster.domains import mixed
from stages.cluster.rerouting import RoutingRule, rule_of
from stages.cluster.subsets import OutputErrors, least_error
from stages.contracts.errors import InputError
from stages.contracts.evidence import LayerEvidence, OverDomains

EXPERTS, TOKENS, HIDDEN, TOP_K = 7, 30, 5, 2
RULES = {
    "mixtral": RoutingRule(TOP_K, "softmax", "logit", is_normalised=True),
    "qwen2_moe": RoutingRule(TOP_K, "softmax", "logit", is_normalised=False),
    "flint": RoutingRule(3, "sigmoid", "logit", is_normalised=True),
    "glm4_moe": RoutingRule(TOP_K, "sigmoid", "score + bias", is_normalised=True, scale=2.5),
    "ernie4_5_moe": RoutingRule(3, "softmax", "score + bias", is_normalised=True),
    "kolibri1": RoutingRule(TOP_K, "sigmoid", "logit + bias", is_normalised=False),
}


class Toy:
    """A layer of linear experts whose router, once some of its rows are taken out, is computed by torch anew."""

    def __init__(self, rule: RoutingRule, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rule = rule
        self.x_ND = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
        self.router_ED = torch.randn(EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)
        self.experts_EDD = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
        bias_E = torch.randn(EXPERTS, generator=generator, dtype=torch.float64) * 0.3
        self.bias_E = torch.zeros(EXPERTS, dtype=torch.float64) if rule.choice == "logit" else bias_E

    def gates(self, kept: Sequence[int]) -> torch.Tensor:
        """Gates [N, E] of the router with the rows of these experts alone."""
        logits = self.x_ND @ self.router_ED[list(kept)].T
        scores = logits.softmax(1) if self.rule.score == "softmax" else logits.sigmoid()
        chosen_by = scores if self.rule.choice.startswith("score") else logits
        picked = (chosen_by + self.bias_E[list(kept)]).topk(self.rule.top_k, dim=1).indices
        gates = scores.gather(1, picked)
        if self.rule.is_normalised:
            gates = gates / gates.sum(1, keepdim=True)
        found = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
        return found.scatter_(1, torch.tensor(list(kept))[picked], self.rule.scale * gates)

    def output(self, kept: Sequence[int]) -> torch.Tensor:
        """Output [N, D] of the layer with these experts alone."""
        gates = self.gates(kept)
        return sum((gates[:, [e]] * (self.x_ND @ self.experts_EDD[e].T) for e in kept), torch.zeros_like(self.x_ND))

    def error(self, kept: Sequence[int]) -> float:
        return float((self.output(kept) - self.output(range(EXPERTS))).square().sum())

    @property
    def evidence(self) -> LayerEvidence:
        output_END = torch.stack([self.x_ND @ expert_DD.T for expert_DD in self.experts_EDD])
        gates = self.gates(range(EXPERTS))
        columns = {
            "sampled_output_gram": torch.einsum("end,fnd->enf", output_END, output_END).numpy(),
            "sampled_gates": gates.T.numpy(),
            "sampled_logits": (self.x_ND @ self.router_ED.T).T.numpy(),
            "router_choice_bias": self.bias_E.numpy(),
            "output_sum": output_END.sum(1).numpy(),
            "num_routed_tokens": (gates > 0).sum(0).numpy(),
        }
        return LayerEvidence(3, TOKENS, TOKENS, EXPERTS, columns)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_the_rule_of_a_router_is_found_and_errors_are_those_of_the_layer_itself(name: str, seed: int) -> None:
    toy = Toy(RULES[name], seed)
    errors = OutputErrors(toy.evidence)
    found, due = errors.rule, RULES[name]
    assert (found.top_k, found.score, found.choice, found.is_normalised) == (
        due.top_k, due.score, due.choice, due.is_normalised,
    )  # fmt: skip
    assert found.scale == pytest.approx(due.scale)
    for size in range(due.top_k, EXPERTS + 1):
        for kept in combinations(range(EXPERTS), size):
            assert errors.of(kept) == pytest.approx(toy.error(kept), abs=1e-9)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("protected", [(), (2,), (0, 5)])
def test_the_kept_set_has_the_least_error_of_all(name: str, protected: tuple[int, ...]) -> None:
    toy = Toy(RULES[name], 1)
    for size in (3, 4, 6):
        sets = [kept for kept in combinations(range(EXPERTS), size) if set(protected) <= set(kept)]
        assert least_error(toy.evidence, size, protected, 10_000, 0) == list(min(sets, key=toy.error))


def test_dropping_an_expert_that_no_token_uses_changes_nothing() -> None:
    toy = Toy(RULES["mixtral"], 2)
    toy.x_ND, toy.router_ED = toy.x_ND.abs(), toy.router_ED.abs()
    toy.router_ED[4] = -10
    evidence = toy.evidence
    assert evidence["num_routed_tokens"][4] == 0
    kept = [expert for expert in range(EXPERTS) if expert != 4]
    assert OutputErrors(evidence).of(kept) == pytest.approx(0, abs=1e-12)
    assert least_error(evidence, EXPERTS - 1, (), 10_000, 0) == kept


def test_of_two_equal_experts_one_goes_where_each_token_has_one() -> None:
    rule = RoutingRule(1, "softmax", "logit", is_normalised=True)
    toy = Toy(rule, 3)
    toy.router_ED[5], toy.experts_EDD[5] = toy.router_ED[1], toy.experts_EDD[1]
    kept = least_error(toy.evidence, EXPERTS - 1, (), 10_000, 0)
    assert len({1, 5} & set(kept)) == 1 and toy.error(kept) == pytest.approx(0, abs=1e-12)


def test_more_sets_than_the_bound_are_drawn_and_the_most_used_are_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = Toy(RULES["mixtral"], 4).evidence
    tried: list[tuple[int, ...]] = []
    of = OutputErrors.of
    monkeypatch.setattr(subsets.OutputErrors, "of", lambda self, kept: tried.append(tuple(kept)) or of(self, kept))  # type: ignore[func-returns-value]
    kept = {seed: least_error(evidence, 4, (), 6, seed) for seed in range(5)}
    assert len(tried) == 30
    most_used = set(np.argsort(-evidence["num_routed_tokens"], kind="stable")[:4].tolist())
    assert all(any(set(one) == most_used for one in tried[start : start + 6]) for start in range(0, 30, 6))
    assert least_error(evidence, 4, (), 6, 0) == kept[0]
    assert len({tuple(one) for one in tried}) > 6, "seeds draw different sets"
    tried.clear()
    least_error(evidence, 4, (), 35, 0)
    assert len({tuple(sorted(one)) for one in tried}) == len(tried) == 35, "all sets, where there are no more than the bound"


@pytest.mark.parametrize("seed", range(3))
def test_gates_that_logits_do_not_explain_are_refused(seed: int) -> None:
    evidence = Toy(RULES["mixtral"], seed).evidence
    gates = evidence["sampled_gates"].T * np.random.default_rng(seed).uniform(0.5, 1.5, EXPERTS)
    with pytest.raises(InputError, match=r"layer 3: its gates are no softmax or sigmoid of its 2 largest router logits"):
        rule_of(evidence["sampled_logits"].T, evidence["router_choice_bias"], gates, "layer 3")


def test_gates_rounded_to_bfloat16_are_explained() -> None:
    evidence = Toy(RULES["qwen2_moe"]).evidence
    gates = torch.from_numpy(evidence["sampled_gates"].T.copy()).bfloat16().double().numpy()
    rule = rule_of(evidence["sampled_logits"].T, evidence["router_choice_bias"], gates, "layer 3")
    assert (rule.score, rule.is_normalised) == ("softmax", False)


def test_a_domain_counts_by_its_weight_in_errors_over_several() -> None:
    """Errors are sums over tokens: those of the domains, times their factors."""
    kinds: dict[str, OverDomains] = {
        "sampled_output_gram": "weighted_tokens", "sampled_gates": "tokens", "sampled_logits": "tokens",
        "router_choice_bias": "same",
    }  # fmt: skip
    toys = [Toy(RULES["glm4_moe"], seed) for seed in (0, 1)]
    toys[1].bias_E = toys[0].bias_E
    parts = [replace(toy.evidence, over_domains=kinds) for toy in toys]
    both = OutputErrors(mixed(parts, np.array([0.8, 0.2])))
    for kept in combinations(range(EXPERTS), 4):
        assert both.of(kept) == pytest.approx(2 * (0.8 * toys[0].error(kept) + 0.2 * toys[1].error(kept)))
