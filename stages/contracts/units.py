"""Units, the smallest pieces of work: their arguments, results and names. No torch.

A unit's arguments, its facts and its worker's hold are typed, so that the type checker finds a wrong argument. The unit's
function is named by a string, so that the driver lists units without importing code that computes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar, runtime_checkable

from pydantic import JsonValue, TypeAdapter

from stages.io.files import WrittenFile

A = TypeVar("A")
F = TypeVar("F")
A_co = TypeVar("A_co", covariant=True)
F_co = TypeVar("F_co", covariant=True)
H_co = TypeVar("H_co", covariant=True)

Facts = Mapping[str, JsonValue]
"""Facts of a unit as stored in its manifest."""

FAILURE = "failure"
"""Name of a fact that says why a sealed unit lacks a result that no other unit needs; null if it lacks none. The run goes on
without it, lists it and ends with exit code 1. The next run tries the unit again."""


def failure_in(facts: Facts) -> str | None:
    """Why a sealed unit lacks a result; None if it lacks none."""
    found = facts.get(FAILURE)
    return found if isinstance(found, str) else None


@dataclass(frozen=True)
class NoFacts:
    """Facts of a unit that reports nothing."""


@dataclass(frozen=True)
class Call:
    """A function, "package.module:function", and its typed arguments, a frozen dataclass."""

    function: str
    args: object


@dataclass(frozen=True)
class UnitCall(Generic[A, F]):
    """A kind of unit.

    function: takes a `Job[A]` (a `HeldJob` if the units share a hold) and returns a `UnitResult[F]`. args, facts: frozen
    dataclasses of its arguments and of its result's facts.
    """

    function: str
    args: type[A]
    facts: type[F]

    def on(self, args: A) -> Call:
        """The call with these arguments."""
        return Call(self.function, args)

    def read_facts(self, facts: Facts) -> F:
        """Parse facts from a manifest. Raises pydantic.ValidationError for facts of another kind of unit."""
        return TypeAdapter(self.facts).validate_python(facts)


@dataclass(frozen=True)
class HoldCall(Generic[A]):
    """The call that opens a hold. function: takes the arguments and returns a `Held`."""

    function: str
    args: type[A]

    def on(self, args: A) -> Call:
        """The call with these arguments."""
        return Call(self.function, args)


@runtime_checkable
class Held(Protocol):
    """An object that a worker opens once and keeps for all units that share it, such as a loaded layer shard."""

    @property
    def bytes_read(self) -> int:
        """Bytes of the checkpoint that were read when it was opened."""

    def read_ahead(self, args: object) -> None:
        """Start to read the files of the next hold in the background. args: arguments of that hold, of any kind."""

    def close(self) -> None:
        """Free its memory immediately. Models contain reference cycles and would live until the garbage collector runs."""


@dataclass(frozen=True)
class Hold:
    """A reference to an object that a worker opens once and keeps while it runs the units that need it.

    key: equal for units that share the object. run_dir, label: its run, and its name in logs.
    """

    key: str
    call: Call
    run_dir: str
    label: str


@dataclass(frozen=True)
class Unit:
    """One call of a function on files.

    run_dir: absolute path of the run directory. stage: name of the stage. part_dir: directory of the stage's part, relative to
    run_dir. name: unique in the part, a readable path. call: the function and its arguments. label: name of the unit in logs.
    reads, writes: transient files (relative to the run directory) that the unit reads and writes. A unit waits for the units
    that write its input; a file is deleted once all its readers are sealed. A unit that writes transient files makes nothing
    else, and runs only when a reader needs them. after: ids of further units that it waits for. hold: set for units that share
    a loaded layer shard. on_worker: run on a worker (GPU) and not as a CPU task. memory_bytes: estimated memory, for messages;
    0 if small.
    """

    run_dir: str
    stage: str
    part_dir: str
    name: str
    call: Call
    label: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    hold: Hold | None = None
    on_worker: bool = False
    memory_bytes: int = 0

    @property
    def id(self) -> str:
        """Id that is unique among all runs."""
        return f"{self.run_dir}/{self.part_dir}/{self.name}"


@dataclass(frozen=True)
class Job(Generic[A_co]):
    """The argument of a unit's function.

    run_dir: the run directory, on storage that every node reaches. part_dir: directory of the unit's part; the unit writes only
    below it.
    """

    run_dir: Path
    part_dir: Path
    args: A_co


@dataclass(frozen=True)
class HeldJob(Job[A_co], Generic[A_co, H_co]):
    """The argument of a unit's function if the unit has a hold. held: the opened object."""

    held: H_co


@dataclass(frozen=True)
class UnitResult(Generic[F_co]):
    """Result of a unit.

    facts: counts and findings for the log and the report, a frozen dataclass of JSON values. files: written files that the
    unit's seal records. transient: files written for later units, deleted once those units are sealed. bytes_read: bytes read
    of the checkpoint, for the metrics. Bytes read by opening a hold are counted there.
    """

    facts: F_co
    files: Sequence[WrittenFile] = ()
    transient: Sequence[WrittenFile] = ()
    bytes_read: int = 0
