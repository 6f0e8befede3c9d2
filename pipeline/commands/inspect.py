"""`inspect`: describes a checkpoint and the sizes of its merged versions, from config and headers alone."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from rich import filesize
from rich.table import Table

from pipeline.display.printing import add_row
from pipeline.hub import headers_of
from pipeline.imports import resolve
from stages.contracts.survey import unread_lines


def inspect_model(model: str, revision: str | None) -> dict[str, Any]:
    """Facts of a folder or a hub model, as in `stages.model.inspect`.
    Only headers and small files of a hub model are downloaded."""
    describe = resolve("stages.model.inspect:inspect_checkpoint")
    with headers_of(model, revision) as folder:
        return cast(dict[str, Any], describe(str(folder)))


def describe_model(facts: Mapping[str, Any]) -> Iterator[Table | str]:
    """Lines and tables for the terminal."""
    sizes = ", ".join(f"{filesize.decimal(size)} {dtype}" for dtype, size in facts["bytes_by_dtype"].items())
    yield f"family       {facts['family']}"
    yield f"weights      {filesize.decimal(facts['total_bytes'])} in {facts['num_files']} files ({sizes})"
    if facts["reason"] is not None:
        yield f"supported    no: {facts['reason']}"
        return
    router, shared = facts["router"], facts["shared_experts"]
    groups = f", {router['num_chosen_groups']} of {router['num_groups']} groups" if router["num_groups"] > 1 else ""
    yield "supported    yes"
    yield f"model        {facts['architecture']}, {facts['num_parameters']:,} parameters, computes in {facts['dtype']}"
    yield f"layers       {facts['num_layers']}, {len(facts['moe_layers'])} with experts"
    yield f"experts      {facts['num_experts']} a layer, top-{facts['top_k']}"
    yield f"shared       {', '.join(f'{name} {value}' for name, value in shared.items()) or 'none'}"
    yield f"router       {router['score']}{', with a bias' if router['has_bias'] else ''}{groups}"
    yield f"layout       {facts['layout']}{', quantised: ' + facts['quantisation'] if facts['quantisation'] else ''}"
    yield from unread_lines(facts["ignored_files"], facts["unloaded_tensors"], facts["first_unloaded_tensor"])
    roles = Table("part", "bytes", title=None)
    for part, size in facts["bytes_by_role"].items():
        add_row(roles, (part, filesize.decimal(size)))
    yield roles
    targets = Table("experts a layer", "tied", "stock", title=None)
    for target in facts["targets"]:
        stock = filesize.decimal(target["stock"]) if target["stock"] is not None else "not possible"
        targets.add_row(str(target["num_experts"]), filesize.decimal(target["tied"]), stock)
    yield targets
