"""Which errors of a storage may pass by themselves, and what the user can do about those that do not."""

import errno
import ssl

import pytest
from aiohttp import ServerDisconnectedError
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from stages.contracts.errors import InputError
from stages.io.storage import is_passing, remedy_for


def answer(code: str, status: int) -> Exception:
    """What s3fs raises for an answer of S3."""
    response = {"Error": {"Code": code, "Message": "says S3"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(response, "GetObject"))  # type: ignore[no-any-return]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


PASSING = [
    OSError(errno.ESTALE, "Stale file handle", "/run/x"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ETIMEDOUT, "Connection timed out"),
    OSError(errno.EHOSTUNREACH, "No route to host"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    BrokenPipeError(),
    TimeoutError("no answer"),
    FSTimeoutError(),
    EndpointConnectionError(endpoint_url="http://away"),
    ReadTimeoutError(endpoint_url="http://slow"),
    ServerDisconnectedError(),
    answer("SlowDown", 503),
    answer("InternalError", 500),
    answer("RequestTimeout", 400),
    answer("SomethingNew", 503),
    caused(InputError("weights.safetensors cannot be read"), OSError(errno.EIO, "Input/output error")),
    caused(ValueError("wrapped"), caused(RuntimeError("wrapped"), answer("SlowDown", 503))),
]
STAYING = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EROFS, "Read-only file system"),
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    FileExistsError(errno.EEXIST, "File exists"),
    OSError("no number"),
    ssl.SSLError("certificate verify failed"),
    answer("AccessDenied", 403),
    answer("NoSuchKey", 404),
    answer("ANewKindOfRefusal", 403),
    answer("PreconditionFailed", 412),
    InputError("num_sequences is 9"),
    ValueError("ours"),
    caused(InputError("no such file"), FileNotFoundError(errno.ENOENT, "No such file")),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_storage_that_is_away_or_slow_may_come_back(error: Exception) -> None:
    assert is_passing(error)
    assert remedy_for(error) is None


@pytest.mark.parametrize("error", STAYING, ids=repr)
def test_a_refusal_and_a_full_disk_stay(error: Exception) -> None:
    assert not is_passing(error)


def test_what_the_user_can_do_about_a_machine_is_said() -> None:
    assert remedy_for(OSError(errno.ENOSPC, "No space left on device")) == "free space there"
    assert remedy_for(OSError(errno.EROFS, "Read-only file system")) == "mount it so that it can be written to"
    refused = "let the user of the workers read and write there"
    assert remedy_for(PermissionError(errno.EACCES, "Permission denied")) == refused
    assert remedy_for(answer("AccessDenied", 403)) == refused
    assert remedy_for(OSError("no number")) is None
    assert remedy_for(ValueError("ours")) is None
