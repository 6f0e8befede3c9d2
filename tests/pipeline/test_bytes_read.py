"""What units say they have read of checkpoints: every byte of a layer shard or of a merged file's sources, once."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pipeline.commands.run import run
from pipeline.config import load_config
from pipeline.driver.outcome import Outcome
from pipeline.driver.run_state import RunOptions
from pipeline.executors.local import LocalExecutor
from stages.checkpoint.folder import Checkpoint
from stages.contracts.units import Unit
from tests.runs import FinishedRun, Recorder, write_run_file


class Reading(Recorder):
    """Adds up by stage what units without transient files to read have read."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()

    def done(self, unit: Unit, outcome: Outcome) -> None:
        super().done(unit, outcome)
        if not unit.reads:
            self.num_bytes[unit.stage] += outcome.bytes_read


def test_each_byte_of_a_checkpoint_is_counted_once(tmp_path: Path, finished_run: Callable[[str], FinishedRun]) -> None:
    done = finished_run("mixtral")
    settings = {"resources.layers_per_shard": 3}  # all of them: no hidden states are handed on
    path = write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), settings)
    recorder = Reading()
    run(load_config(path, []), LocalExecutor, recorder, RunOptions())
    source = Checkpoint(done.source).total_bytes
    head = Checkpoint(done.source).tensors["lm_head.weight"].num_bytes
    targets = [Checkpoint(folder).total_bytes for folder in sorted((tmp_path / "run" / "models").iterdir())]
    assert len(targets) == 2
    assert recorder.num_bytes["calibrate"] == source - head
    assert recorder.num_bytes["merge"] == len(targets) * source
    assert recorder.num_bytes["evaluate"] == source + sum(targets)
