"""Content of a lock file: the driver that holds a run directory. The content is untrusted, so it is checked."""

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from stages.contracts.errors import InputError
from stages.io.storage import is_remote
from stages.io.untrusted import read_small

_MAX_BYTES = 1 << 16

Text = Annotated[str, Field(min_length=1, max_length=255)]


@dataclass(frozen=True)
class Holder:
    """A driver that holds a lock. since: local time, for people. token: random, unique to this holder. beats: number of times
    it has written the lock file. started, boot_id, pid_namespace: see `describe_process` in `pipeline.state.liveness`."""

    host: Text
    pid: Annotated[int, Field(ge=1, lt=2**31, strict=True)]
    since: Text
    token: Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{1,64}$")]
    beats: Annotated[int, Field(ge=0, strict=True)] = 0
    started: Annotated[int, Field(ge=0, strict=True)] | None = None
    boot_id: Text | None = None
    pid_namespace: Text | None = None

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.since}"

    def to_json(self) -> str:
        """The content of the lock file."""
        return json.dumps(asdict(self))


_HOLDER = TypeAdapter(Holder)


def read_holder(path: Path) -> Holder | None:
    """The holder that a lock file names; None if there is no file.

    Raises InputError, with the command that removes the file, when the file does not name a holder.
    """
    try:
        data = read_small(path, _MAX_BYTES)
    except FileNotFoundError as e:
        if not is_remote(path) and path.is_symlink():
            raise _damaged(path, "it is a link that leads nowhere") from e
        return None
    except InputError as e:
        raise _damaged(path, str(e)) from e
    return parse_holder(path, data)


def parse_holder(path: Path, data: bytes) -> Holder:
    """The holder named by the content of a lock file. Raises InputError as `read_holder` does."""
    try:
        return _HOLDER.validate_json(data)
    except ValidationError as e:
        raise _damaged(path, "it does not name its holder") from e


def _damaged(path: Path, why: str) -> InputError:
    """The error for a damaged lock file. Only a person can tell whether its driver is alive."""
    remedy = f"remove {path}" if is_remote(path) else f"rm -r {shlex.quote(str(path))}"
    return InputError(f"the lock {path} is damaged: {why}; if no driver works on this run directory: {remedy}")
