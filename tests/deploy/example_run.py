"""The example run, small, and what it leaves."""

import json
from pathlib import Path

RUN = ("python", "-m", "pipeline", "run", "examples/tiny-mixtral.yaml")
SMALL = (
    "--set", "calibration.num_sequences=8", "--set", "evaluation.num_sequences=8", "--set", "clustering.num_experts=[4]",
)  # fmt: skip
MODELS = {"tiny-mixtral-4e-tied", "tiny-mixtral-4e-stock"}


def assert_complete(run_dir: Path) -> None:
    assert {path.name for path in (run_dir / "models").iterdir()} == MODELS
    for name in MODELS:
        assert (run_dir / "models" / name / "config.json").is_file()
        assert (run_dir / "models" / name / "model.safetensors").stat().st_size > 5_000_000
    report = json.loads((run_dir / "report.json").read_text())
    assert {model["name"] for model in report["models"]} == {*MODELS, "tiny-mixtral"}
