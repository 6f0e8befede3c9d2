"""What the environment keeps secret stays there."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.forks import Fork
from tests.runs import FinishedRun, write_run_file

PLANTED = "c0ffee5ec4e7c0ffee5ec4e7c0ffee5e"
NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize(
    "options",
    [("--executor", "local"), pytest.param(("--address", "local"), marks=pytest.mark.slow)],
    ids=["local", "ray with its token"],
)
@pytest.mark.parametrize("is_broken", [False, True], ids=["whole", "failing"])
@pytest.mark.usefixtures("forks")
def test_no_planted_token_is_found_in_what_a_run_writes_and_prints(
    tmp_path: Path, finished_run: Callable[[str], FinishedRun], options: tuple[str, ...], is_broken: bool
) -> None:
    """Configs, manifests, events, report, model cards, every other file of the run directory, and the output; also where
    a run fails, on a unit of it, with its traceback."""
    done = finished_run("mixtral")
    settings = {"calibration.num_sequences": 9} if is_broken else {}
    path = write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), settings)
    env = {**os.environ, **dict.fromkeys(NAMES, PLANTED), "RAY_AUTH_MODE": "token"}
    output = ""
    for command, exit_code in ((("run", str(path), *options), 2 if is_broken else 0), (("status", str(tmp_path / "run")), 0)):
        process = Fork(["-m", "pipeline", *command], REPOSITORY, env)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == exit_code, printed
        output += printed
    assert PLANTED not in output
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > (3 if is_broken else 40)
    assert [path for path in written if PLANTED.encode() in path.read_bytes()] == []
