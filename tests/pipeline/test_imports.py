"""Which commands load the libraries that compute, seen in a new process: they take seconds and hundreds of megabytes.

`plan`, `inspect` and `run --executor local` compute in their own process and need torch. Nothing else does: a driver on Ray
leaves all computation to the workers (`tests/ray/test_driver_imports.py`).
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.imports import imported_by
from tests.runs import FinishedRun

COMPUTING = {"datasets", "safetensors", "scipy", "tokenizers", "torch", "transformers"}


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["batch", "--help"]])
def test_help_loads_none_of_them(command: list[str]) -> None:
    assert imported_by(*command) == (0, set())


@pytest.mark.parametrize("command", ["run", "batch", "plan"])
def test_a_bad_file_is_refused_without_computing(command: str, tmp_path: Path) -> None:
    exit_code, found = imported_by(command, str(tmp_path / "gone.yaml"))
    assert exit_code == 2
    assert found & (COMPUTING | {"ray"}) == set()


@pytest.mark.parametrize("command", ["status", "clean"])
def test_a_run_directory_is_looked_at_without_computing(command: str, finished_run: Callable[[str], FinishedRun]) -> None:
    exit_code, found = imported_by(command, str(finished_run("mixtral").run_dir))
    assert exit_code == 0
    assert found & (COMPUTING | {"ray"}) == set()


def test_a_conversion_is_refused_without_computing(finished_run: Callable[[str], FinishedRun]) -> None:
    exit_code, found = imported_by("export-gguf", str(finished_run("mixtral").run_dir), "gone")
    assert exit_code == 2
    assert found & (COMPUTING | {"ray"}) == set()


@pytest.mark.parametrize("command", [["plan"], ["run", "--executor", "local"]])
def test_commands_that_compute_load_torch_but_not_ray(command: list[str], finished_run: Callable[[str], FinishedRun]) -> None:
    exit_code, found = imported_by(*command, str(finished_run("mixtral").run_file))
    assert exit_code == 0
    assert ("torch" in found) == (command == ["plan"]), "a run of which all is done has nothing to compute"
    assert "compressed_tensors" not in found, "its model is not quantised"
    assert "ray" not in found


def test_inspect_loads_torch_but_not_ray(tiny_checkpoint: Callable[[str], Path]) -> None:
    exit_code, found = imported_by("inspect", str(tiny_checkpoint("mixtral")))
    assert exit_code == 0
    assert "torch" in found and "ray" not in found
