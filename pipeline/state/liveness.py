"""Which process this is, told so that another process can see whether it has ended, and knows when it cannot see that."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE_LINK = Path("/proc/self/ns/pid")


def describe_process() -> dict[str, Any]:
    """This process: host, number, when it started, and the boot and the process namespace in which its number means something.

    What a system without /proc does not tell is None.
    """
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), **_place()}


def _place() -> dict[str, str | None]:
    try:
        return {"boot_id": _BOOT_FILE.read_text().strip(), "pid_namespace": os.readlink(_NAMESPACE_LINK)}
    except OSError:  # no /proc: the host's name has to do
        return {"boot_id": None, "pid_namespace": None}


def _started(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None where that cannot be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # field 22; the second, the name, may hold spaces and brackets


def is_gone(process: Mapping[str, Any]) -> bool:
    """Whether a process that `describe_process` described has ended. False for one that cannot be seen from here.

    Hosts may share a name, and containers a host: numbers are compared within one boot and one process namespace only. A number
    that now belongs to a process with another start is not taken for the old one.
    """
    here = {"host": socket.gethostname(), **_place()}
    if any(process.get(name) != value for name, value in here.items()):
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's
        pass
    started = _started(process["pid"])
    return None not in (started, process.get("started")) and started != process["started"]
