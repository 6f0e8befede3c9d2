"""Faults that strike a unit once. Workers import this module, so it imports nothing heavy."""

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import ray

from pipeline.executors.base import Slot
from pipeline.executors.ray import RayExecutor
from pipeline.imports import resolve
from stages.contracts.settings import Resources
from stages.contracts.units import Call, Job, Unit

EATEN_VARIABLE = "HCSMOE_TESTS_EATEN_BYTES"
"""The environment variable of a worker that says how much the fault `eat memory` takes."""
_BITE_BYTES = 2**27


def _eat_memory() -> None:
    """Take memory until somebody puts an end to it. Raises RuntimeError when nobody does."""
    eaten: list[bytes] = []
    while len(eaten) * _BITE_BYTES < int(os.environ[EATEN_VARIABLE]):
        eaten.append(b"\1" * _BITE_BYTES)
        time.sleep(0.05)
    time.sleep(120)
    raise RuntimeError(f"{len(eaten) * _BITE_BYTES:,} bytes were taken and nothing happened")


def _is_first(marker: Path) -> bool:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True)
class FaultArgs:
    """call: of the real unit. marker: a file that exists once the fault has struck."""

    call: Call
    fault: str
    marker: str


def faulty_unit(job: Job[Any]) -> object:
    """Run the unit's own function, with a fault before it or after its last write (before the seal)."""
    args: FaultArgs = job.args
    fault, marker = args.fault, Path(args.marker)
    strikes = fault.startswith("always") or _is_first(marker)
    if strikes and fault == "kill before":
        os.kill(os.getpid(), signal.SIGKILL)
    if strikes and fault == "hang":
        time.sleep(3600)
    if strikes and fault in ("memory", "always memory"):
        raise MemoryError("cannot allocate what the unit needs")
    if strikes and fault == "eat memory":
        _eat_memory()
    if strikes and fault == "always error":
        raise ZeroDivisionError("a unit that cannot work")
    if strikes and fault == "on a node to be killed":
        marker.write_text(ray.get_runtime_context().get_node_id())
        time.sleep(3600)
    result = resolve(args.call.function)(replace(job, args=args.call.args))
    if strikes and fault == "kill before seal":
        os.kill(os.getpid(), signal.SIGKILL)
    return result


class FaultyExecutor(RayExecutor):
    """A Ray executor whose units are struck: `faults` maps a pattern of stage/unit names to a fault of `faulty_unit`."""

    def __init__(self, resources: Resources, faults: Mapping[str, str], marker_dir: Path) -> None:
        super().__init__(resources)
        self._faults, self._marker_dir = faults, marker_dir
        self.submitted: list[str] = []

    def submit(self, slot: Slot, unit: Unit) -> None:
        """Submit the unit, or its faulty twin."""
        name = f"{unit.stage}/{unit.name}"
        self.submitted.append(unit.id)
        for number, (pattern, fault) in enumerate(self._faults.items()):
            if fnmatch(name, pattern):
                marker = self._marker_dir / f"{number}-{'once' if 'kill' in fault else unit.name.replace('/', '-')}"
                args = FaultArgs(unit.call, fault, str(marker))
                unit = replace(unit, call=Call("tests.cluster.faults:faulty_unit", args))
                break
        super().submit(slot, unit)
