"""Metrics that the driver gives to Ray. Each node's agent offers them to Prometheus, with the prefix `ray_`."""

from ray.util.metrics import Counter, Histogram

from pipeline.driver.outcome import Outcome
from stages.contracts.units import Unit

_SECONDS = [0.1, 1.0, 10.0, 60.0, 600.0, 3600.0]


class UnitMetrics:
    """Counts of sealed units by stage. All runs of a driver count together."""

    def __init__(self) -> None:
        tags = ("stage",)
        self._done = Counter("hcsmoe_units_done_total", "Units sealed.", tags)
        self._seconds = Histogram("hcsmoe_unit_seconds", "Seconds that a sealed unit took.", _SECONDS, tags)
        self._written = Counter("hcsmoe_bytes_written_total", "Bytes of the files that units have written.", tags)
        self._read = Counter("hcsmoe_bytes_read_total", "Bytes of weights, hidden states and statistics read.", tags)

    def note(self, unit: Unit, outcome: Outcome) -> None:
        """Count a sealed unit. Failed units are not counted."""
        if outcome.failure is not None:
            return
        tags = {"stage": unit.stage}
        self._done.inc(1, tags)
        self._seconds.observe(outcome.elapsed_s, tags)
        for counter, num_bytes in ((self._written, outcome.bytes_written), (self._read, outcome.bytes_read)):
            if num_bytes:
                counter.inc(num_bytes, tags)
