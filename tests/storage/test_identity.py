"""The identity of a model on object storage: entity tags from one listing, since every range would be a request."""

import uuid
from pathlib import Path
from typing import Any

import pytest
import s3fs

from pipeline.run.weights_identity import weights_identity
from stages.checkpoint.folder import Checkpoint
from stages.io.storage import as_path


@pytest.fixture
def folder(s3: str, local_model: tuple[Path, Path]) -> Path:
    folder = as_path(f"{s3}/models/{uuid.uuid4().hex[:8]}")
    for path in local_model[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_change_in_the_middle_of_an_object_is_another_model(folder: Path) -> None:
    before = weights_identity(Checkpoint(folder))
    name = sorted(before)[1]
    content = (folder / name).read_bytes()
    middle = len(content) // 2
    (folder / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    after = weights_identity(Checkpoint(folder))
    assert {one for one in before if before[one] != after[one]} == {name}
    (folder / name).write_bytes(content)
    assert weights_identity(Checkpoint(folder)) == before


def test_no_object_is_read_for_its_identity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(folder)
    assert len(checkpoint.headers) > 1
    calls: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    assert all(tag.startswith("tag ") for tag in weights_identity(checkpoint).values())
    assert calls == ["list_objects_v2"]


def test_a_store_without_tags_is_asked_for_headers_and_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.run.weights_identity.entity_tags", lambda folder: {})
    before = weights_identity(Checkpoint(folder))
    name = sorted(before)[0]
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert weights_identity(Checkpoint(folder))[name] != before[name]
