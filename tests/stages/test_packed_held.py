"""A worker holds the experts of a quantised model packed, and unpacks one at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.checkpoint import codec
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.model.layer_shard import LayerShard
from stages.model.stream import replaced_forward
from stages.model.survey import survey_checkpoint
from tests.quantised import SCHEMES, checkpoint, mxfp4_checkpoint
from tests.runs import read_config, read_tensors, rewrite, run_all, streamed_logits, token_ids


def made(scheme: str, folder: Path) -> tuple[Path, Path]:
    return mxfp4_checkpoint(folder) if scheme == "mxfp4" else checkpoint(scheme, folder)


@pytest.mark.parametrize("scheme", [*SCHEMES, "mxfp4"])
def test_experts_stay_packed_and_one_at_a_time_is_unpacked(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = made(scheme, tmp_path)
    _, ids = token_ids(tmp_path)
    shards = [LayerShard(Checkpoint(one), 0, 3, num_threads=1) for one in (folder, plain)]
    ours, theirs = (shard.expert_weights(2) for shard in shards)
    assert ours.experts.down_proj.is_meta and not theirs.experts.down_proj.is_meta
    for name in (ours.layout.first, "down_proj"):
        stack = shards[0].packed[f"model.layers.2.mlp.experts.{name}"]
        for expert in range(8):
            assert torch.equal(stack[expert], getattr(theirs.experts, name)[expert].to(stack.dtype))
    pieces = [piece for stack in shards[0].packed.values() for rows in stack.experts for piece in rows]
    stored = sum(part.nbytes for piece in pieces for part in piece._parts.values())
    survey, rows = survey_checkpoint(str(folder))
    assert stored == sum(row.num_bytes for row in rows if row.role in ("expert", "fused_expert") and row.part)
    saved = sum(survey.layer_bytes) - sum(survey.layer_held_bytes)
    assert saved == 2 * sum(stack.shape.numel() for stack in shards[0].packed.values()) - stored
    most: list[int] = []

    def watched(*args: Any) -> Tensor:
        most.append(1 + sum(piece._values is not None for piece in pieces))
        return dequantise(*args)

    dequantise = codec.dequantise
    monkeypatch.setattr(codec, "dequantise", watched)
    hidden = [shard.embed(ids) for shard in shards]
    for layer in range(3):
        hidden = [shard.run_layer(layer, one) for shard, one in zip(shards, hidden, strict=True)]
    assert torch.equal(*(shard.logits(one) for shard, one in zip(shards, hidden, strict=True)))
    assert max(most) <= (1 if scheme == "mxfp4" else 2), "gate and up of one expert"
    assert all(piece._values is None for piece in pieces)
    shards[0].close()
    assert not shards[0].packed and "forward" not in ours.experts.__dict__


def test_a_forward_that_was_replaced_comes_back(tmp_path: Path) -> None:
    folder, _ = checkpoint("int4", tmp_path)
    _, ids = token_ids(tmp_path)
    shard = LayerShard(Checkpoint(folder), 0, 1, num_threads=1)
    due = shard.run_layer(0, shard.embed(ids))
    with replaced_forward(shard.expert_weights(0).experts, lambda hidden, *routed: torch.zeros_like(hidden)):
        assert not torch.equal(shard.run_layer(0, shard.embed(ids)), due)
    assert torch.equal(shard.run_layer(0, shard.embed(ids)), due)


@pytest.mark.parametrize("scheme", ["fp8-block", "mxfp4"])
@pytest.mark.parametrize("neurons", ["keep", "choose"])
def test_a_refit_of_packed_experts_is_that_of_their_values(scheme: str, neurons: str, tmp_path: Path) -> None:
    folder, plain = made(scheme, tmp_path)
    path, ids = token_ids(tmp_path)
    changes: dict[str, Any] = {"refit": {"mode": "sequential", "neurons": neurons}}
    ours, due = (
        run_all(one, tmp_path / f"run-{one.name}", path, [4], ["stock"], export={"dtype": "float32"}, **changes)["4e-stock"]
        for one in (folder, plain)
    )
    found = read_tensors(ours)
    assert all(torch.equal(tensor, found[name].to(tensor.dtype)) for name, tensor in read_tensors(due).items())
    anew = run_all(folder, tmp_path / "run-source", path, [4], ["stock"], **changes)["4e-stock"]
    assert "quantization_config" in read_config(anew)
    (near, exact) = (streamed_logits(Checkpoint(one), 3, ids).float() for one in (anew, ours))
    assert float((near - exact).norm() / exact.norm()) < 0.5


@pytest.mark.parametrize(
    ("scheme", "part"), [("fp8-block", "weight_scale_inv"), ("fp8-tensor", "weight"), ("int4", "weight_scale")]
)
def test_packed_numbers_that_are_not_finite_are_refused_by_name(scheme: str, part: str, tmp_path: Path) -> None:
    folder, _ = checkpoint(scheme, tmp_path)
    tensors = read_tensors(folder)
    name = f"model.layers.0.mlp.experts.3.up_proj.{part}"
    tensors[name].view(-1)[0] = float("nan")
    rewrite(folder, tensors)
    with pytest.raises(InputError, match=r"model\.safetensors: tensor .*experts\.3\.up_proj\.weight.* holds NaN or infinity"):
        LayerShard(Checkpoint(folder), 0, 1, num_threads=1)
