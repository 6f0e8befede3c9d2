"""Time limits after which a unit, or the opening of a hold, counts as hung."""

import statistics
from collections import defaultdict, deque

from pipeline.driver.outcome import Outcome
from stages.contracts.settings import Resources
from stages.contracts.units import Unit

_SHORT_S = 0.1
_NUM_KEPT = 100
_FACTOR = 20.0
_FIRST_UNIT_S, _MIN_UNIT_S = 7200.0, 600.0
_FIRST_OPENING_S, _MIN_OPENING_S = 14400.0, 1800.0

_Key = tuple[str, str]


class Timeouts:
    """Time limits by run and kind of unit. They are kept per run because a batch may hold a tiny model beside a large one.

    A unit: the setting, else 20 times the median of its kind, at least ten minutes; two hours for the first of its kind.
    Opening a hold, which reads whole layers of a model: 20 times the median, at least half an hour; four hours for the first.
    """

    def __init__(self) -> None:
        self._unit_s: dict[_Key, deque[float]] = defaultdict(lambda: deque(maxlen=_NUM_KEPT))
        self._opening_s: dict[_Key, deque[float]] = defaultdict(lambda: deque(maxlen=_NUM_KEPT))

    def note(self, unit: Unit, outcome: Outcome) -> None:
        """Record the durations of a sealed unit."""
        self._unit_s[unit.run_dir, unit.call.function].append(outcome.elapsed_s)
        if unit.hold is not None and outcome.open_s:
            self._opening_s[unit.run_dir, unit.hold.call.function].append(outcome.open_s)

    def is_short(self, unit: Unit) -> bool:
        """Whether units of this kind are so short that waiting behind a few of them costs little."""
        known = self._unit_s[unit.run_dir, unit.call.function]
        return bool(known) and max(known) < _SHORT_S

    def unit_s(self, unit: Unit, resources: Resources) -> float:
        """Time limit in seconds for a unit, once its hold, if it has one, is open."""
        if resources.unit_timeout_s is not None:
            return resources.unit_timeout_s
        return _limit_s(self._unit_s[unit.run_dir, unit.call.function], _FIRST_UNIT_S, _MIN_UNIT_S)

    def opening_s(self, unit: Unit) -> float:
        """Time limit in seconds for opening a unit's hold."""
        assert unit.hold is not None
        return _limit_s(self._opening_s[unit.run_dir, unit.hold.call.function], _FIRST_OPENING_S, _MIN_OPENING_S)


def _limit_s(known: deque[float], first_s: float, min_s: float) -> float:
    return max(min_s, _FACTOR * statistics.median(known)) if known else first_s
