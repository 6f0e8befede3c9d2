"""A store that is away for a while, answers late, or is asked by several threads at once."""

import gc
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
import s3fs
from botocore.exceptions import EndpointConnectionError

from pipeline.state import lock
from pipeline.state.lock import LOCK_FILE, RunLock
from pipeline.state.lock_content import Holder
from pipeline.state.lock_files import ObjectLockFile
from stages.checkpoint.folder import Checkpoint
from stages.io.files import read_into
from stages.io.storage import as_path, check_readable


@pytest.fixture
def folder(s3: str) -> Path:
    return as_path(f"{s3}/outages/{uuid.uuid4().hex[:8]}")


def test_a_heartbeat_outlives_an_outage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a living driver's lock would grow stale after one unreachable moment, and another driver would take it over."""
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    refresh, failures, beats = ObjectLockFile.refresh, [1, 2], threading.Event()

    def failing(self: ObjectLockFile) -> Holder | None:
        if failures:
            failures.pop()
            raise EndpointConnectionError(endpoint_url="http://away")
        beats.set()
        return refresh(self)

    monkeypatch.setattr(ObjectLockFile, "refresh", failing)
    with RunLock(folder):
        assert beats.wait(20), "the heartbeat has ended with the first failure"


def test_a_heartbeat_that_arrives_late_does_not_overwrite_another_drivers_lock(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder has looked, and is cut off before it writes; meanwhile its lock is taken over."""
    mine = ObjectLockFile(folder / LOCK_FILE, "mine")
    assert mine.create(Holder("here", 1, "today", "mine"))
    call = s3fs.S3FileSystem._call_s3
    theirs = Holder("elsewhere", 2, "today", "theirs").to_json().encode()
    has_struck = []

    async def late(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "put_object" and not has_struck:
            has_struck.append(True)
            await call(self, method, Bucket=kwargs["Bucket"], Key=kwargs["Key"], Body=theirs)
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", late)
    with pytest.raises(OSError):
        mine.refresh()
    assert has_struck
    assert (folder / LOCK_FILE).read_bytes() == theirs


def test_a_store_that_is_away_is_not_taken_for_a_shortened_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short file is the user's to mend and ends the run for good; an outage is not."""
    (folder / "weights").write_bytes(b"abcd")
    buffer = bytearray(4)
    read_into(folder / "weights", 0, memoryview(buffer))
    assert bytes(buffer) == b"abcd"

    async def away(self: Any, path: str, **kwargs: Any) -> bytes:
        raise EndpointConnectionError(endpoint_url="http://away")

    with pytest.raises(EOFError, match="ends at byte 4 instead of 8 or later"):
        read_into(folder / "weights", 0, memoryview(bytearray(8)))
    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", away)
    with pytest.raises(Exception) as raised:
        read_into(folder / "weights", 0, memoryview(buffer))
    assert not isinstance(raised.value, EOFError)


def test_no_checkpoint_writes_what_another_reads(model_url: str) -> None:
    """A worker opens its next layer shard ahead: two checkpoints of one folder fetch side files at once."""
    one, other = Checkpoint(model_url), Checkpoint(model_url)
    assert one.local_folder != other.local_folder
    kept, gone = one.local_folder, other.local_folder
    assert (kept / "config.json").read_bytes() == (gone / "config.json").read_bytes()
    assert not list(kept.glob("*.safetensors")), "weights are never fetched whole"
    del other
    gc.collect()
    assert kept.exists() and not gone.exists()


def test_only_the_models_own_folder_is_listed(model_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy may allow no more than a prefix, and the top of a bucket may hold millions of names."""
    call, asked = s3fs.S3FileSystem._call_s3, list[str]()
    listing = s3fs.S3FileSystem._lsdir

    async def noted(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("prefix") or path.partition("/")[2])
        return await listing(self, path, *args, **kwargs)

    async def noted_call(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "list_objects_v2":
            asked.append(kwargs.get("Prefix", ""))
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_lsdir", noted)
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", noted_call)
    check_readable(as_path(model_url))
    assert asked and all(prefix.startswith("models/") for prefix in asked), asked


def test_a_small_object_is_one_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest by parts would cost three round trips, and a killed writer would leave parts that are paid for."""
    from stages.io.files import write_json

    call, asked = s3fs.core.S3File._call_s3, []

    def noted(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(method)
        return call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.core.S3File, "_call_s3", noted)
    write_json(folder / "manifest.json", {"a": 1})
    assert asked == ["put_object"]
