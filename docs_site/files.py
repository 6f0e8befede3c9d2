"""Page of the files of a run directory: their names, and the columns of those that are Arrow tables."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from docs_site.markdown import escaped, page, table
from stages.calibrate.collectors.registry import DEFAULT_COLUMNS, FURTHER
from stages.contracts import paths, prompts, requests
from stages.contracts.evidence import Column

HERE = Path()
LAYER, SHARD = 7, 3
"""Stand for the numbers in the names of files."""


@dataclass(frozen=True)
class Table:
    """An Arrow table. file: name of one. stage: stage that writes it. place: module and name of its schema, or of its maker."""

    file: Path
    stage: str
    place: str

    @property
    def schema(self) -> pa.Schema:
        """Its schema."""
        module, _, name = self.place.rpartition(".")
        found = getattr(importlib.import_module(f"stages.contracts.{module}"), name)
        schema: pa.Schema = found(1) if callable(found) else found
        return schema


TABLES = (
    Table(HERE / paths.TENSORS_FILE, "prepare", "tensors._SCHEMA"),
    Table(HERE / paths.tokens_file(SHARD), "prepare", "tokens._SCHEMA"),
    Table(paths.documents_file(HERE, ""), "prepare", "documents._SCHEMA"),
    Table(requests.requests_file(HERE, SHARD), "requests", "requests._REQUESTS"),
    Table(prompts.prompts_file(HERE, SHARD), "requests", "prompts._PROMPTS"),
    Table(paths.groups_file(HERE, LAYER), "calibrate", "evidence.groups_schema"),
    Table(paths.dendrogram_file(HERE, LAYER), "cluster", "dendrogram._DENDROGRAM"),
    Table(paths.labels_file(HERE, LAYER), "cluster", "dendrogram._LABELS"),
    Table(paths.errors_file(HERE, LAYER), "cluster", "certainty._ERRORS"),
    Table(paths.stability_file(HERE, LAYER), "cluster", "certainty._STABILITY"),
    Table(paths.costs_file(HERE, LAYER), "cluster", "budget._COSTS"),
    Table(paths.budget_file(HERE), "cluster", "budget._BUDGET"),
    Table(paths.protected_file(HERE), "cluster", "protection._SCHEMA"),
    Table(paths.plan_file(HERE, LAYER), "cluster, recombine", "layer_plan._SCHEMA"),
    Table(paths.losses_file(HERE, SHARD), "evaluate", "losses._SCHEMA"),
    Table(requests.answers_file(HERE, SHARD), "evaluate", "requests._ANSWERS"),
    Table(prompts.texts_file(HERE, SHARD), "evaluate", "prompts._TEXTS"),
)
"""All Arrow tables whose columns are always the same; a test compares them with the schemas of `stages/contracts`."""
COMMON = {
    "layer": "number of the decoder layer, from 0",
    "expert": "number of the expert in the layer of the source, from 0",
    "group": "number of the group of sequences, from 0",
    "num_experts": "number of experts",
    "num_clusters": "number of clusters, K",
    "left": "the first of the two clusters that are merged: an expert (< E), or E + i for the cluster made in row i",
    "right": "the second of them",
    "num_predictions": "tokens of the sequence that are predicted",
    "token_ids": "tokens that are read, without the last token of each request",
    "nums_scored": "tokens at the end of each request whose likelihood is asked for",
    "context": "text that the model continues",
    "text": "what the model wrote",
    "name": "name of the tensor in its file",
    "file": "weight file in the checkpoint",
    "dtype": "number format as stored",
    "shape": "shape as stored",
    "num_bytes": "bytes in the file",
    "num_tokens": "calibration tokens, T",
    "num_output_tokens": "tokens that `output_sum` runs over, a sample of T; only with `calibration.sampling`",
}
"""Columns that say nothing of themselves in a file, because their name says it."""


_BEGINNING = f"""
All state of a run is files. A stage writes those of a part in a folder of its own. Numbers stand for a layer ({LAYER:04d}
below) or a token shard ({SHARD:04d}). Tables are Arrow files (IPC file format): `pyarrow.ipc.open_file(path).read_all()`
reads one, and the meaning of its columns lies in its metadata. `hcsmoe clean` removes what no setting of the last run uses.

E is the number of experts of a layer of the source, T the number of calibration tokens, N that of sampled tokens, D the
hidden size, F the neurons of an expert, K a number of clusters.
"""


def meaning_of(schema: pa.Schema, column: str) -> str:
    """What a column holds; empty where nobody says it."""
    said: dict[str, str] = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    return said.get(column, COMMON.get(column, ""))


def files_page() -> str:
    """The page."""
    lines = page("Files of a run directory", "docs_site/files.py", _BEGINNING)
    lines += ["## Names", ""]
    lines += table(("file", "what it holds"), _names())
    lines += [
        "## Evidence of a layer",
        "",
        "Columns of `" + paths.statistics_file(HERE, LAYER).name + "`, one expert a row:",
        "",
    ]
    keys = [(f"`{name}`", "", meaning) for name, meaning in COMMON.items() if name in ("layer", "expert", "num_tokens")]
    lines += table(("column", "type", "meaning"), [*keys, *_columns(DEFAULT_COLUMNS)])
    further = [column for collector in FURTHER.values() for column in collector.columns]
    lines += [
        "Further columns lie in a file of their own each, and are gathered only where a method of the run requires them:",
        "",
    ]
    lines += table(("column", "type", "meaning"), _columns(further))
    for one in TABLES:
        lines += _described(one)
    return "\n".join(lines)


def _names() -> Iterator[tuple[str, str]]:
    """Files whose names `stages/contracts` makes."""
    for module in (paths, requests, prompts):
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == module.__name__ and function.__name__.endswith("_file"):
                yield f"`{_named(function)}`", escaped(" ".join((function.__doc__ or "").split()))


def _named(function: Callable[..., Path]) -> str:
    given = {"part_dir": HERE, "layer": LAYER, "shard": SHARD, "number": SHARD, "rank": 2, "expert": 5, "domain": ""}
    asked = inspect.signature(function).parameters
    text = {"column": "COLUMN", "name": "PLAN"}
    return str(function(**{name: given.get(name, text.get(name)) for name in asked}))


def _columns(columns: Iterable[Column]) -> Iterator[tuple[str, str, str]]:
    for column in columns:
        yield (
            f"`{column.name}`",
            f"{column.dtype} {column.shape}".strip(),
            escaped(column.described(False).removeprefix(column.shape).strip()),
        )


def _described(one: Table) -> Iterator[str]:
    schema = one.schema
    yield from (f"## {one.file}", "", f"Written by {one.stage}; {meaning_of(schema, 'table')}.", "")
    rows = [(f"`{column.name}`", _type(column), escaped(meaning_of(schema, column.name))) for column in schema]
    yield from table(("column", "type", "meaning"), rows)


def _type(column: pa.Field) -> str:
    words = str(column.type).replace("fixed_size_list<item: double not null>[1]", "list<double>")
    words = words.replace("item: ", "").replace(" not null", "")
    return f"`{words}`" + (", or null" if column.nullable else "")
