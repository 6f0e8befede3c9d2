"""What a run could use: the nodes of a Ray cluster, or this machine. For suggestions only; a run asks Ray."""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import filesize

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_CURRENT_CLUSTER = Path("/tmp/ray/ray_current_cluster")  # Ray's own file: the cluster that runs on this machine
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Node:
    """A machine. gpu_bytes: memory of its smallest GPU; None where that is unknown, as on a cluster's other nodes."""

    num_cpus: int
    memory_bytes: int
    num_gpus: int = 0
    gpu_name: str = ""
    gpu_bytes: int | None = None

    def __str__(self) -> str:
        gpus = ""
        if self.num_gpus:
            each = f" of {filesize.decimal(self.gpu_bytes)}" if self.gpu_bytes else ""
            gpus = f", {self.num_gpus} x {self.gpu_name or 'GPU'}{each}"
        return f"{self.num_cpus} CPUs, {filesize.decimal(self.memory_bytes)} of memory{gpus}"


@dataclass(frozen=True)
class Machines:
    """The nodes that a run could use. place: in words."""

    place: str
    nodes: tuple[Node, ...]

    @property
    def workhorse(self) -> Node:
        """The smallest node of those that matter: with GPUs, if any has."""
        having = [node for node in self.nodes if node.num_gpus] or list(self.nodes)
        return min(having, key=lambda node: (node.gpu_bytes or 0, node.memory_bytes))

    def __str__(self) -> str:
        if len(self.nodes) == 1:
            return f"{self.place}: {self.nodes[0]}"
        return f"{self.place}: {len(self.nodes)} nodes, of which the smallest that counts has {self.workhorse}"


def find_machines() -> Machines:
    """The Ray cluster that this process is connected to, that RAY_ADDRESS names, or that runs on this machine; else this
    machine alone."""
    if _is_connected():
        return _cluster()
    if os.environ.get("RAY_ADDRESS") or _CURRENT_CLUSTER.exists():
        import ray

        with contextlib.suppress(ConnectionError):
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
            try:
                return _cluster()
            finally:
                ray.shutdown()
    return Machines("this machine", (this_machine(),))


def _is_connected() -> bool:
    """Without an import of Ray, which takes a second: a process that has not imported it is connected to nothing."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _cluster() -> Machines:
    import ray

    return Machines("the running Ray cluster", tuple(_node(one) for one in ray.nodes() if one["Alive"]))


def _node(found: Mapping[str, Any]) -> Node:
    resources: Mapping[str, float] = found["Resources"]
    names = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    num_cpus, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    return Node(num_cpus, int(resources.get("memory", 0)), num_gpus, names[0] if names and num_gpus else "")


def this_machine() -> Node:
    """This machine, within the limits of the container that this process runs in."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file
            memory.append(int(path.read_text()))
    gpus = _gpus()
    sizes = [size for _, size in gpus]
    return Node(num_cpus, min(memory), len(gpus), gpus[0][0] if gpus else "", min(sizes) if sizes else None)


def _gpus() -> list[tuple[str, int]]:
    """Name and bytes of memory of each NVIDIA GPU, as nvidia-smi has them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
        rows = [line.rpartition(",") for line in found.splitlines() if line.strip()]
        return [(name.strip(), int(mebibytes) << 20) for name, _, mebibytes in rows]
    return []
