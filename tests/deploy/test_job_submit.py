"""`ray job submit` from a clean clone to a real head on this machine, as README and docs/cluster.md say."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.runner import transient_run_dir
from tests.deploy.ray_head import RayHead, Submission, ray_head

REPOSITORY = Path(__file__).parents[2]
RUN = ("python", "-m", "pipeline", "run", "examples/tiny-mixtral.yaml")
SMALL = (
    "--set", "calibration.num_sequences=8", "--set", "evaluation.num_sequences=8", "--set", "clustering.num_experts=[4]",
)  # fmt: skip
MODELS = {"tiny-mixtral-4e-tied", "tiny-mixtral-4e-stock"}
TOKEN = "5f3a9c0e7b1d48a2965e0c7f31b8d46a"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a commit of this tree has, and what a user may have left beside them."""
    folder = tmp_path_factory.mktemp("clone") / "hcsmoe"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, folder / name)
    for ignored in ("runs/earlier/statistics.arrow", "docker/.env"):
        (folder / ignored).parent.mkdir(parents=True, exist_ok=True)
        (folder / ignored).write_text("not for upload")
    return folder


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as running:
        yield running


@pytest.fixture(scope="module")
def finished(head: RayHead, clone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Submission, Path]:
    run_dir = tmp_path_factory.mktemp("shared") / "tiny-mixtral"
    return head.submit(*RUN, "--set", f"run_dir={run_dir}", *SMALL, working_dir=clone), run_dir


def assert_complete(run_dir: Path) -> None:
    assert {path.name for path in (run_dir / "models").iterdir()} == MODELS
    for name in MODELS:
        assert (run_dir / "models" / name / "config.json").is_file()
        assert (run_dir / "models" / name / "model.safetensors").stat().st_size > 5_000_000
    report = json.loads((run_dir / "report.json").read_text())
    assert {model["name"] for model in report["models"]} == {*MODELS, "tiny-mixtral"}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_job_leaves_complete_models(finished: tuple[Submission, Path]) -> None:
    submission, run_dir = finished
    assert (submission.exit_code, submission.status) == (0, "SUCCEEDED"), submission.log
    assert_complete(run_dir)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_job_log_is_readable(finished: tuple[Submission, Path]) -> None:
    submission, run_dir = finished
    log = submission.log
    assert "connected to the Ray cluster at" in log  # the job's own cluster, not one more
    places = [log.index(f"{stage}: done in") for stage in ("prepare", "calibrate", "cluster", "merge", "assemble", "evaluate")]
    assert places == sorted(places)
    assert "experts a layer" in log
    assert f"checkpoints  {run_dir}/models" in log
    assert "Traceback" not in log
    assert "warning" not in log  # this run_dir outlives the job


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_upload_holds_the_code_only(head: RayHead, finished: tuple[Submission, Path]) -> None:
    copies = list(head.temp_dir.glob("ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))
    assert len(copies) == 1, copies
    assert (copies[0] / "pipeline" / "cli.py").is_file()
    assert not (copies[0] / "runs").exists()
    assert not (copies[0] / "docker" / ".env").exists()
    num_bytes = sum(path.stat().st_size for path in copies[0].rglob("*") if path.is_file())
    assert num_bytes < 30_000_000, f"{num_bytes:,} bytes are uploaded with every job"


@pytest.mark.slow
@pytest.mark.timeout(180)
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
@pytest.mark.timeout(240)
def test_token_authentication(clone: Path, tmp_path: Path) -> None:
    with ray_head(TOKEN) as head:
        refused = head.ray("job", "list", "--address", head.address, cwd=tmp_path, env={"RAY_AUTH_TOKEN": TOKEN[::-1]})
        assert refused.returncode != 0
        assert "token" in refused.stdout.lower()
        submission = head.submit(*RUN, *SMALL, "--set", f"run_dir={tmp_path / 'run'}", working_dir=clone)
        assert (submission.exit_code, submission.status) == (0, "SUCCEEDED"), submission.log
        assert_complete(tmp_path / "run")
        assert TOKEN not in submission.log
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_warns_of_a_run_dir_that_does_not_last() -> None:
    copy = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0/runs/tiny-mixtral")
    warning = transient_run_dir(copy)
    assert warning is not None
    assert str(copy) in warning
    assert "--set run_dir=/shared/" in warning
    assert "\n" not in warning
    assert transient_run_dir(Path("/shared/runs/tiny-mixtral")) is None
    assert transient_run_dir(Path("/home/me/working_dir_files/runs")) is None
