"""A whole run on object storage gives the bytes of a local one, reads by ranges and is resumed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import s3fs

from pipeline.commands.clean import describe_unused, remove_unused
from pipeline.commands.status import describe_status
from stages.io.storage import as_path
from tests.runs import FinishedRun, execute
from tests.storage.conftest import results_of

RunFile = Callable[[dict[str, Any]], Path]


@dataclass(frozen=True)
class RemoteRun:
    """A finished run on object storage. reads: what was read of objects: name, first byte, byte after the last; None where no
    range was asked for."""

    path: Path
    done: FinishedRun
    reads: list[tuple[str, int | None, int | None]]


@pytest.fixture(scope="module")
def remote_run(remote_run_file: RunFile) -> RemoteRun:
    """What a test damages in it, the same test mends."""
    found: list[tuple[str, int | None, int | None]] = []
    whole = s3fs.S3FileSystem._cat_file

    async def cat_file(
        self: Any, path: str, version_id: str | None = None, start: int | None = None, end: int | None = None
    ) -> bytes:
        found.append((path, start, end))
        return bytes(await whole(self, path, version_id=version_id, start=start, end=end))

    path = remote_run_file({})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_cat_file", cat_file)
        return RemoteRun(path, FinishedRun.of(path), found)


def test_a_run_on_object_storage_gives_the_bytes_of_a_local_one(remote_run: RemoteRun, undisturbed: FinishedRun) -> None:
    done = remote_run.done
    assert results_of(done) == results_of(undisturbed)
    weights = [read for read in remote_run.reads if read[0].endswith(".safetensors") and "/models/tiny-mixtral/" in read[0]]
    assert weights
    assert all(start is not None and end is not None for _, start, end in weights), "weights are read by ranges"
    for model in done.report["models"][1:]:
        folder = done.run_dir / "models" / model["name"]
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors.index.json", "README.md"} <= names
    assert not [path for path in done.run_dir.rglob("*") if {"hidden", "partial"} & set(path.parts)]
    assert not (done.run_dir / "driver.lock").exists()


def test_a_published_checkpoint_is_loaded_by_transformers(remote_run: RemoteRun, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = remote_run.done
    (name,) = [model["name"] for model in done.report["models"] if model["format"] == "stock"]
    for path in (done.run_dir / "models" / name).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert model.config.num_local_experts == 3


def test_a_model_here_and_a_run_directory_there_and_the_other_way_round(
    remote_run_file: RunFile, undisturbed: FinishedRun, local_model: tuple[Path, Path], tmp_path: Path
) -> None:
    there = FinishedRun.of(remote_run_file({"model": str(local_model[0])}))
    assert results_of(there) == results_of(undisturbed)
    here = FinishedRun.of(remote_run_file({"run_dir": str(tmp_path / "run")}))
    assert results_of(here) == results_of(undisturbed)


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(bytes(data[: len(data) // 2]))
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))


def test_verify_finds_damage(remote_run: RemoteRun, undisturbed: FinishedRun) -> None:
    done = remote_run.done
    for how, pattern, redone in (
        ("deleted", "calibrate-*/layer-0002.statistics.arrow", {"calibrate"}),
        ("truncated", "cluster-*/layer-0001.labels.arrow", {"cluster"}),
        ("bit-flipped", "assemble-*/checkpoint/config.json", {"assemble"}),
    ):
        _damage(next(iter(done.run_dir.glob(pattern))), how)
        _, recorder = execute(done.config, verify=True)
        assert recorder.stages == redone
        assert results_of(done) == results_of(undisturbed)


def test_a_run_on_object_storage_is_resumed(remote_run: RemoteRun) -> None:
    """The last test of this run: it changes it."""
    result, recorder = execute(remote_run.done.config, verify=True)
    assert (result.num_run, recorder.units) == (0, [])
    other = FinishedRun.of(remote_run.path, ["clustering.linkage=single"])
    assert other.recorder.stages == {"cluster", "merge", "assemble", "evaluate", "report"}


def test_status_and_clean_read_the_store(remote_run_file: RunFile) -> None:
    path = remote_run_file({"evaluation": None})
    first = FinishedRun.of(path)
    other = FinishedRun.of(path, ["clustering.num_experts=[4]"])
    url = str(other.run_dir)
    lines = [item for item in describe_status(url) if isinstance(item, str)]
    assert f"{url}: no driver is running" in lines
    listed = list(describe_unused(url))
    assert {line.split()[0].rsplit("-", 1)[0] for line in listed} >= {"merge-3e-tied", "assemble-3e-stock"}
    assert list(remove_unused(url)) == [*(f"{line}  removed" for line in listed[:-1]), f"{len(listed) - 1} directories removed"]
    assert list(describe_unused(url)) == ["0 directories not used by the last run; --yes removes them"]
    names = {path.name for path in (other.run_dir / "models").iterdir()}
    assert names == {model["name"] for model in other.report["models"][1:]}
    assert first.report["models"][1]["name"] not in names
    assert execute(other.config)[0].num_run == 0


def test_clean_keeps_a_published_copy_that_is_the_source_of_the_last_run(remote_run_file: RunFile) -> None:
    path = remote_run_file({"evaluation": None, "export.formats": ["stock"], "clustering.num_experts": [4]})
    first = FinishedRun.of(path)
    source = first.run_dir / "models" / first.view.targets[0].name
    again = FinishedRun.of(path, [f"model={source}", "clustering.num_experts=[2]"])
    assert first.part("assemble", first.view.targets[0].part).dir in "".join(remove_unused(str(first.run_dir)))
    assert (source / "config.json").exists()
    assert execute(again.config)[0].num_run == 0


def test_an_object_of_a_failing_writer_is_never_there(s3: str) -> None:
    from stages.io.files import DigestingFile, write_file

    path = as_path(f"{s3}/failing/weights.safetensors")
    part = b"x" * (1 << 24)

    def fail(out: DigestingFile) -> None:
        for _ in range(3):
            out.write(part)
            assert not path.exists()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_file(path, fail)
    assert not path.exists()
    system, name = path.fs, path.path  # type: ignore[attr-defined]
    uploads = system.call_s3("list_multipart_uploads", Bucket=name.split("/")[0]).get("Uploads", [])
    assert uploads == [], "the parts are given back"
    written = write_file(path, lambda out: [out.write(part) for _ in range(3)])
    assert path.stat().st_size == written.num_bytes == 3 * len(part)
