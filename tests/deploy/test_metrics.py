"""What Prometheus finds at a node of the cluster while a run goes on."""

import re
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest

from tests.deploy.example_run import RUN, SMALL
from tests.deploy.ray_head import ray_head

_LIMIT_S = 500
SAMPLE = re.compile(r"^ray_(hcsmoe_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


def scrape(address: str) -> dict[str, dict[str, float]]:
    """Values of our metrics, by name and stage; none before the node's agent is up, seconds after the node."""
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            text = response.read().decode()
    except OSError:
        return {}
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, labels, value in SAMPLE.findall(text):
        stage = re.search(r'stage="(\w+)"', labels)
        assert stage, labels
        found[name][stage[1]] = float(value)
    return found


@pytest.mark.slow
def test_a_scrape_of_ray_shows_units_seconds_and_bytes_by_stage(clone: Path, tmp_path: Path) -> None:
    with ray_head(more_env={"RAY_metrics_report_interval_ms": "500"}, num_cpus=1) as head:
        command = [sys.executable, *RUN[1:], *SMALL, "--set", f"run_dir={tmp_path / 'run'}", "--address", head.gcs_address]
        driver = subprocess.Popen(
            command, cwd=clone, env=dict(head.env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            deadline = time.monotonic() + _LIMIT_S
            found: dict[str, dict[str, float]] = {}
            while time.monotonic() < deadline and driver.poll() is None:
                found = scrape(head.metrics_address) or found
                time.sleep(0.2)
            output, _ = driver.communicate(timeout=_LIMIT_S)
        finally:
            driver.kill()
    assert driver.returncode == 0, output
    assert found["hcsmoe_units_done_total"]["prepare"] == 3
    calibrated = found["hcsmoe_units_done_total"]["calibrate"]
    assert calibrated > 4
    assert found["hcsmoe_unit_seconds_count"]["calibrate"] == calibrated
    assert found["hcsmoe_unit_seconds_sum"]["calibrate"] > 0
    weights = (clone / "examples/tiny-mixtral/model.safetensors").stat().st_size
    assert found["hcsmoe_bytes_read_total"]["calibrate"] > 0.8 * weights
    assert found["hcsmoe_bytes_read_total"]["merge"] > 1.9 * weights, "two targets, each made of every source tensor"
    assert found["hcsmoe_bytes_written_total"]["merge"] > 0.5 * weights
