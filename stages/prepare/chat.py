"""Conversations: rows of a file that a tokenizer's chat template turns into text.

Two forms are common: `messages`, a list of {role, content, ...}, and ShareGPT's `conversations`, a list of {from, value}.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MESSAGES = ("messages", "conversations")
"""Fields that hold a conversation. The first one that is there is read."""
TOOLS = "tools"
_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "assistant": "assistant", "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
"""Roles by ShareGPT's names of speakers."""


@dataclass(frozen=True)
class Conversation:
    """messages: as the chat template takes them. tools: descriptions of functions, empty if there are none. place: file and
    row, for messages."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    place: str


def conversation_of(row: Mapping[str, Any], place: str) -> Conversation:
    """The conversation of a row. Raises ValueError for a row without one."""
    field = next((name for name in MESSAGES if row.get(name) is not None), None)
    if field is None:
        raise ValueError(f"no field {' or '.join(MESSAGES)}, which format chat needs; it has {', '.join(row) or 'none'}")
    messages = row[field]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"field {field!r} is not a list of messages; write [{{role: user, content: ...}}, ...]")
    return Conversation(tuple(_message(message, field) for message in messages), _tools(row.get(TOOLS)), place)


def _message(message: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A message in the form of `messages`. Parquet writes keys that a message lacks as null; they are left out."""
    given = {key: value for key, value in message.items() if value is not None}
    if "role" in given:
        return given
    if "from" not in given or "value" not in given:
        raise ValueError(
            f"a message in field {field!r} has {', '.join(given) or 'nothing'}; it needs role and content: correct the message"
        )
    if given["from"] not in _ROLES:
        raise ValueError(f"a message is from {given['from']!r:.40}; known are {', '.join(_ROLES)}")
    return {"role": _ROLES[given["from"]], "content": given["value"]}


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Descriptions of functions: a list, or JSON of one, as Parquet files often hold it."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (json.JSONDecodeError, RecursionError) as e:
            raise ValueError(f"field {TOOLS!r} is not JSON: {e}; correct it") from e
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"field {TOOLS!r} is not a list of functions; leave it out, or write [{{type: function, ...}}, ...]")
    return tuple(value)
