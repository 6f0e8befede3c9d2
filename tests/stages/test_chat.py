"""Conversations: both forms, from lines and from Parquet, go through the tokenizer's chat template."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from stages.contracts.errors import InputError
from tests.stages.texts import drawn, model_folder

TEMPLATE = (
    "{% if tools %}tools {% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for message in messages %}{{ message.role }} says {{ message.content }} . "
    "{% if message.role == 'nobody' %}{{ raise_exception('nobody may not speak') }}{% endif %}{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "the house " * 30}, {"role": "assistant", "content": "the river " * 30}]
SHARE_GPT = [{"from": "human", "value": "the house " * 30}, {"from": "gpt", "value": "the river " * 30}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = model_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def expected(model: Path, tools: list[Any] | None = None) -> list[int]:
    """The conversation as transformers' own call renders it, tokenised as text without further special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
    assert "user says the house" in text and "assistant says the river" in text and ("look" in text) == bool(tools)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def rows(path: Path, values: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(values), path)
    else:
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def first(path: Path, model: Path, count: int) -> list[int]:
    """The first tokens of all that there is: one sequence as long as the conversation."""
    return list(drawn(path, model, format="chat", sequence_length=count)[0])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("row", [{"messages": MESSAGES}, {"conversations": SHARE_GPT}], ids=["messages", "conversations"])
def test_a_conversation_is_what_the_template_makes_of_it(row: dict[str, Any], suffix: str, model: Path, tmp_path: Path) -> None:
    ids = expected(model)
    assert first(rows(tmp_path / f"chat{suffix}", [row]), model, len(ids)) == ids


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "json"])
def test_tools_are_passed_on(tools: Any, suffix: str, model: Path, tmp_path: Path) -> None:
    ids = expected(model, TOOLS)
    assert first(rows(tmp_path / f"chat{suffix}", [{"messages": MESSAGES, "tools": tools}]), model, len(ids)) == ids


def test_keys_that_parquet_writes_as_null_are_left_out(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}{% if 'name' in message %} by name{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "the house " * 30, "name": "x"}, {"role": "user", "content": " the river" * 30}]
    path = rows(tmp_path / "chat.parquet", [{"messages": messages}])
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert first(path, model, len(ids)) == list(ids)


def test_conversations_are_packed(model: Path, tmp_path: Path) -> None:
    ids = expected(model)
    path = rows(tmp_path / "chat.jsonl", [{"messages": MESSAGES}] * 4)
    found = drawn(path, model, format="chat", num_sequences=2, sequence_length=2 * len(ids))
    assert np.array_equal(found, [ids * 2] * 2)


BAD: dict[str, tuple[str, list[Any], str]] = {
    "no conversation": (".jsonl", [{"text": "x"}], r"line 1: no field messages or conversations.* it has text"),
    "no column": (".parquet", [{"text": "x"}], r"has no column messages or conversations; it has text"),
    "no list": (".jsonl", [{"messages": "x"}], r"line 1: field 'messages' is not a list of messages"),
    "an empty list": (".jsonl", [{"messages": []}], r"field 'messages' is not a list of messages"),
    "no role": (".jsonl", [{"messages": [{"content": "x"}]}], r"a message in field 'messages' has content; it needs role"),
    "an unknown speaker": (".jsonl", [{"conversations": [{"from": "cat", "value": "x"}]}], r"a message is from 'cat'; known"),
    "tools that are no list": (".jsonl", [{"messages": MESSAGES, "tools": {"a": 1}}], r"field 'tools' is not a list"),
    "tools that are no JSON": (".jsonl", [{"messages": MESSAGES, "tools": "["}], r"field 'tools' is not JSON"),
    "a template that fails": (
        ".jsonl", [{"messages": [{"role": "nobody", "content": "x"}]}],
        r"cannot apply its chat template to .*bad\.jsonl, line 1: nobody may not speak",
    ),
    "a text file": (".txt", ["x"], r"is a text file, but format is chat"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_conversation_is_one_line(case: str, model: Path, tmp_path: Path) -> None:
    suffix, values, message = BAD[case]
    path = rows(tmp_path / f"bad{suffix}", values)
    with pytest.raises(InputError, match=message) as raised:
        drawn(path, model, format="chat")
    assert "\n" not in str(raised.value)


def test_a_tokenizer_without_a_template_is_one_line(tmp_path: Path) -> None:
    path = rows(tmp_path / "chat.jsonl", [{"messages": MESSAGES}])
    with pytest.raises(InputError, match=r"has no chat template, which format chat needs"):
        drawn(path, model_folder(tmp_path / "plain"), format="chat")


def test_token_ids_are_no_conversations(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((2, 8), dtype=np.int64))
    with pytest.raises(InputError, match=r"calibration.format is chat, but .*ids.npy holds token ids"):
        drawn(tmp_path / "ids.npy", model, format="chat")
