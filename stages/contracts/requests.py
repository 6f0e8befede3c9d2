"""Requests that a task puts to a model, as tokens, and a model's answers.

Requests are sorted by length and cut into shards. Requests that differ in their last token alone share a row: the model reads
them once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from stages.contracts.arrow import Array, read_table, write_table
from stages.contracts.windows import NO_TOKEN
from stages.io.files import WrittenFile


@dataclass(frozen=True)
class TaskArgs:
    """A task of the harness and the settings that its scores depend on, as in `Harness`. trust_remote_code: for the tokenizer
    alone."""

    task: str
    num_fewshot: int | None
    limit: int | float | None
    seed: int | None
    include_path: str | None
    max_length: int | None
    apply_chat_template: bool
    confirm_run_unsafe_code: bool
    trust_remote_code: bool
    bootstrap_iters: int


@dataclass(frozen=True)
class RequestsFacts:
    """kinds: methods of the harness's model class that the task calls. num_requests: distinct log-likelihood requests.
    num_shards: their shards. longest: tokens of the longest row; 0 without requests. num_tokens: tokens of all rows.
    num_prompts: prompts that a model continues. num_slices: slices of them. versions: of the tasks, by name. failure: why the
    task asks nothing; None if it does."""

    kinds: tuple[str, ...]
    num_requests: int
    num_shards: int
    longest: int
    num_tokens: int
    num_prompts: int
    num_slices: int
    versions: Mapping[str, str]
    failure: str | None = None


class Request(NamedTuple):
    """How likely are the last num_scored of some tokens, given those before them?"""

    token_ids: tuple[int, ...]
    num_scored: int


class Row(NamedTuple):
    """Tokens that a model reads, and what is asked of them: for each request the number of scored tokens and the last of them,
    which the model need not read."""

    token_ids: tuple[int, ...]
    nums_scored: tuple[int, ...]
    last_ids: tuple[int, ...]

    @property
    def requests(self) -> Iterator[Request]:
        """The requests, in order."""
        for num_scored, last in zip(self.nums_scored, self.last_ids, strict=True):
            yield Request((*self.token_ids, last), num_scored)


_REQUESTS = pa.schema(
    [
        pa.field("token_ids", pa.list_(pa.int32()), False),
        pa.field("nums_scored", pa.list_(pa.int32()), False),
        pa.field("last_ids", pa.list_(pa.int32()), False),
    ],
    metadata={"table": "what a model reads at once a row", "last_ids": "last token of each request, which is not read"},
)
_ANSWERS = pa.schema(
    [pa.field("log_likelihood", pa.float64(), False), pa.field("is_greedy", pa.bool_(), False)],
    metadata={
        "table": "one request a row",
        "log_likelihood": "nats",
        "is_greedy": "whether each scored token is the likeliest",
    },
)


def requests_file(part_dir: Path, shard: int) -> Path:
    """Requests of one shard."""
    return part_dir / f"requests-{shard:04d}.arrow"


def answers_file(part_dir: Path, shard: int) -> Path:
    """A model's answers to the requests of one shard."""
    return part_dir / f"answers-{shard:04d}.arrow"


def rows_of(requests: Iterable[Request]) -> list[Row]:
    """Rows, longest first; equal lengths in the order of their tokens."""
    ordered = sorted(requests, key=lambda request: (-len(request.token_ids), request.token_ids, request.num_scored))
    rows = []
    for read, group in groupby(ordered, key=lambda request: request.token_ids[:-1]):
        alike = list(group)
        rows.append(Row(read, tuple(one.num_scored for one in alike), tuple(one.token_ids[-1] for one in alike)))
    return rows


def shards_of(rows: Sequence[Row], tokens_per_shard: int) -> Iterator[Sequence[Row]]:
    """Cut rows, longest first, into shards of at most tokens_per_shard tokens, each row as long as the first one of its shard;
    at least one row each."""
    start = 0
    while start < len(rows):
        stop = start + max(1, tokens_per_shard // len(rows[start].token_ids))
        yield rows[start:stop]
        start = stop


def padded(rows: Sequence[Row]) -> Array:
    """Token ids int64 [rows, tokens of the longest], filled with NO_TOKEN from the right."""
    token_ids_ST = np.full((len(rows), max(len(row.token_ids) for row in rows)), NO_TOKEN, np.int64)
    for number, row in enumerate(rows):
        token_ids_ST[number, : len(row.token_ids)] = row.token_ids
    return token_ids_ST


def write_requests(path: Path, rows: Sequence[Row]) -> WrittenFile:
    """Write the rows of one shard."""
    columns = {name: [list(getattr(row, name)) for row in rows] for name in Row._fields}
    return write_table(path, columns, _REQUESTS)


def read_requests(path: Path) -> list[Row]:
    """Read a file of `write_requests`."""
    table = read_table(path)
    return [Row(*map(tuple, values)) for values in zip(*(table[name].to_pylist() for name in Row._fields), strict=True)]


def write_answers(path: Path, answers: Sequence[tuple[float, bool]]) -> WrittenFile:
    """Write the answers to the requests of one shard: log-likelihood, and whether greedy search would say the same."""
    columns = {"log_likelihood": [one for one, _ in answers], "is_greedy": [one for _, one in answers]}
    return write_table(path, columns, _ANSWERS)


def read_answers(path: Path) -> list[tuple[float, bool]]:
    """Read a file of `write_answers`."""
    table = read_table(path)
    return list(zip(table["log_likelihood"].to_pylist(), table["is_greedy"].to_pylist(), strict=True))
