"""Requests of tasks as rows and shards, and the answers that hidden states give."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config import read_config
from stages.contracts.errors import InputError
from stages.contracts.requests import (
    Request,
    Row,
    padded,
    read_answers,
    read_requests,
    rows_of,
    shards_of,
    write_answers,
    write_requests,
)
from stages.contracts.tasks import GROUPS, expanded
from stages.evaluate.task_units import row_answers
from stages.harness import notes

CHANCE = np.random.default_rng(0)


def drawn(count: int) -> list[Request]:
    """Requests of many lengths; some differ in their last token alone, as the letters of multiple choice do."""
    found = []
    for _ in range(count):
        ids = tuple(CHANCE.integers(0, 50, int(CHANCE.integers(2, 30))).tolist())
        found += [Request((*ids, last), int(CHANCE.integers(1, len(ids)))) for last in range(int(CHANCE.integers(1, 5)))]
    return found


def test_rows_hold_every_request_once_and_what_is_read_is_read_once() -> None:
    requests = drawn(40)
    rows = rows_of(requests)
    assert sorted(request for row in rows for request in row.requests) == sorted(requests)
    read = [row.token_ids for row in rows]
    assert len(set(read)) == len(read) == 40
    assert [len(ids) for ids in read] == sorted(map(len, read), reverse=True)
    assert rows_of(requests[::-1]) == rows, "whatever their order"


@pytest.mark.parametrize("tokens_per_shard", [1, 20, 100, 10_000])
def test_shards_hold_all_rows_in_order_and_no_more_tokens_than_they_may(tokens_per_shard: int) -> None:
    rows = rows_of(drawn(40))
    shards = list(shards_of(rows, tokens_per_shard))
    assert [row for shard in shards for row in shard] == rows
    for shard in shards:
        ids = padded(shard)
        assert len(shard) == 1 or ids.size <= tokens_per_shard
        assert [tuple(one[one >= 0].tolist()) for one in ids] == [row.token_ids for row in shard]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    rows, answers = rows_of(drawn(5)), [(-1.25, True), (-0.5, False)]
    write_requests(tmp_path / "r.arrow", rows)
    write_answers(tmp_path / "a.arrow", answers)
    assert read_requests(tmp_path / "r.arrow") == rows
    assert read_answers(tmp_path / "a.arrow") == answers


def test_answers_are_sums_of_log_probabilities_of_the_scored_tokens() -> None:
    """The hidden state is the logits; a long row exceeds the number of positions that are computed at once."""
    rows = [*rows_of(drawn(12)), Row(tuple(CHANCE.integers(0, 50, 600).tolist()), (590, 3), (7, 9))]
    hidden = [torch.from_numpy(CHANCE.normal(size=(len(row.token_ids) + 4, 50))).float() for row in rows]
    for row, logits in zip(rows[:6], hidden[:6], strict=True):  # a model that is sure of what comes
        following = torch.tensor([*row.token_ids[1:], row.last_ids[0]])
        logits[torch.arange(len(following)), following] += 20
    held = SimpleNamespace(logits=lambda states: states)
    found = list(row_answers(held, rows, hidden))  # type: ignore[arg-type]
    due = []
    for row, logits in zip(rows, hidden, strict=True):
        for ids, num_scored in row.requests:
            first = len(ids) - num_scored
            probabilities = torch.softmax(logits.double(), -1)
            picked = [float(probabilities[place - 1, ids[place]].log()) for place in range(first, len(ids))]
            due.append((sum(picked), all(int(logits[place - 1].argmax()) == ids[place] for place in range(first, len(ids)))))
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in due]
    assert {is_greedy for _, is_greedy in due} == {True, False}
    assert [value for value, _ in found] == pytest.approx([value for value, _ in due], rel=1e-5, abs=1e-5)


def test_without_the_extra_a_run_with_tasks_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "find_spec", lambda name: None)
    text = {"data": "text.jsonl", "num_sequences": 1}
    values = {
        "model": "m", "run_dir": "r", "calibration": text, "clustering": {"num_experts": 2},
        "evaluation": {**text, "tasks": "paper"},
    }  # fmt: skip
    with pytest.raises(InputError, match=r"lm_eval and accelerate is not installed; .* `pip install 'hcsmoe\[eval\]'`$"):
        notes.notes_of(read_config(values), Path("m"))
    assert notes.notes_of(read_config({**values, "evaluation": text}), Path("m")) == {}


def test_groups_stand_for_their_tasks_and_each_task_is_named_once() -> None:
    assert expanded(["boolq", "paper", "gsm8k"]) == ("boolq", *(name for name in GROUPS["paper"] if name != "boolq"), "gsm8k")
