"""A token shard through a layer shard: several streams at once are what each is alone."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.calibrate.units import CalibrationShard
from stages.calibrate.watcher import Watcher
from stages.checkpoint.folder import Checkpoint
from stages.model.families import Family
from stages.model.layer_shard import LayerShard
from stages.model.stream import Stream, pass_through, replaced_forward
from tests.stages.test_mapped import opened
from tests.tiny import FAMILIES, random_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_two_streams_through_one_layer_shard_are_two_runs(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The source is watched; the student's experts are replaced in one layer."""
    folder = tiny_checkpoint(family)
    shard = LayerShard(Checkpoint(folder), 0, 3, num_threads=1)
    held = CalibrationShard(shard, opened(folder).routers, Family())
    ids = torch.from_numpy(random_ids())
    replaced = FAMILIES[family].moe_layers[0]
    experts = held.shard.adapted.experts_modules()[replaced]

    def replace(layer: int) -> AbstractContextManager[Any]:
        return replaced_forward(experts, lambda hidden_TD, *_: hidden_TD / 2) if layer == replaced else nullcontext()

    def streams(folder: Path, found: dict[str, list[torch.Tensor]], watched: dict[int, Watcher]) -> dict[str, Stream]:
        def see(name: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
            return lambda logits_BTV, _: found.setdefault(name, []).append(logits_BTV)

        return {
            "source": Stream(None, folder / "source", lambda layer: held.watch(layer, watched), see("source")),
            "student": Stream(None, folder / "student", replace, see("student")),
        }

    def run(folder: Path, names: list[str]) -> tuple[Mapping[str, torch.Tensor], dict[int, Watcher]]:
        found: dict[str, list[torch.Tensor]] = {}
        watched: dict[int, Watcher] = {}
        chosen = {name: stream for name, stream in streams(folder, found, watched).items() if name in names}
        passed = pass_through(held.shard, ids, 2, chosen)
        assert [file.path for file in passed.files] == [folder / name for name in names]
        return {name: torch.cat(parts) for name, parts in found.items()}, watched

    together, watched = run(tmp_path / "together", ["source", "student"])
    alone_source, watched_alone = run(tmp_path / "source", ["source"])
    alone_student, _ = run(tmp_path / "student", ["student"])
    assert torch.equal(together["source"], alone_source["source"])
    assert torch.equal(together["student"], alone_student["student"])
    assert not torch.equal(together["source"], together["student"])
    for name in ("source", "student"):
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / name / name).read_bytes()
    assert watched.keys() == watched_alone.keys() == set(FAMILIES[family].moe_layers)
    for layer, one in watched.items():
        for collector, sums in watched_alone[layer].result().sums.items():
            for key, values in sums.items():
                np.testing.assert_array_equal(one.result().sums[collector][key], values)


def test_a_forward_is_restored_when_the_layer_fails() -> None:
    module = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="stop"), replaced_forward(module, torch.zeros_like):
        assert module(torch.ones(2)).tolist() == [0, 0]
        raise RuntimeError("stop")
    assert module(torch.ones(2)).tolist() == [1, 1]
