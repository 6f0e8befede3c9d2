"""A run directory that fills up, is read-only, or loses and damages files."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from tests.cluster.test_driver import start
from tests.runs import FinishedRun, Recorder, execute

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forks")]
RunFile = Callable[[dict[str, Any]], Path]
LOCAL = {"resources.num_gpus": None}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, less than the run needs."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    run_file: RunFile, undisturbed: dict[str, dict[str, str]], small_disk: Path
) -> None:
    path = run_file({**LOCAL, "run_dir": str(small_disk / "run")})
    process = start(path, "--executor", "local")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "No space left on device" in output
    assert "the same command continues from there" in output
    assert not list((small_disk / "run").glob("models/*"))
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    config = load_config(path, [])
    result, _ = execute(config)
    assert result.num_reused > 0
    assert FinishedRun.found(path, config, result.report).results() == undisturbed


def test_an_output_that_cannot_be_written_is_one_error(run_file: RunFile, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    process = start(run_file({**LOCAL, "run_dir": str(blocked / "run")}), "--executor", "local")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert str(blocked) in output and "Traceback" not in output


def _damage(path: Path, how: str) -> None:
    if how == "deleted":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)  # in place: hard links see it too


@pytest.mark.parametrize("how", ["deleted", "truncated", "bit-flipped"])
@pytest.mark.parametrize(
    ("pattern", "redone"),
    [
        ("calibrate-*/layer-0005.statistics.arrow", {"calibrate"}),
        ("cluster-*/layer-0002.labels.arrow", {"cluster"}),
        ("merge-*-tied-*/checkpoint/model-00002-of-*.safetensors", {"merge", "assemble"}),
        ("assemble-*-stock-*/checkpoint/config.json", {"assemble"}),
        ("evaluate-*/scores.json", {"evaluate"}),
    ],
)
def test_verify_finds_damage_and_redoes_what_is_needed(
    finished: FinishedRun, undisturbed: dict[str, dict[str, str]], pattern: str, redone: set[str], how: str
) -> None:
    """Statistics need the layer's token shards again, and these the layers before: only calibrate runs, not what follows."""
    (path, *_) = sorted(finished.run_dir.glob(pattern))
    _damage(path, how)
    _, recorder = execute(finished.config, verify=True)
    if how == "deleted" and pattern.startswith("merge"):
        redone = {"merge"}  # the assembled checkpoint has a link of its own, and that is whole
    assert recorder.stages == redone
    assert finished.results() == undisturbed
    _, again = execute(finished.config, verify=True)
    assert isinstance(again, Recorder) and not again.units


@pytest.fixture(scope="module")
def original(run_file: RunFile) -> FinishedRun:
    """A finished run. Not to be written to."""
    return FinishedRun.of(run_file(LOCAL))


@pytest.fixture
def finished(original: FinishedRun, run_file: RunFile) -> FinishedRun:
    """A copy of it, to be damaged and mended; with its hard links, since both names of a file are damaged at once."""
    path = run_file(LOCAL)
    subprocess.run(["cp", "--archive", str(original.run_dir), str(path.parent)], check=True)
    copy = FinishedRun.of(path)
    assert copy.recorder.stages == {"report"}, "the run directory itself is a setting of the report"
    return copy
