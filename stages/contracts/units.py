"""Units, the smallest pieces of work: what they are given, what they return, and how they are named. No torch.

A unit's arguments, its facts and what its worker holds are typed, so that a wrong argument is found by the type checker. The
function itself is named by a string: the driver lists units without importing what computes them.
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
"""Facts of a unit as its manifest holds them."""


@dataclass(frozen=True)
class NoFacts:
    """Facts of a unit that has nothing to report."""


@dataclass(frozen=True)
class Call:
    """A function, "package.module:function", and its typed arguments, a frozen dataclass."""

    function: str
    args: object


@dataclass(frozen=True)
class UnitCall(Generic[A, F]):
    """A kind of unit.

    function: given a `Job[A]` (a `HeldJob` where units share a hold), it returns a `UnitResult[F]`.
    args, facts: frozen dataclasses of its arguments and of the facts in its result.
    """

    function: str
    args: type[A]
    facts: type[F]

    def on(self, args: A) -> Call:
        """The call with these arguments."""
        return Call(self.function, args)

    def read_facts(self, facts: Facts) -> F:
        """Facts from a manifest. Raises pydantic.ValidationError for those of another kind of unit."""
        return TypeAdapter(self.facts).validate_python(facts)


@dataclass(frozen=True)
class HoldCall(Generic[A]):
    """What opens a hold. function: given the arguments, it returns a `Held`."""

    function: str
    args: type[A]

    def on(self, args: A) -> Call:
        """The call with these arguments."""
        return Call(self.function, args)


@runtime_checkable
class Held(Protocol):
    """Something that a worker opens once and keeps for all units that share it, such as a loaded layer shard."""

    @property
    def bytes_read(self) -> int:
        """Bytes of the checkpoint that opening it has read."""

    def read_ahead(self, args: object) -> None:
        """Start to read what the next hold will be opened from, in the background. args: of that hold, of whatever kind."""

    def close(self) -> None:
        """Free its memory immediately. Models contain reference cycles and would live until the garbage collector runs."""


@dataclass(frozen=True)
class Hold:
    """What a worker opens once and keeps while it runs the units that need it.

    key: equal for units that share it. run_dir, label: the run that it belongs to, and its name in logs.
    """

    key: str
    call: Call
    run_dir: str
    label: str


@dataclass(frozen=True)
class Unit:
    """One call of a function on files.

    run_dir: absolute path of the run directory. stage: the stage's name. part_dir: directory of the part of that stage,
    relative to run_dir. name: unique in it, a readable path.
    call: what runs. label: its name in logs.
    reads, writes: transient files (relative to the run directory) that it consumes and makes. A unit follows the units that
    write what it reads; what it reads is deleted once it is sealed. A unit that writes transient files makes nothing else,
    and runs only when a reader needs it.
    after: ids of units that it also follows.
    hold: for units that share a loaded layer shard. on_worker: runs on a worker (GPU) rather than as a CPU task.
    memory_bytes: what it is estimated to need, for messages; 0 where that is little.
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
        """Unique among all runs."""
        return f"{self.run_dir}/{self.part_dir}/{self.name}"


@dataclass(frozen=True)
class Job(Generic[A_co]):
    """What a unit's function is given.

    run_dir: the run directory, on storage that every node reaches. part_dir: the directory of its part of the stage; a unit
    writes only below it.
    """

    run_dir: Path
    part_dir: Path
    args: A_co


@dataclass(frozen=True)
class HeldJob(Job[A_co], Generic[A_co, H_co]):
    """What a unit's function is given where the worker holds something for it."""

    held: H_co


@dataclass(frozen=True)
class UnitResult(Generic[F_co]):
    """What a unit did.

    facts: counts and findings for the log and the report, a frozen dataclass of JSON values.
    files: what it wrote and what its seal vouches for.
    transient: what it wrote for the units after it, deleted once they are sealed.
    bytes_read: of the checkpoint, for the metrics; what a hold reads counts with the hold.
    """

    facts: F_co
    files: Sequence[WrittenFile] = ()
    transient: Sequence[WrittenFile] = ()
    bytes_read: int = 0
