"""The driver of a run on Ray stays small: what computes is loaded by workers alone."""

from collections.abc import Callable
from pathlib import Path

import ray
import yaml

from tests.imports import imported_by
from tests.pipeline.test_imports import COMPUTING
from tests.runs import write_run_file


def test_a_driver_on_ray_never_loads_what_computes(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], token_ids: Path, cluster: None
) -> None:
    run_file = write_run_file(tmp_path, tiny_checkpoint("mixtral"), token_ids, {"resources.num_gpus": 0})
    batch_file = tmp_path / "batch.yaml"
    batch_file.write_text(yaml.safe_dump({"batch_dir": str(tmp_path / "batch"), "runs": [{"run": str(run_file)}]}))
    address = ray.get_runtime_context().gcs_address
    for command, file in (("run", run_file), ("batch", batch_file)):
        exit_code, found = imported_by(command, str(file), "--address", address)
        assert exit_code == 0
        assert found & COMPUTING == set(), command
        assert "ray" in found
    assert (tmp_path / "run" / "report.json").exists()
