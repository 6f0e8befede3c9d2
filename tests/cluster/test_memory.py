"""A worker that Ray's own memory monitor kills: the real thing, whatever else takes memory on this machine."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import results_of
from tests.cluster.faults import EATEN_VARIABLE
from tests.cluster.memory_room import available_memory, own_room, shared_room
from tests.cluster.test_driver import events_of
from tests.conftest import REPOSITORY
from tests.deploy.ray_head import RayHead, ray_head

pytestmark = pytest.mark.slow
STRUCK = "calibrate/layers-0002-0004/tokens-0001"
_KILLED_AT_BYTES, _EATEN_BYTES = 4 * 2**30, 6 * 2**30  # a head and its workers take about 1.5 GiB
_LIMIT_S = 300


@pytest.fixture
def tight_head() -> Iterator[RayHead]:
    """A head with a fake GPU, whose monitor kills workers before the fault has eaten what it wants."""
    _, available = available_memory()
    if available < _EATEN_BYTES:
        pytest.skip(f"{available:,} bytes of memory are available; the test wants {_EATEN_BYTES:,}")
    with own_room(_KILLED_AT_BYTES, _EATEN_BYTES) as own:
        room = own or shared_room()
        more_env = {
            "RAY_memory_usage_threshold": f"{room.threshold:.4f}",
            "RAY_memory_monitor_refresh_ms": "50",
            "PYTHONPATH": str(REPOSITORY),
            EATEN_VARIABLE: str(room.eaten_bytes),
        }
        with ray_head(more_env=more_env, num_gpus=1, start_with=room.start_with) as head:
            yield head


@pytest.mark.timeout(_LIMIT_S + 200)
def test_a_worker_killed_for_memory_is_tried_alone(
    tight_head: RayHead, run_file: Callable[[dict[str, Any]], Path], undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """The driver has a process of its own: this one may have known other clusters."""
    path = run_file({})
    command = [
        sys.executable, "-m", "tests.cluster.struck_driver", str(path), "--address", tight_head.gcs_address,
        "--marker-dir", str(tmp_path), "--fault", STRUCK, "eat memory",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr + tight_head.log_path.read_text()
    assert len(list(tmp_path.iterdir())) == 1, "the fault struck"
    assert results_of(path) == undisturbed
    lost = [event for event in events_of(path) if event["event"] == "lost"]
    assert any("its worker was killed, since the node ran out of memory" in json.dumps(event) for event in lost), lost
