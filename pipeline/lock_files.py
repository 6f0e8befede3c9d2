"""The file under a run directory's lock: made by one of many that try, and taken away by one of many that find it stale."""

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from pipeline.lock_content import Holder, read_holder
from stages.common.errors import InputError
from stages.common.storage import create_exclusively, entity_tag, replace_if_unchanged

_RETRY_S = 0.2


class LockFile(Protocol):
    """A lock file, which names its holder."""

    def create(self, content: Holder) -> bool:
        """Make the file; False if there is one."""

    def read(self) -> Holder | None:
        """Its holder, or None if there is no file. Raises InputError for a damaged file."""

    def age_s(self) -> float:
        """Seconds since it was made or refreshed, by the storage's own clock, which all hosts share."""

    def take_away(self, token: str, stale_s: float) -> bool:
        """Remove a stale file whose holder has this token; False if another driver was faster."""

    def refresh(self) -> None:
        """Show that the holder lives."""

    def remove(self) -> None:
        """Remove the holder's own file."""


class _Base:
    def __init__(self, path: Path, token: str) -> None:
        self._path = path
        self._own = path.with_name(f".{path.name}-{token}")

    def read(self) -> Holder | None:
        return read_holder(self._path)

    def age_s(self) -> float:
        self._own.write_bytes(b"")
        try:
            return self._own.stat().st_mtime - self._path.stat().st_mtime
        finally:
            self._own.unlink()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class LocalLockFile(_Base):
    """On a file system: hard links and renames decide who is first."""

    def create(self, content: Holder) -> bool:
        """See LockFile."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._own.write_text(content.to_json())
        try:
            os.link(self._own, self._path)  # fails if the lock exists, and never shows half a file
        except FileExistsError:
            return False
        finally:
            self._own.unlink()
        return True

    def take_away(self, token: str, stale_s: float) -> bool:
        """See LockFile."""
        stale = self._own.with_name(f"{self._own.name}-stale")
        try:
            os.rename(self._path, stale)
        except FileNotFoundError:
            return False
        is_right = False
        with contextlib.suppress(InputError):  # damaged meanwhile: whoever reads it next explains it
            holder = read_holder(stale)
            is_right = holder is not None and holder.token == token
        if not is_right:  # another driver was faster: give its lock back
            os.link(stale, self._path)
        stale.unlink()
        return is_right

    def refresh(self) -> None:
        """See LockFile."""
        os.utime(self._path)


class ObjectLockFile(_Base):
    """On object storage: writes on condition that there is no such object decide who is first."""

    def create(self, content: Holder) -> bool:
        """See LockFile."""
        self._token = content.token
        return create_exclusively(self._path, content.to_json().encode()) or self._is_own(self.read())

    def _is_own(self, holder: Holder | None) -> bool:
        """Also after a first try that succeeded, but whose answer was lost."""
        return holder is not None and holder.token == self._token

    def take_away(self, token: str, stale_s: float) -> bool:
        """See LockFile. One driver at a time looks again and removes: it holds an object named after the stale holder."""
        taking = self._path.with_name(f".{self._path.name}-taking-{token}")
        if not create_exclusively(taking, b""):
            self._drop_abandoned(taking, stale_s)
            return False
        try:
            holder = self.read()
            if holder is None or holder.token != token:
                return False
            self.remove()
            return True
        finally:
            taking.unlink(missing_ok=True)

    def _drop_abandoned(self, taking: Path, stale_s: float) -> None:
        """Wait a little for the driver that is taking over; forget it if it has been at it for stale_s."""
        time.sleep(_RETRY_S)
        self._own.write_bytes(b"")
        try:
            if self._own.stat().st_mtime - taking.stat().st_mtime > stale_s:
                taking.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        finally:
            self._own.unlink()

    def refresh(self) -> None:
        """See LockFile: written again, on condition that nobody takes it over meanwhile. Raises OSError if somebody does.

        The count makes each content, and so its tag, another one: a write that arrives late finds a tag that is gone.
        """
        tag = entity_tag(self._path)
        holder = self.read()
        if holder is not None and self._is_own(holder):
            replace_if_unchanged(self._path, replace(holder, beats=holder.beats + 1).to_json().encode(), tag)
