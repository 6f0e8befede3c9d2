"""Small untrusted files on object storage: each is read whole in one request, or refused."""

import uuid
from typing import Any

import pytest
import s3fs

from stages.contracts.errors import InputError
from stages.io.storage import as_path
from stages.io.untrusted import read_small


@pytest.mark.parametrize("content", [b"", b"1", b"12345678"])
def test_a_small_object_is_read_in_one_request(s3: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_path(f"{s3}/small/{uuid.uuid4().hex[:8]}")
    path.write_bytes(content)
    requests: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        requests.append(method)
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    assert read_small(path, max_bytes=8) == content
    assert requests == ["get_object"] or not content


def test_a_larger_object_and_a_missing_one_are_told_apart(s3: str) -> None:
    path = as_path(f"{s3}/small/{uuid.uuid4().hex[:8]}")
    with pytest.raises(FileNotFoundError):
        read_small(path)
    path.write_bytes(b"123456789")
    with pytest.raises(InputError, match=r"has 9 bytes; at most 8 are read of a file of this kind"):
        read_small(path, max_bytes=8)
