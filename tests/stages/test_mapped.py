"""Experts' matrices that stay in their files: the same statistics, no memory of ours, the same errors."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stages.calibrate.collectors.registry import DEFAULT
from stages.calibrate.spec import CalibrationShardArgs
from stages.calibrate.sums import evidence_of
from stages.calibrate.units import CalibrationShard, open_shard
from stages.calibrate.watcher import Watcher
from stages.calibrate.weight_products import WeightProducts
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.contracts.evidence import LayerEvidence
from stages.model import direct_load
from stages.model.experts_forward import Blocks
from stages.model.layer_shard import LayerShard
from stages.model.stream import Stream, pass_through
from stages.model.survey import survey_checkpoint
from tests.conftest import REPOSITORY
from tests.tiny import FAMILIES, build, random_ids, save, save_checkpoint

MAPS = Path("/proc/self/maps")


def opened(folder: Path) -> CalibrationShard:
    survey, _ = survey_checkpoint(str(folder))
    return open_shard(CalibrationShardArgs(str(folder), 0, survey.num_layers, 1, survey.routers))


def calibrated(held: CalibrationShard, ids: torch.Tensor) -> tuple[dict[int, Watcher], torch.Tensor]:
    watched: dict[int, Watcher] = {}
    stream = Stream(around=lambda layer: held.watch(layer, watched))
    return watched, torch.cat(pass_through(held.shard, ids, 2, {"model": stream}).hidden["model"])


def finished(watcher: Watcher) -> LayerEvidence:
    return evidence_of(watcher.result(), DEFAULT, WeightProducts(watcher.weights), is_sampled=False)


def num_mapped(folder: Path) -> int:
    return MAPS.read_text().count(f"{folder}/")


@pytest.fixture
def map_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_load, "MAPPED_BYTES", 0)


@pytest.mark.parametrize("family", [*FAMILIES, "granitemoe", "gpt_oss", "llama4_text"])
def test_statistics_and_hidden_states_are_those_of_loaded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    folder = save(build(family, torch.float32), tmp_path / "model")
    ids = torch.from_numpy(random_ids())
    loaded_held = opened(folder)
    loaded, loaded_hidden = calibrated(loaded_held, ids)
    monkeypatch.setattr(direct_load, "MAPPED_BYTES", 0)
    held = opened(folder)
    with FlopCounterMode(display=False) as counter:
        mapped, hidden = calibrated(held, ids)
    assert counter.get_total_flops() > 0
    torch.testing.assert_close(hidden, loaded_hidden)
    assert set(mapped) == set(loaded)
    for layer, one in mapped.items():
        assert one.weights.experts.down_proj.is_meta
        ours, theirs = finished(one), finished(loaded[layer])
        assert ours.num_tokens == theirs.num_tokens
        for name, values in theirs.columns.items():
            np.testing.assert_allclose(ours[name], values, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.usefixtures("map_all")
def test_a_closed_shard_has_no_file_mapped(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", "mixtral")
    held = opened(folder)
    assert num_mapped(folder) > 1
    held.close()
    assert num_mapped(folder) == 0


def test_small_experts_are_loaded(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", "mixtral")
    assert not opened(folder).shard.expert_weights(0).experts.down_proj.is_meta
    assert num_mapped(folder) == 0


_PEAK = """
import sys
import torch
from pathlib import Path
from stages.model import direct_load
from tests.stages.test_mapped import calibrated, finished, opened
from tests.tiny import random_ids
direct_load.MAPPED_BYTES = int(sys.argv[2])
held = opened(Path(sys.argv[1]))
watched, _ = calibrated(held, torch.from_numpy(random_ids()))
finished(watched[0])
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def peak_bytes(folder: Path, mapped_bytes: int) -> int:
    """Most memory that a new process had resident at once, mapped files included, while tokens went through a model."""
    command = [sys.executable, "-c", _PEAK, str(folder), str(mapped_bytes)]
    done = subprocess.run(command, check=True, timeout=300, cwd=REPOSITORY, capture_output=True, text=True)
    return 1024 * int(done.stdout)


def test_mapped_experts_take_no_memory(tmp_path: Path) -> None:
    """Loaded experts are all resident; of mapped ones, at any moment what is being multiplied."""
    sizes = {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 1, "num_local_experts": 8}
    folder = save(build("mixtral", torch.float32, **sizes), tmp_path / "model")
    expert_bytes = 3 * 512 * 8192 * 4
    saved = peak_bytes(folder, 1 << 40) - peak_bytes(folder, 0)
    assert saved > 0.75 * 8 * expert_bytes


@pytest.mark.usefixtures("map_all")
def test_a_file_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_checkpoint(tmp_path / "model", "mixtral"))
    ends = {entry.file: entry for entry in sorted(checkpoint.tensors.values(), key=lambda entry: entry.begin)}
    last = next(entry for entry in ends.values() if ".experts." in entry.name)
    with open(checkpoint.folder / last.file, "r+b") as raw:
        raw.truncate(last.begin + last.num_bytes - 1)
    with pytest.raises(InputError, match=rf"tensor {last.name}: ends at byte .*changed during the run"):
        LayerShard(checkpoint, 0, 3, num_threads=1, maps_experts=True)


@pytest.mark.usefixtures("map_all")
def test_nan_is_named_with_its_tensor(tmp_path: Path) -> None:
    model = build("mixtral", torch.bfloat16)
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("nan")
    folder = save(model, tmp_path / "model")
    with pytest.raises(InputError, match=r"tensor model\.layers\.1\..*experts\.2\.w2\.weight holds NaN"):
        opened(folder)


def test_the_cut_of_mapped_experts_is_one_at_a_time(tiny_checkpoint: Callable[[str], Path], map_all: None) -> None:
    held = opened(tiny_checkpoint("mixtral"))
    assert Blocks.of(held.shard.expert_weights(0)).num_experts == 1


@pytest.mark.usefixtures("map_all")
def test_where_a_file_cannot_be_mapped_it_is_loaded(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr("stages.model.mapped.mmap.mmap", refuse)
    assert not opened(tiny_checkpoint("mixtral")).shard.expert_weights(0).experts.down_proj.is_meta


@pytest.mark.usefixtures("map_all")
def test_numbers_that_are_not_aligned_are_loaded(tmp_path: Path) -> None:
    """A header may be of any length."""
    folder = save_checkpoint(tmp_path / "model", "mixtral")
    due = LayerShard(Checkpoint(folder), 0, 3, num_threads=1).model.state_dict()
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        path.write_bytes((size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :])
    shard = LayerShard(Checkpoint(folder), 0, 3, num_threads=1, maps_experts=True)
    assert all(torch.equal(tensor, due[name]) for name, tensor in shard.model.state_dict().items())
