"""The file under a run directory's lock: made by one of many that try, and taken away by one of many that find it stale."""

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

    read_every_s: how long an answer of `read` is good for, where each costs a request.
    """

    read_every_s: float

    def create(self, content: Holder) -> bool:
        """Make the file; False if there is one."""

    def read(self) -> Holder | None:
        """Its holder, or None if there is no file. Raises InputError for a damaged file."""

    def age_s(self) -> float:
        """Seconds since it was made or refreshed, by the storage's own clock, which all hosts share."""

    def take_away(self, token: str, stale_s: float) -> bool:
        """Remove the file of a holder with this token: a stale one, or one's own. False if another driver was faster."""

    def refresh(self) -> Holder | None:
        """Show that the holder lives, if the file is still its own. Returns what `read` does."""


class _Base(ABC):
    """A lock is removed only by who holds a second file, named after the lock's token: so nobody removes the lock of a driver
    that came in between. A driver that dies with that file in hand is forgotten after stale_s."""

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token
        self._own = path.with_name(f".{path.name}-{token}")

    @abstractmethod
    def _make(self, path: Path, data: bytes) -> bool:
        """Make a file with this content; False if there is one."""

    def create(self, content: Holder) -> bool:
        """See LockFile. True also after a try that succeeded, but whose answer was lost."""
        return self._make(self._path, content.to_json().encode()) or self._is_own(self.read())

    def _is_own(self, holder: Holder | None) -> bool:
        return holder is not None and holder.token == self._token

    def read(self) -> Holder | None:
        """See LockFile."""
        return read_holder(self._path)

    def age_s(self) -> float:
        """See LockFile."""
        return self._newer_s(self._path)

    def _newer_s(self, path: Path) -> float:
        """How much newer a file made now is."""
        self._own.write_bytes(b"")
        try:
            return self._own.stat().st_mtime - path.stat().st_mtime
        finally:
            self._own.unlink()

    def take_away(self, token: str, stale_s: float) -> bool:
        """See LockFile."""
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
        """Wait a little for the driver that is taking over; forget it if it has been at it for stale_s."""
        time.sleep(_RETRY_S)
        try:
            if abs(self._newer_s(taking)) > stale_s:
                taking.unlink(missing_ok=True)
        except FileNotFoundError:
            pass


class LocalLockFile(_Base):
    """On a file system: hard links decide who is first."""

    read_every_s = 0.0

    def create(self, content: Holder) -> bool:
        """See LockFile."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return super().create(content)

    def _make(self, path: Path, data: bytes) -> bool:
        self._own.write_bytes(data)
        try:
            os.link(self._own, path)  # fails if the file exists, and never shows half a file
        except FileExistsError:
            return False
        finally:
            self._own.unlink()
        return True

    def refresh(self) -> Holder | None:
        """See LockFile. The file that was read is touched, not one that has taken its place meanwhile."""
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
    """On object storage: writes on condition that there is no such object decide who is first."""

    read_every_s = 1.0

    def _make(self, path: Path, data: bytes) -> bool:
        return create_exclusively(path, data)

    def refresh(self) -> Holder | None:
        """See LockFile: written again, on condition that nobody takes it over meanwhile. Raises OSError if somebody does.

        The count makes each content, and so its tag, another one: a write that arrives late finds a tag that is gone.
        """
        try:
            tag = entity_tag(self._path)
        except FileNotFoundError:
            return None
        holder = self.read()
        if holder is not None and self._is_own(holder):
            replace_if_unchanged(self._path, replace(holder, beats=holder.beats + 1).to_json().encode(), tag)
        return holder
