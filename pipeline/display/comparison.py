"""Variants of a run side by side, from its report: variants down, targets and formats across, a table for each measure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

from pydantic import JsonValue
from rich import filesize
from rich.table import Table

from pipeline.display.printing import add_row, printable
from pipeline.display.tables import super_expert_lines


@dataclass(frozen=True)
class Cell:
    """Checkpoints of one variant, target and format: one, or one for each seed. perplexities: None where there is none."""

    perplexities: tuple[float | None, ...]
    num_bytes: int

    @property
    def mean(self) -> float | None:
        """Mean perplexity over seeds; None where a checkpoint has none."""
        known = [value for value in self.perplexities if value is not None]
        return sum(known) / len(known) if len(known) == len(self.perplexities) else None

    @property
    def text(self) -> str:
        """Mean perplexity, and smallest and largest where there are several seeds."""
        if self.mean is None:
            return "-"
        known = [value for value in self.perplexities if value is not None]
        spread = f" ({min(known):.2f}-{max(known):.2f})" if len(known) > 1 else ""
        return f"{self.mean:.2f}{spread}"


Column = tuple[str, str]
"""Experts that the layers keep, as text, and the format."""


@dataclass(frozen=True)
class Measure:
    """A perplexity that every model of a report has, or may have. name: what it is over. value: of a model's values."""

    name: str
    value: Callable[[Mapping[str, Any]], float | None]


ALL_TOKENS = Measure("all tokens", lambda model: model.get("perplexity"))


def measures_of(report: Mapping[str, Any]) -> list[Measure]:
    """Perplexity over all tokens; with domains first the geometric mean over them, and then each of them."""
    source = report["models"][0]
    if "domains" not in source:
        return [ALL_TOKENS]
    macro = Measure("geometric mean over domains", lambda model: model.get("macro_perplexity"))

    def of(domain: str) -> Measure:
        return Measure(domain, lambda model: model["domains"][domain]["perplexity"])

    return [macro, ALL_TOKENS, *map(of, source["domains"])]


@dataclass(frozen=True)
class Comparison:
    """Perplexities of a run's checkpoints.

    measure: what they are over. source: perplexity of the source, or None. columns: most experts first. rows: cells by variant,
    in the order of the report; variants that differ in nothing but their seed are one row. super_lines: name the experts that
    checkpoints keep as they are.
    """

    measure: str
    source: float | None
    columns: tuple[Column, ...]
    rows: Mapping[str, Mapping[Column, Cell]]
    super_lines: tuple[str, ...] = ()

    @classmethod
    def of(cls, report: Mapping[str, Any], measure: Measure = ALL_TOKENS) -> "Comparison":
        """Of the values of `report.json`."""
        source, *models = report["models"]
        labels = _row_labels(report["settings"].get("variants") or [])
        rows: dict[str, dict[Column, list[Mapping[str, Any]]]] = {}
        counts: dict[str, float] = {}
        for model in models:
            count, variant = _target_text(model), model.get("variant") or ""
            counts[count] = _target_size(model)
            row = rows.setdefault(labels.get(variant, variant), {})
            row.setdefault((count, model["format"]), []).append(model)
        columns = {column for row in rows.values() for column in row}
        ordered = sorted(columns, key=lambda column: (-counts[column[0]], column[0], column[1] != "tied", column[1]))
        cells = {label: {column: _cell(found, measure) for column, found in row.items()} for label, row in rows.items()}
        supers = tuple(super_expert_lines(report)) if measure is ALL_TOKENS else ()
        return cls(measure.name, measure.value(source), tuple(ordered), cells, supers)

    @classmethod
    def all_of(cls, report: Mapping[str, Any]) -> "list[Comparison]":
        """By every measure of the report, the most telling first; none where tasks alone were evaluated."""
        source = report["models"][0]
        if "tasks" in source and "perplexity" not in source:
            return []
        return [cls.of(report, measure) for measure in measures_of(report)]

    @cached_property
    def best(self) -> Mapping[Column, float]:
        """Smallest mean perplexity of each column."""
        found: dict[Column, float] = {}
        for row in self.rows.values():
            for column, cell in row.items():
                if cell.mean is not None:
                    found[column] = min(cell.mean, found.get(column, cell.mean))
        return found

    def cells(self, label: str) -> list[str]:
        """Texts of a row; the best of a column has a star."""
        row = self.rows[label]
        return [f"{row[column].text}{self._star(row[column], column)}" if column in row else "" for column in self.columns]

    def _star(self, cell: Cell, column: Column) -> str:
        return " *" if cell.mean is not None and cell.mean == self.best[column] else ""

    @property
    def heads(self) -> list[str]:
        """What stands above the columns, with the size of the first checkpoint there."""
        sizes: dict[Column, str] = {}
        for row in self.rows.values():
            for column, cell in row.items():
                sizes.setdefault(column, filesize.decimal(cell.num_bytes))
        return [f"{count} experts, {export_format}, {sizes[count, export_format]}" for count, export_format in self.columns]

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=None)
        table.add_column("variant", no_wrap=True)
        for head in self.heads:
            table.add_column(printable(head), justify="right")
        for label in self.rows:
            add_row(table, (label, *self.cells(label)))
        return table

    def markdown(self) -> list[str]:
        """Lines of a Markdown table."""
        lines = ["| variant | " + " | ".join(self.heads) + " |", "|---" * (len(self.columns) + 1) + "|"]
        for label in self.rows:
            texts = (printable(text).replace("|", "\\|") for text in (label, *self.cells(label)))
            lines.append("| " + " | ".join(texts) + " |")
        return lines

    def values(self) -> dict[str, JsonValue]:
        """For JSON."""
        return {
            "perplexity_over": self.measure,
            "source_perplexity": self.source,
            **({"super_experts": list(self.super_lines)} if self.super_lines else {}),
            "variants": [
                {
                    "variant": label,
                    "checkpoints": [
                        {
                            "num_experts": count,
                            "format": export_format,
                            "perplexities": list(row[count, export_format].perplexities),
                            "mean_perplexity": row[count, export_format].mean,
                            "bytes": row[count, export_format].num_bytes,
                        }
                        for count, export_format in self.columns
                        if (count, export_format) in row
                    ],
                }
                for label, row in self.rows.items()
            ],
        }

    @property
    def source_line(self) -> str:
        """The source's perplexity, in words."""
        return f"source       perplexity {'-' if self.source is None else f'{self.source:.2f}'} ({self.measure})"


def _target_text(model: Mapping[str, Any]) -> str:
    """The target of a row of the report. Experts that are narrower stand under the target that they were asked for, so that
    checkpoints of the same size are compared."""
    asked = model.get("asked", {"experts": model["num_experts"], "width": 1})
    text = _count_text(asked["experts"])
    return text if asked["width"] == 1 else f"{text} x {asked['width']:g}"


def _target_size(model: Mapping[str, Any]) -> float:
    """Whole experts that have as many neurons."""
    asked = model.get("asked", {"experts": model["num_experts"], "width": 1})
    return _mean_count(asked["experts"]) * float(asked["width"])


def _count_text(num_experts: int | Sequence[int]) -> str:
    return str(num_experts) if isinstance(num_experts, int) else f"{_mean_count(num_experts):.2f}"


def _mean_count(num_experts: int | Sequence[int]) -> float:
    return num_experts if isinstance(num_experts, int) else sum(num_experts) / len(num_experts)


def _cell(models: Sequence[Mapping[str, Any]], measure: Measure) -> Cell:
    return Cell(tuple(map(measure.value, models)), models[0]["bytes"])


def _row_labels(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name of the row of each variant: its own, or what the names have in common of those that differ in their seed alone."""
    alike: dict[str, list[str]] = {}
    for entry in entries:
        clustering = {key: value for key, value in entry["clustering"].items() if key != "seed"}
        rest = {key: value for key, value in entry.items() if key not in ("name", "clustering")}
        has_seed = "seed" in entry["clustering"]
        alike.setdefault(repr((rest, clustering)) if has_seed else entry["name"], []).append(entry["name"])
    labels: dict[str, str] = {}
    for names in alike.values():
        common = commonprefix(names).rstrip("-_.")  # noqa: RUF071  # names, not paths
        label = f"{common or names[0]}, {len(names)} seeds" if len(names) > 1 else names[0]
        labels |= dict.fromkeys(names, label)
    return labels
