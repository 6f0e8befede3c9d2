"""Lock file of a run directory. Of several drivers that try, exactly one creates it, and exactly one removes a stale one."""

import os
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from pipeline.state.lock_content import Holder, parse_holder, read_holder
from stages.io.storage import create_exclusively, entity_tag, replace_if_unchanged

_RETRY_S = 0.2


class LockFile(Protocol):
    """A lock file, which names its holder.

    read_every_s: seconds for which a result of `read` may be reused, since each read on object storage costs a request.
    """

    read_every_s: float

    def create(self, content: Holder) -> bool:
        """Create the file. Returns False if it exists."""

    def read(self) -> Holder | None:
        """The holder, or None if there is no file. Raises InputError for a damaged file."""

    def age_s(self) -> float:
        """Seconds since the file was created or refreshed, by the storage's own clock, which all hosts share."""

    def take_away(self, token: str, stale_s: float) -> bool:
        """Remove a stale file of the holder with this token, or one's own. Returns False if another driver was faster."""

    def refresh(self) -> Holder | None:
        """Refresh the file if this driver still holds it. Returns the holder, as `read` does."""


class _Base(ABC):
    """Steps common to local and remote lock files. To remove a lock, a driver must first create a second file, named after the
    lock's token. So no driver can remove the newer lock of another one. If a driver dies while it has that second file, the
    file is ignored after stale_s."""

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token
        self._own = path.with_name(f".{path.name}-{token}")

    @abstractmethod
    def _make(self, path: Path, data: bytes) -> bool:
        """Create a file with this content. Returns False if it exists."""

    def create(self, content: Holder) -> bool:
        """Create the lock file. Also returns True if the file was created but the store's answer was lost."""
        return self._make(self._path, content.to_json().encode()) or self._is_own(self.read())

    def _is_own(self, holder: Holder | None) -> bool:
        return holder is not None and holder.token == self._token

    def read(self) -> Holder | None:
        """Read the holder from the lock file."""
        return read_holder(self._path)

    def age_s(self) -> float:
        """Age of the lock file by the storage's clock."""
        return self._newer_s(self._path)

    def _newer_s(self, path: Path) -> float:
        """Seconds by which a file created now is newer than `path`."""
        self._own.write_bytes(b"")
        try:
            return self._own.stat().st_mtime - path.stat().st_mtime
        finally:
            self._own.unlink()

    def take_away(self, token: str, stale_s: float) -> bool:
        """Remove the lock file, guarded by the second file described above."""
        taking = self._path.with_name(f".{self._path.name}-taking-{token}")
        if not self._make(taking, b""):
            self._drop_abandoned(taking, stale_s)
            return False
        try:
            holder = self.read()
            if holder is None or holder.token != token:
                return False
            self._path.unlink(missing_ok=True)
            return True
        finally:
            taking.unlink(missing_ok=True)

    def _drop_abandoned(self, taking: Path, stale_s: float) -> None:
        """Pause briefly for the driver that is taking over. Delete its second file if it is older than stale_s."""
        time.sleep(_RETRY_S)
        try:
            if abs(self._newer_s(taking)) > stale_s:
                taking.unlink(missing_ok=True)
        except FileNotFoundError:
            pass


class LocalLockFile(_Base):
    """Lock file on a file system. Hard links decide which driver is first."""

    read_every_s = 0.0

    def create(self, content: Holder) -> bool:
        """Create the lock file, and its folder if that is missing."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return super().create(content)

    def _make(self, path: Path, data: bytes) -> bool:
        self._own.write_bytes(data)
        try:
            os.link(self._own, path)  # fails if the file exists, and never exposes half a file
        except FileExistsError:
            return False
        finally:
            self._own.unlink()
        return True

    def refresh(self) -> Holder | None:
        """Refresh the lock file. Touches the file that was read, never one that has replaced it meanwhile."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        with open(descriptor, "rb") as raw:
            holder = parse_holder(self._path, raw.read())
            if self._is_own(holder):
                os.utime(descriptor)
        return holder


class ObjectLockFile(_Base):
    """Lock file on object storage. Conditional writes (only if no such object exists) decide which driver is first."""

    read_every_s = 1.0

    def _make(self, path: Path, data: bytes) -> bool:
        return create_exclusively(path, data)

    def refresh(self) -> Holder | None:
        """Rewrite the lock object, on condition that nobody has taken it over meanwhile. Raises OSError if somebody has.

        The count of beats makes each content, and so its entity tag, unique: a write that arrives late fails, because its tag
        is gone.
        """
        try:
            tag = entity_tag(self._path)
        except FileNotFoundError:
            return None
        holder = self.read()
        if holder is not None and self._is_own(holder):
            replace_if_unchanged(self._path, replace(holder, beats=holder.beats + 1).to_json().encode(), tag)
        return holder
