"""The uniform budget: every layer keeps the number of experts that the run file gives."""

from stages.contracts.budget import BudgetKind

BUDGET = BudgetKind(
    name="uniform",
    title="Uniform",
    source="HC-SMoE, arXiv:2410.08589",
    limits="Layers whose experts are alike keep as many as layers whose experts are not.",
)
