"""Variants side by side: the table, what one row is, and the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.commands.compare import comparisons
from pipeline.config import load_config, read_config
from pipeline.display.comparison import Comparison
from pipeline.run.variants import variants_of
from stages.contracts.errors import InputError
from tests.runs import FinishedRun, write_run_file

RANDOM = [{"name": f"random.{seed}", "preset": "random", "clustering": {"seed": seed}} for seed in range(3)]


def report(*models: tuple[str, Any, str, float | None], variants: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        {"variant": name, "num_experts": count, "format": form, "perplexity": perplexity, "bytes": 1000 + position}
        for position, (name, count, form, perplexity) in enumerate(models)
    ]
    entries = [{"preset": None, "clustering": {}, "merging": {}, "export": {}, **entry} for entry in variants]
    return {"models": [{"name": "source", "perplexity": 20.0}, *rows], "settings": {"variants": entries}}


def test_targets_stand_across_and_the_best_of_each_has_a_star() -> None:
    found = Comparison.of(
        report(
            ("a", 4, "stock", 40.0), ("a", 4, "tied", 39.0), ("a", 6, "stock", 25.0), ("b", 4, "stock", 35.5),
            ("b", 6, "stock", None), variants=[{"name": "a"}, {"name": "b"}],
        )
    )  # fmt: skip
    assert found.columns == (("6", "stock"), ("4", "tied"), ("4", "stock"))
    assert found.cells("a") == ["25.00 *", "39.00 *", "40.00"]
    assert found.cells("b") == ["-", "", "35.50 *"]
    assert found.heads == ["6 experts, stock, 1.0 kB", "4 experts, tied, 1.0 kB", "4 experts, stock, 1.0 kB"]
    assert found.markdown()[2:] == ["| a | 25.00 * | 39.00 * | 40.00 |", "| b | - |  | 35.50 * |"]


def test_variants_that_differ_in_their_seed_alone_are_one_row() -> None:
    other = {"name": "random-x", "preset": "random", "clustering": {"seed": 1}, "merging": {"method": "average"}}
    models = [(f"random.{seed}", 4, "stock", 30.0 + seed) for seed in range(3)]
    found = Comparison.of(report(*models, ("random-x", 4, "stock", 31.0), variants=[*RANDOM, other]))
    assert {label: found.cells(label) for label in found.rows} == {
        "random, 3 seeds": ["31.00 (30.00-32.00) *"], "random-x": ["31.00 *"],
    }  # fmt: skip
    (row, _) = found.values()["variants"]
    assert row["checkpoints"][0] == {
        "num_experts": "4", "format": "stock", "perplexities": [30.0, 31.0, 32.0], "mean_perplexity": 31.0, "bytes": 1000,
    }  # fmt: skip


def test_seeds_of_a_variant_are_variants_that_differ_in_their_seed_alone() -> None:
    base: dict[str, Any] = {"model": "m", "run_dir": "r", "calibration": {"data": "a.txt"}, "clustering": {"num_experts": 4}}
    listed = [{"name": "random", "preset": "random", "seeds": [0, 1, 2]}, "reap"]
    config = read_config({**base, "variants": listed})
    assert [one.name for one in variants_of(config)] == ["random.0", "random.1", "random.2", "reap"]
    assert [getattr(one.clustering, "seed", None) for one in variants_of(config)] == [0, 1, 2, None]
    shown = config.model_dump(mode="json")["variants"]
    models = [(f"random.{seed}", 4, "stock", 30.0 + seed) for seed in range(3)]
    assert list(Comparison.of(report(*models, variants=shown)).rows) == ["random, 3 seeds"]
    assert variants_of(read_config(config.model_dump(mode="json"))) == variants_of(config), "as a record of the run has it"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"seeds": [1], "clustering": {"seed": 1}}, "seeds and clustering.seed are both set; leave one of them out"),
        ({"name": "x" * 47, "seeds": [1]}, "x.1, have more than 48 characters; use a shorter name"),
        ({"seeds": []}, "variants.0.seeds: .*at least 1"),
        ({"seeds": [-1]}, "variants.0.seeds.0: .*greater than or equal to 0"),
        ({"seeds": [2, 2]}, "2 are named control.2; give each its own name"),
        ({"seeds": [2], "preset": "reap"}, "control.2: clustering.*seed"),
    ],
)
def test_seeds_that_make_no_variants_are_one_line(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = {"variants": [{"name": "control", "preset": "random", **entry}]}
    with pytest.raises(InputError, match=message) as raised:
        variants_of(load_config(write_run_file(tmp_path, Path("m"), Path("a.txt"), settings), []))
    assert "\n" not in str(raised.value)


def test_a_seed_without_a_perplexity_leaves_no_mean() -> None:
    models = [(f"random.{seed}", 4, "stock", None if seed else 30.0) for seed in range(3)]
    found = Comparison.of(report(*models, variants=RANDOM))
    assert found.cells("random, 3 seeds") == ["-"]
    assert found.best == {}


def test_a_different_number_in_each_layer_is_shown_by_its_mean() -> None:
    found = Comparison.of(report(("a", [6, 3, 3], "tied", 30.0), ("a", 6, "tied", 25.0), variants=[{"name": "a"}]))
    assert found.columns == (("6", "tied"), ("4.00", "tied"))


def test_the_command_reads_a_finished_run(tmp_path: Path, finished_run: Callable[[str], FinishedRun]) -> None:
    done = finished_run("mixtral")
    run_file = write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), {"clustering.num_experts": [3]})
    setting = "variants=[hc-smoe, reap]"
    with pytest.raises(InputError, match=r"report\.json does not exist; run the run file first"):
        comparisons(load_config(run_file, [setting]))
    other = FinishedRun.of(run_file, [setting])
    due = {model["name"]: model["perplexity"] for model in other.report["models"]}
    asked = ["compare", str(run_file), "--set", setting, "--format"]
    (values,) = json.loads(CliRunner().invoke(app, [*asked, "json"]).stdout)["comparisons"]
    assert values["source_perplexity"] == due.pop(next(iter(due)))
    found = [number for row in values["variants"] for one in row["checkpoints"] for number in one["perplexities"]]
    assert sorted(found) == sorted(due.values()) and len(found) == 3
    text = CliRunner().invoke(app, [*asked, "markdown"]).stdout
    assert "| hc-smoe |" in text and "| reap |" in text
    assert "hc-smoe" in CliRunner().invoke(app, asked[:-1]).stdout
    (other.run_dir / "report.json").write_text('{"models": 3}')
    with pytest.raises(InputError, match=r"report\.json is no report of this version"):
        comparisons(load_config(run_file, [setting]))


def test_a_run_without_variants_is_one_row(finished_run: Callable[[str], FinishedRun]) -> None:
    found = Comparison.of(finished_run("mixtral").report)
    assert list(found.rows) == [""] and len(found.columns) == 4
