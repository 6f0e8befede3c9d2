"""Signs that generated text has gone wrong, as users of pruned models describe it: it repeats itself, or never stops
thinking."""

from collections.abc import Sequence

RUN_TOKENS = 8
LOOP_SHARE = 0.5
"""Share of repeated runs from which on a text counts as a loop."""
THOUGHTS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
"""Marks between which models think, as their chat templates write them."""


def repeated_share(token_ids: Sequence[int]) -> float:
    """Share of the runs of RUN_TOKENS tokens that occurred before; 0 if there is no run."""
    runs = [tuple(token_ids[start : start + RUN_TOKENS]) for start in range(len(token_ids) - RUN_TOKENS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def is_thinking(text: str) -> bool:
    """Whether a text ends inside a thought: the last beginning of one has no end behind it."""
    return any(begin in text and text.rindex(begin) > text.rfind(end) for begin, end in THOUGHTS)
