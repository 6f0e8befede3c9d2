"""How the processes of a real cluster start: these are no forks, as they are in this folder's other tests."""

import json
import subprocess
import sys
from pathlib import Path

import ray

from pipeline.driver.process import COMPUTING
from pipeline.executors.ray import RayExecutor
from stages.contracts.settings import Resources
from tests.conftest import REPOSITORY
from tests.pipeline.fake import unit
from tests.ray.test_executors import drive


def test_what_libraries_read_is_set_in_rays_processes_before_torch_is_loaded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ray.test_worker_processes", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = {"variables": COMPUTING, "has_torch": False}
    assert json.loads(done.stdout.splitlines()[-1]) == {"task": told, "worker": told}


def tell(run_dir: Path) -> dict[str, object]:
    """What a task and a worker of a new cluster find in their processes."""
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    call = "tests.pipeline.fake:tell_environment"
    units = [unit("task", call=call), unit("worker", call=call, on_worker=True)]
    done, _ = drive(run_dir, units, lambda: RayExecutor(Resources(num_gpus=1)))
    ray.shutdown()
    return {name: outcome.facts for name, outcome in done.items()}


if __name__ == "__main__":
    print(json.dumps(tell(Path(sys.argv[1]))))
