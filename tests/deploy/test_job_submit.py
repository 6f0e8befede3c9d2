"""`ray job submit` from a clean clone to a real head on this machine, as README and docs/howto/vms.md say."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.commands.run import transient_run_dir
from tests.deploy.example_run import RUN, SMALL, assert_complete
from tests.deploy.ray_head import RayHead, Submission, ray_head

STAGES = ["prepare", "calibrate", "cluster", "merge", "assemble", "evaluate", "report"]
TOKEN = "5f3a9c0e7b1d48a2965e0c7f31b8d46a"


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """It wants a token of everybody."""
    with ray_head(TOKEN, num_cpus=1) as running:
        yield running


@pytest.fixture(scope="module")
def finished(head: RayHead, clone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Submission, Path]:
    run_dir = tmp_path_factory.mktemp("shared") / "tiny-mixtral"
    return head.submit(*RUN, "--set", f"run_dir={run_dir}", *SMALL, working_dir=clone), run_dir


@pytest.mark.slow
def test_job_leaves_complete_models(finished: tuple[Submission, Path]) -> None:
    submission, run_dir = finished
    assert (submission.exit_code, submission.status) == (0, "SUCCEEDED"), submission.log
    assert_complete(run_dir)


@pytest.mark.slow
def test_job_log_is_readable(finished: tuple[Submission, Path]) -> None:
    submission, run_dir = finished
    log = submission.log
    assert "connected to the Ray cluster at" in log  # the job's own cluster, not one more
    assert re.findall(r"^(\w+): \d+ units in [0-9.]+ s$", log, re.MULTILINE) == STAGES
    assert "experts a layer" in log
    assert f"checkpoints  {run_dir}/models" in log
    assert "Traceback" not in log
    assert "warning" not in log  # this run_dir outlives the job


@pytest.mark.slow
def test_upload_holds_the_code_only(head: RayHead, finished: tuple[Submission, Path]) -> None:
    copies = list(head.temp_dir.glob("ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))
    assert len(copies) == 1, copies
    assert (copies[0] / "pipeline" / "cli.py").is_file()
    assert not (copies[0] / "runs").exists()
    assert not (copies[0] / "docker" / ".env").exists()
    num_bytes = sum(path.stat().st_size for path in copies[0].rglob("*") if path.is_file())
    assert num_bytes < 30_000_000, f"{num_bytes:,} bytes are uploaded with every job"


@pytest.mark.slow
def test_bad_setting_makes_a_failed_job(head: RayHead, clone: Path, tmp_path: Path) -> None:
    submission = head.submit(
        *RUN, "--set", f"run_dir={tmp_path / 'run'}", "--set", "clustering.num_experts=[9]", working_dir=clone
    )
    assert submission.exit_code != 0
    assert submission.status == "FAILED"
    assert "clustering.num_experts is 9 but examples/tiny-mixtral has 8 experts a layer" in submission.log
    assert "Traceback" not in submission.log
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_token_is_refused_and_the_right_one_is_written_nowhere(
    head: RayHead, finished: tuple[Submission, Path], tmp_path: Path
) -> None:
    refused = head.ray("job", "list", "--address", head.address, cwd=tmp_path, env={"RAY_AUTH_TOKEN": TOKEN[::-1]})
    assert refused.returncode != 0
    assert "token" in refused.stdout.lower()
    submission, run_dir = finished
    assert TOKEN not in submission.log
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert written and not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_warns_of_a_run_dir_that_does_not_last() -> None:
    copy = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0/runs/tiny-mixtral")
    warning = transient_run_dir(copy)
    assert warning is not None
    assert str(copy) in warning
    assert "--set run_dir=/shared/" in warning
    assert "\n" not in warning
    assert transient_run_dir(Path("/shared/runs/tiny-mixtral")) is None
    assert transient_run_dir(Path("/home/me/working_dir_files/runs")) is None
