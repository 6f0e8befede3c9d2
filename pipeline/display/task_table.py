"""Scores of tasks in the layout of papers: tasks across, models down, with their average and its share of the source's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue
from rich.table import Table

from pipeline.display.printing import add_row, printable


@dataclass(frozen=True)
class Score:
    """Value of the metric that stands for a task, and its standard error, or None. is_share: whether more is better, so that it
    counts in the average."""

    metric: str
    value: float
    standard_error: float | None
    is_share: bool

    @property
    def text(self) -> str:
        """Value, and standard error if there is one."""
        return f"{self.value:.4f}" + (f" ±{self.standard_error:.4f}" if self.standard_error is not None else "")


@dataclass(frozen=True)
class TaskTable:
    """rows: scores by model and task, the source first. tasks: by name, the metric that stands for each; "failed" where no
    model has a score."""

    rows: Mapping[str, Mapping[str, Score]]
    tasks: Mapping[str, str]

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> "TaskTable | None":
        """Of the values of `report.json`; None without tasks."""
        rows = {model["name"]: _scores(model["tasks"]) for model in report["models"] if "tasks" in model}
        tasks = {name: score.metric for row in rows.values() for name, score in row.items()}
        tasks = {**dict.fromkeys((one["task"] for one in report.get("failed_tasks", ())), "failed"), **tasks}
        return cls(rows, tasks) if tasks else None

    def average(self, model: str) -> float | None:
        """Mean of a model's scores over the tasks of which more is better; None if it lacks a score, or if there is none."""
        row = self.rows[model]
        values = [score.value for score in row.values() if score.is_share]
        return sum(values) / len(values) if values and row.keys() == self.tasks.keys() else None

    def retained(self, model: str) -> float | None:
        """Share of the source's average that a model keeps; None if either has no average."""
        ours, source = self.average(model), self.average(next(iter(self.rows)))
        return ours / source if ours is not None and source else None

    @property
    def heads(self) -> list[str]:
        """What stands above the columns."""
        return [*(f"{name} ({metric})" for name, metric in self.tasks.items()), "average", "retained"]

    def cells(self, model: str) -> list[str]:
        """Texts of a row."""
        row, average, retained = self.rows[model], self.average(model), self.retained(model)
        scores = [row[name].text if name in row else "-" for name in self.tasks]
        return [*scores, "-" if average is None else f"{average:.4f}", "-" if retained is None else f"{retained:.1%}"]

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=None)
        table.add_column("model")
        for head in self.heads:
            table.add_column(printable(head), justify="right")
        for model in self.rows:
            add_row(table, (model, *self.cells(model)))
        return table

    def markdown(self) -> list[str]:
        """Lines of a Markdown table."""
        lines = ["| model | " + " | ".join(self.heads) + " |", "|---" * (len(self.heads) + 1) + "|"]
        for model in self.rows:
            lines.append("| " + " | ".join(printable(text).replace("|", "\\|") for text in (model, *self.cells(model))) + " |")
        return lines

    def values(self) -> dict[str, JsonValue]:
        """For JSON."""
        return {
            "tasks": [
                {
                    "model": model,
                    "scores": {
                        name: {"metric": score.metric, "value": score.value, "standard_error": score.standard_error}
                        for name, score in row.items()
                    },
                    "average": self.average(model),
                    "retained": self.retained(model),
                }
                for model, row in self.rows.items()
            ]
        }


def _scores(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Score]:
    found = {}
    for name, task in tasks.items():
        chosen = task["metric"]
        if chosen is not None and chosen["value"] is not None:
            is_share = chosen["higher_is_better"] is True
            found[name] = Score(chosen["metric"], chosen["value"], chosen["standard_error"], is_share)
    return found
