"""Signs of loops in generated text."""

import pytest

from stages.evaluate.loops import is_thinking, repeated_share


def by_hand(ids: list[int]) -> float:
    """Runs of eight that occur at an earlier place, over all runs."""
    runs = range(len(ids) - 7)
    again = [start for start in runs if any(ids[before : before + 8] == ids[start : start + 8] for before in range(start))]
    return len(again) / len(runs) if runs else 0.0


@pytest.mark.parametrize(
    "ids", [[], [1] * 7, [1] * 8, [1] * 9, list(range(40)), [*range(30), *range(30)], [1, 2, 3] * 20, [*range(50), *[7] * 50]]
)
def test_the_share_counts_runs_that_were_there_before(ids: list[int]) -> None:
    assert repeated_share(ids) == pytest.approx(by_hand(ids), abs=1e-12)


def test_a_text_that_goes_round_is_above_half_and_one_that_does_not_is_at_nothing() -> None:
    assert repeated_share([5, 6, 7] * 30) > 0.95
    assert repeated_share(list(range(100))) == 0


@pytest.mark.parametrize(
    ("text", "thinks"),
    [
        ("<think>so", True), ("<think>so</think>done", False), ("<think>a</think>b<think>c", True), ("plain", False),
        ("[THINK]hm", True), ("</think>", False), ("<thinking>a</thinking>", False),
    ],
)  # fmt: skip
def test_a_thought_without_an_end_is_seen(text: str, thinks: bool) -> None:
    assert is_thinking(text) == thinks
