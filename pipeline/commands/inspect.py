"""`inspect`: describes a checkpoint and the sizes of its merged versions, from config and headers alone."""

from collections.abc import Iterator
from typing import cast

from rich import filesize
from rich.table import Table

from pipeline.display.printing import add_row
from pipeline.hub import headers_of
from pipeline.imports import resolve
from stages.contracts.inspection import CheckpointFacts, ModelFacts
from stages.contracts.survey import unread_lines

CONTEXT, BATCH = 8192, 1
"""Tokens and sequences that a cache has room for, unless somebody says otherwise."""


def inspect_model(model: str, revision: str | None, context: int = CONTEXT, batch: int = BATCH) -> CheckpointFacts:
    """Facts of a folder or a hub model. Only headers and small files of a hub model are downloaded."""
    inspect_checkpoint = resolve("stages.model.inspect:inspect_checkpoint")
    with headers_of(model, revision) as folder:
        return cast(CheckpointFacts, inspect_checkpoint(str(folder), context, batch))


def shown_facts(facts: CheckpointFacts) -> Iterator[Table | str]:
    """Lines and tables for the terminal."""
    sizes = ", ".join(f"{filesize.decimal(size)} {dtype}" for dtype, size in facts.bytes_by_dtype.items())
    yield f"family       {facts.family}"
    yield f"weights      {filesize.decimal(facts.total_bytes)} in {facts.num_files} files ({sizes})"
    if facts.model is None:
        yield f"supported    no: {facts.reason}"
    else:
        yield "supported    yes"
        yield from _model_lines(facts.model)
        yield from unread_lines(facts.ignored_files, facts.model.unloaded_tensors, facts.model.first_unloaded_tensor)
        yield from _size_tables(facts.model)


def _model_lines(model: ModelFacts) -> Iterator[str]:
    router, shared = model.router, model.shared_experts
    groups = f", {router.num_chosen_groups} of {router.num_groups} groups" if router.num_groups > 1 else ""
    yield f"model        {model.architecture}, {model.num_parameters:,} parameters, computes in {model.dtype}"
    yield f"layers       {model.num_layers}, {len(model.moe_layers)} with experts"
    yield f"experts      {model.num_experts} a layer, top-{model.top_k}"
    yield f"shared       {', '.join(f'{name} {value}' for name, value in shared.items()) or 'none'}"
    yield f"router       {router.score}{', with a bias' if router.has_bias else ''}{groups}"
    yield f"layout       {model.layout}{', quantised: ' + model.quantisation if model.quantisation else ''}"


def _size_tables(model: ModelFacts) -> Iterator[Table | str]:
    roles = Table("part", "bytes", title=None)
    for part, size in model.bytes_by_role.items():
        add_row(roles, (part, filesize.decimal(size)))
    yield roles
    cache = model.cache
    yield (
        f"cache        {filesize.decimal(cache.bytes)} of keys and values for {cache.batch} x {cache.context:,} "
        "tokens, which has its place beside the weights; a tenth of each card is left free"
    )
    cards = Table("card", "memory", "experts that fit, tied", "stock", title=None)
    for card in model.cards:
        fitting = ("none" if most is None else most for most in (card.tied, card.stock))
        add_row(cards, (card.name, filesize.decimal(card.bytes), *fitting))
    yield cards
    targets = Table("experts a layer", "tied", "stock", title=None)
    for target in model.targets:
        stock = filesize.decimal(target.stock) if target.stock is not None else "not possible"
        targets.add_row(str(target.num_experts), filesize.decimal(target.tied), stock)
    yield targets
