"""Describes a process so that another process can tell whether it has ended, or that it cannot tell."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE_LINK = Path("/proc/self/ns/pid")


def describe_process() -> dict[str, Any]:
    """Describe this process: host, process id, start time, and the boot and the process namespace in which the process id is
    valid.

    Values that a system without /proc does not give are None.
    """
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), **_place()}


def _place() -> dict[str, str | None]:
    try:
        return {"boot_id": _BOOT_FILE.read_text().strip(), "pid_namespace": os.readlink(_NAMESPACE_LINK)}
    except OSError:  # without /proc, only the host name remains
        return {"boot_id": None, "pid_namespace": None}


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None where it cannot be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # field 22; field 2, the name, may hold spaces and brackets


def is_gone(process: Mapping[str, Any]) -> bool:
    """Whether a process described by `describe_process` has ended. False if it cannot be seen from here.

    Hosts may share a name, and containers a host, so process ids are compared only within one boot and one process namespace. A
    process with the same id but another start time is a different process.
    """
    here = {"host": socket.gethostname(), **_place()}
    if any(process.get(name) != value for name, value in here.items()):
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # the process belongs to another user
        pass
    started = _started(process["pid"])
    return None not in (started, process.get("started")) and started != process["started"]
