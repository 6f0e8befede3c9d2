"""Numbers that JSON cannot hold: a loss too large for a perplexity, a loss or a standard error that is not a number."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stages.contracts.losses import Losses, write_losses
from stages.contracts.paths import losses_file
from stages.contracts.texts import DomainShards
from stages.contracts.units import Job
from stages.evaluate.spec import ScoreArgs, Scores
from stages.evaluate.units import score_unit
from tests.runs import Call, write_run_file
from tests.tiny import random_model, save_token_ids


def run_file_of(folder: Path, change: Callable[[torch.nn.Module], None], **settings: object) -> Path:
    """A run file for a tiny model whose weights were changed. Its texts have no document in common."""
    if "evaluation" not in settings:
        settings["evaluation.data"] = str(save_token_ids(folder / "heldout.npy", seed=1))
    model = random_model("mixtral")
    change(model)
    model.save_pretrained(folder / "tiny", max_shard_size="60KB")
    return write_run_file(folder, folder / "tiny", save_token_ids(folder / "ids.npy"), settings)


def scale_head(model: torch.nn.Module) -> None:
    """Logits in the hundred thousands: the loss is too."""
    model.lm_head.weight.data *= 1e6


def blow_up_head(model: torch.nn.Module) -> None:
    """Logits that overflow float32."""
    model.lm_head.weight.data.sign_().mul_(3e38)


def silence_expert(model: torch.nn.Module) -> None:
    """An expert that puts out zeros for every token."""
    model.model.layers[1].mlp.experts.down_proj.data[2] = 0


@pytest.mark.parametrize(
    ("losses", "loss", "perplexity"),
    [
        ([4.0, 8.0], 2.0, math.exp(2.0)),
        ([3 * 710.0, 3 * 710.0], 710.0, None),
        ([1.0, math.nan], None, None),
        ([1.0, math.inf], None, None),
        ([-math.inf, math.inf], None, None),
    ],
)
def test_a_score_is_written_whatever_the_losses_are(
    tmp_path: Path, losses: list[float], loss: float | None, perplexity: float | None
) -> None:
    write_losses(losses_file(tmp_path, 0), Losses(losses, [3, 3]))
    result = score_unit(Job(tmp_path, tmp_path, ScoreArgs((DomainShards("", 0, 1),))))
    assert result.facts == Scores(perplexity, loss, num_predictions=6, bits_per_byte=None)
    assert json.loads((tmp_path / "scores.json").read_text()) == vars(result.facts)


def test_a_perplexity_beyond_every_number_is_null_with_a_warning_and_the_run_succeeds(tmp_path: Path, call: Call) -> None:
    code, out, err = call("run", str(run_file_of(tmp_path, scale_head)), "--executor", "local")
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    source, *targets = report["models"]
    assert source["loss"] > 710 and source["perplexity"] is None
    assert report["tied_stock_gaps"] == [{"target": "3e", "perplexity_gap": None}]
    due = [
        f"{model['name']}: the loss is {model['loss']:.6g} nats a token; its perplexity, exp(loss), is larger than any number "
        "of 64 bits, and is written as null"
        for model in (source, *targets)
    ]
    assert report["warnings"] == due
    assert [line.removeprefix("warning: ") for line in err.splitlines() if line.startswith("warning: ")] == due
    rows = [line for line in out.splitlines() if line.startswith("│ tiny")]
    assert len(rows) == 3 and all(row.split()[-2] == "inf" for row in rows), out


def test_a_loss_that_is_not_a_number_is_null_with_a_warning_and_the_run_succeeds(tmp_path: Path, call: Call) -> None:
    code, out, err = call("run", str(run_file_of(tmp_path, blow_up_head)), "--executor", "local")
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [(model["loss"], model["perplexity"]) for model in report["models"]] == [(None, None)] * 3
    assert report["warnings"] == [
        f"{model['name']}: the loss on the evaluation text is not finite, since the logits are not; loss and perplexity are "
        "written as null"
        for model in report["models"]
    ]
    assert all(f"warning: {line}" in err.splitlines() for line in report["warnings"])
    rows = [line for line in out.splitlines() if line.startswith("│ tiny")]
    assert len(rows) == 3 and all(row.split()[-2] == "-" for row in rows), out


def test_a_standard_error_that_is_not_a_number_is_null_with_a_warning_that_names_the_expert(tmp_path: Path, call: Call) -> None:
    sampling = {"calibration.sampling": {"fraction": 0.5, "groups": 2}, "evaluation": None}
    code, out, err = call("run", str(run_file_of(tmp_path, silence_expert, **sampling)), "--executor", "local")
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    certainty = report["certainty"]
    errors = certainty["relative_standard_errors"]["1"]
    assert errors[2] is None and None not in [*errors[:2], *errors[3:]]
    finite = [error for values in certainty["relative_standard_errors"].values() for error in values if error is not None]
    assert certainty["mean_relative_standard_error"] == pytest.approx(np.mean(finite))
    assert certainty["largest_relative_standard_error"] == max(finite)
    assert report["warnings"] == [
        "layer 1, expert 2: its mean output is zero on the calibration text, so its relative standard error is not defined and "
        "is written as null; means over experts leave it out"
    ]
    assert f"warning: {report['warnings'][0]}" in err.splitlines()
    assert "sampled      50% of the tokens" in out


def test_without_a_finite_standard_error_the_summary_says_so(tmp_path: Path, call: Call) -> None:
    def silence_all(model: torch.nn.Module) -> None:
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.data.zero_()

    sampling = {"calibration.sampling": {"fraction": 0.5, "groups": 2}, "evaluation": None}
    code, out, err = call("run", str(run_file_of(tmp_path, silence_all, **sampling)), "--executor", "local")
    assert code == 0, err
    assert "sampled      50% of the tokens for mean outputs: standard error - of a mean, at most -" in out


def test_a_batch_shows_and_tells_the_same(tmp_path: Path, call: Call) -> None:
    run_file = run_file_of(tmp_path, scale_head)
    batch_file = tmp_path / "batch.yaml"
    batch_file.write_text(yaml.safe_dump({"batch_dir": str(tmp_path / "batch"), "runs": [{"run": str(run_file)}]}))
    code, out, err = call("batch", str(batch_file), "--executor", "local")
    assert code == 0, err
    (record,) = json.loads((tmp_path / "batch" / "batch.json").read_text())["runs"]
    assert len(record["warnings"]) == len(record["models"]) == 3
    assert all(f"[1] warning: {line}" in err.splitlines() for line in record["warnings"])
    assert out.count(" inf ") == 3, out
