"""Weights read straight into the model's tensors are those that transformers' own conversion makes, read once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.model import direct_load
from stages.model.adapter import AdaptedModel
from stages.model.direct_load import load_directly
from stages.model.layer_shard import LayerShard
from tests.tiny import FAMILIES, load, save_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_the_one_that_transformers_loads(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    folder = save_checkpoint(tmp_path / "model", family, dtype)
    checkpoint = Checkpoint(folder)
    whole = load(folder).state_dict()
    shard = LayerShard(checkpoint, 0, len(AdaptedModel(checkpoint).layers), num_threads=1)
    ours = shard.model.state_dict()
    assert set(ours) == set(whole)
    assert all(torch.equal(ours[name], whole[name]) and ours[name].dtype == whole[name].dtype for name in whole)


def count_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all reads into memory from now on."""
    sizes: list[int] = []
    read = direct_load.read_into

    def counting(path: Path, begin: int, view: memoryview) -> None:
        sizes.append(view.nbytes)
        read(path, begin, view)

    monkeypatch.setattr(direct_load, "read_into", counting)
    return sizes


def test_every_byte_is_read_once(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("mixtral"))
    sizes = count_bytes(monkeypatch)
    num_layers = len(AdaptedModel(checkpoint).layers)
    LayerShard(checkpoint, 0, num_layers, num_threads=1)
    assert sum(sizes) == checkpoint.total_bytes


def test_what_is_cast_is_left_to_transformers(tmp_path: Path) -> None:
    """A checkpoint in float32 whose config says bfloat16."""
    folder = save_checkpoint(tmp_path / "model", "mixtral")
    config = (folder / "config.json").read_text()
    assert '"dtype": "float32"' in config
    (folder / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    adapted = AdaptedModel(Checkpoint(folder))
    names = [name for name, to in adapted.destinations.items() if to.parameter]
    assert load_directly(adapted, names, torch.device("cpu")) == (names, {})
    shard = LayerShard(Checkpoint(folder), 0, len(adapted.layers), num_threads=1)
    whole = load(folder).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in shard.model.state_dict().items())


def test_a_file_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_checkpoint(tmp_path / "model", "mixtral"))
    last = max(checkpoint.tensors.values(), key=lambda entry: (entry.file, entry.begin))
    with open(checkpoint.folder / last.file, "r+b") as raw:
        raw.truncate(last.begin + last.num_bytes - 1)
    with pytest.raises(InputError, match=rf"tensor {last.name}: .* ends at byte .*changed during the run"):
        LayerShard(checkpoint, 0, len(AdaptedModel(checkpoint).layers), num_threads=1)
