"""A worker that Ray's own memory monitor kills: the real thing, with the limit set a little above what is in use now."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.executors.ray import connect
from tests.cluster.conftest import REPOSITORY
from tests.cluster.faults import EATEN_BYTES, FaultyExecutor
from tests.deploy.ray_head import RayHead, ray_head
from tests.runs import FinishedRun, execute

pytestmark = pytest.mark.slow
_ROOM_BYTES = EATEN_BYTES // 2


def _memory_bytes() -> tuple[int, int]:
    """What this machine has in all, and what of it is available."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    return fields["MemTotal"], fields["MemAvailable"]


@pytest.fixture
def tight_head() -> Iterator[RayHead]:
    """A head with a fake GPU, whose monitor kills workers once half of what the fault eats is in use beyond what is now."""
    total, available = _memory_bytes()
    if available < 2 * EATEN_BYTES:
        pytest.skip(f"{available:,} bytes of memory are available; the test wants {2 * EATEN_BYTES:,}")
    limits = {
        "RAY_memory_usage_threshold": f"{(total - available + _ROOM_BYTES) / total:.4f}",
        "RAY_memory_monitor_refresh_ms": "50",
        "PYTHONPATH": str(REPOSITORY),
    }
    with ray_head(more_env=limits, num_gpus=1) as head:
        yield head


@pytest.mark.timeout(300)
def test_a_worker_killed_for_memory_is_tried_alone(
    tight_head: RayHead, run_file: Callable[[dict[str, Any]], Path], undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    path = run_file({})
    config = load_config(path, [])

    def make_executor() -> FaultyExecutor:
        connect(tight_head.gcs_address)
        return FaultyExecutor(config.resources, {"calibrate/layers-0002-0004/tokens-0001": "eat memory"}, tmp_path)

    result, _ = execute(config, make_executor)
    assert FinishedRun.found(path, config, result.report).results() == undisturbed
    events = (Path(config.run_dir) / "events.jsonl").read_text()
    assert "its worker was killed, since the node ran out of memory" in events
