"""`inspect`: what a checkpoint is and what its merged versions would weigh, from config and headers alone."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from pipeline.display.printing import add_row
from pipeline.display.sizes import human_bytes
from pipeline.display.tables import weights_lines
from pipeline.driver.worker import resolve
from pipeline.hub import headers_of


def inspect_model(model: str, revision: str | None) -> dict[str, Any]:
    """Facts of a folder or a hub model (`stages.model.inspect`). Of a hub model only headers and small files are fetched."""
    describe = resolve("stages.model.inspect:inspect_checkpoint")
    with headers_of(model, revision) as folder:
        return describe(str(folder))  # type: ignore[no-any-return]


def describe_model(facts: Mapping[str, Any]) -> Iterator[Table | str]:
    """Lines and tables for the terminal."""
    sizes = ", ".join(f"{human_bytes(size)} {dtype}" for dtype, size in facts["bytes_by_dtype"].items())
    yield f"family       {facts['family']}"
    yield f"weights      {human_bytes(facts['total_bytes'])} in {facts['num_files']} files ({sizes})"
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
    yield from weights_lines(facts)
    roles = Table("part", "bytes", title=None)
    for part, size in facts["bytes_by_role"].items():
        add_row(roles, (part, human_bytes(size)))
    yield roles
    targets = Table("experts a layer", "tied", "stock", title=None)
    for target in facts["targets"]:
        stock = human_bytes(target["stock"]) if target["stock"] is not None else "not possible"
        targets.add_row(str(target["num_experts"]), human_bytes(target["tied"]), stock)
    yield targets
