"""Memory of its own for a Ray head: its monitor then counts nothing of what else runs on this machine."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEMORY = Path("/sys/fs/cgroup/memory")  # where Ray's monitor looks for the limit and the use of a group
_END_S = 60
# $0 is the group. Only the processes of this mount namespace see the group as the whole.
_ENTER = 'echo $$ > "$0/cgroup.procs" && mount --bind "$0" ' + str(MEMORY) + ' && exec "$@"'


@dataclass(frozen=True)
class MemoryRoom:
    """start_with: a command that runs the rest of its command line in the room. threshold: the fraction of the memory, as the
    processes in the room see it, over which a monitor kills. eaten_bytes: what is surely more than that."""

    start_with: tuple[str, ...]
    threshold: float
    eaten_bytes: int


def available_memory() -> tuple[int, int]:
    """What this machine has in all, and what of it is available."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    return fields["MemTotal"], fields["MemAvailable"]


@contextlib.contextmanager
def own_room(killed_at_bytes: int, eaten_bytes: int) -> Iterator[MemoryRoom | None]:
    """A memory group of its own, which only root makes, and only where groups are of version 1; None elsewhere."""
    # Ray takes the group's use for the node's where the group's limit is the lower one. Nothing comes near it: a group that is
    # full stands still, since the kernel takes back the pages of its programs.
    limit_bytes = available_memory()[0] * 3 // 4
    group = MEMORY / f"hcsmoe-tests-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    start_with = ("unshare", "--mount", "bash", "-c", _ENTER, str(group))
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        can_enter = shutil.which("unshare") and not subprocess.run([*start_with, "true"], capture_output=True).returncode
        yield MemoryRoom(start_with, killed_at_bytes / limit_bytes, eaten_bytes) if can_enter else None
    finally:
        _remove(group)


def shared_room() -> MemoryRoom:
    """The memory of the whole machine. The threshold is a third of what is available beyond what is in use now: neighbours may
    take or give back as much before the monitor kills too early, or not at all."""
    total, available = available_memory()
    room_bytes = available // 3
    return MemoryRoom((), (total - available + room_bytes) / total, 2 * room_bytes)


def _remove(group: Path) -> None:
    """The kernel keeps a group until its last process is gone."""
    deadline = time.monotonic() + _END_S
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
