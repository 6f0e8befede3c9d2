"""`plan MODEL --memory`: what of a model fits into memory, without a run file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue
from rich import filesize
from rich.table import Table

from pipeline.config import config_of
from pipeline.display.printing import add_row
from pipeline.hub import headers_of
from pipeline.run.fit import Fit, Fitter
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.contracts.settings import RunConfig
from stages.contracts.target_settings import MemoryTarget


@dataclass(frozen=True)
class Way:
    """A way to make a model smaller: what of it is kept, and the format of the export."""

    keep: Literal["experts", "width"]
    format: Literal["stock", "tied"]

    def __str__(self) -> str:
        return f"{self.keep}, {self.format}"

    def config(self, model: str, memory: str, context: int, batch: int) -> RunConfig:
        """A run file that asks for it. Raises InputError for a memory that is no size."""
        values: dict[str, JsonValue] = {
            "model": model,
            "run_dir": "unwritten",
            "calibration": {"data": "unread"},
            "clustering": {"targets": [{"memory": memory, "context": context, "batch": batch, "keep": self.keep}]},
            "export": {"formats": [self.format]},
        }
        if self.keep == "width":
            values["refit"] = {"mode": "sequential", "neurons": "choose"}
        return config_of(values, {}, "--memory, --context or --batch")


WAYS = (Way("experts", "stock"), Way("experts", "tied"), Way("width", "stock"))


def fits_of(model: str, revision: str | None, memory: str, context: int, batch: int) -> dict[str, Fit | str]:
    """For each way the largest checkpoint that fits, or why there is none. Raises InputError for a size that is none and for a
    model that is not supported."""
    found: dict[str, Fit | str] = {}
    with headers_of(model, revision) as folder:
        runs = {str(way): way.config(model, memory, context, batch) for way in WAYS}
        fitter = Fitter(Checkpoint(folder))
        for way, config in runs.items():
            (asked,) = config.clustering.num_experts
            assert isinstance(asked, MemoryTarget)
            try:
                found[way] = fitter.largest(config, asked)
            except InputError as e:
                found[way] = str(e)
    return found


def fit_values(found: dict[str, Fit | str]) -> list[JsonValue]:
    """For JSON."""
    return [
        {"way": way, "reason": one}
        if isinstance(one, str)
        else {
            "way": way,
            "target": one.target if isinstance(one.target, int) else one.target.model_dump(mode="json"),
            "weights_bytes": one.weights_bytes,
            "cache_bytes": one.cache_bytes,
            "reason": None,
        }
        for way, one in found.items()
    ]


def shown_fits(found: dict[str, Fit | str]) -> Iterator[Table | str]:
    """Lines and tables for the terminal. Raises InputError where no way fits."""
    fits: Sequence[tuple[str, Fit]] = [(way, one) for way, one in found.items() if isinstance(one, Fit)]
    if not fits:
        raise InputError("\n".join(f"{way}: {one}" for way, one in found.items()))
    table = Table("way", "largest that fits", "weights", "cache", title=None)
    for way, fit in fits:
        add_row(table, (way, fit.kept, filesize.decimal(fit.weights_bytes), filesize.decimal(fit.cache_bytes)))
    yield table
    yield from (f"{way}: {one}" for way, one in found.items() if isinstance(one, str))
