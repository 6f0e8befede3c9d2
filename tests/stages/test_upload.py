"""Weights that go to a device by way of blocks in host memory, on a device that copies as late as it may."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.checkpoint.folder import Checkpoint
from stages.model import direct_load, upload
from stages.model.layer_shard import LayerShard
from stages.model.upload import Upload


class LateCopies:
    """Copies that are made when they are waited for, and not before: what was overwritten meanwhile arrives wrong."""

    def __init__(self) -> None:
        self.num_blocks, self.num_copies = 0, 0

    def block(self) -> Tensor:
        self.num_blocks += 1
        return torch.empty(upload.BLOCK_BYTES, dtype=torch.uint8)

    def start(self, to: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        return to, source

    def wait(self, started: tuple[Tensor, Tensor]) -> None:
        self.num_copies += 1
        started[0].copy_(started[1])


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_every_weight_arrives(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family))
    due = LayerShard(checkpoint, 0, 3, num_threads=1).model.state_dict()
    copies = LateCopies()
    monkeypatch.setattr(upload, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(direct_load, "uploads", lambda device: Upload(copies))
    ours = LayerShard(checkpoint, 0, 3, num_threads=1).model.state_dict()
    assert copies.num_blocks == upload.NUM_BLOCKS
    assert copies.num_copies > checkpoint.total_bytes // 1000
    assert all(torch.equal(ours[name], tensor) for name, tensor in due.items())
