"""Inner products of experts' weights by blocks of rows, against those of whole values in float64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.checkpoint import row_blocks
from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.reader import TensorReader
from stages.checkpoint.schemes import WEIGHT
from stages.contracts.tensors import TensorRow
from stages.model.survey import survey_checkpoint
from tests.quantised import SCHEMES, checkpoint, mxfp4_checkpoint
from tests.runs import read_tensors, rewrite
from tests.tiny import build, save

LAYER = 2


def of_experts(folder: Path) -> list[TensorRow]:
    """A layer's tensors of experts: of expert 0, or of all."""
    _, rows = survey_checkpoint(str(folder))
    return [
        row
        for row in rows
        if row.layer == LAYER
        and row.role in ("expert", "fused_expert")
        and row.part in ("", WEIGHT)
        and row.expert in (None, 0)
    ]


def due(rows: list[TensorRow], values: dict[str, Tensor], num_experts: int) -> Tensor:
    """All weights of each expert side by side, all at once."""
    named = [[row.values_template.format(e) if row.values_template else row.values for row in rows] for e in range(num_experts)]
    vectors = [
        torch.cat(
            [values[name].double()[e if row.expert_axis == 0 else ...].flatten() for name, row in zip(names, rows, strict=True)]
        )
        for e, names in enumerate(named)
    ]
    stacked_ER = torch.stack(vectors)
    return stacked_ER @ stacked_ER.T


@pytest.fixture(params=["whole matrices", "few rows"])
def _sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "few rows":
        monkeypatch.setattr(row_blocks, "_BLOCK_VALUES", 1)
        monkeypatch.setattr(row_blocks, "_PRODUCT_VALUES", 100)


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("scheme", [*SCHEMES, "mxfp4"])
def test_packed_experts_are_compared_by_their_values(scheme: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "moe_intermediate_size": 96}  # matrices of several blocks of 32 rows, in either direction
    packed, plain = mxfp4_checkpoint(tmp_path, 96) if scheme == "mxfp4" else checkpoint(scheme, tmp_path, **wide)
    rows, values = of_experts(packed), read_tensors(plain)
    gram_EE = row_blocks.weight_gram(Checkpoint(packed), rows, 8)
    torch.testing.assert_close(torch.from_numpy(gram_EE), due(rows, values, 8), rtol=1e-5, atol=1e-5 * float(gram_EE.max()))


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_plain_experts_and_their_biases_are_compared(family: str, tmp_path: Path) -> None:
    folder = save(build(family, torch.bfloat16), tmp_path / family)
    rows, values = of_experts(folder), read_tensors(folder)
    assert {row.role for row in rows} == {"fused_expert" if family == "gpt_oss" else "expert"}
    assert any(row.values.endswith("_bias") for row in rows) == (family == "gpt_oss")
    gram_EE = row_blocks.weight_gram(Checkpoint(folder), rows, 8)
    torch.testing.assert_close(torch.from_numpy(gram_EE), due(rows, values, 8), rtol=1e-12, atol=0)


def test_no_expert_is_in_memory_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "_BLOCK_VALUES", 1)
    packed, _ = checkpoint("fp8-block", tmp_path, hidden_size=128, moe_intermediate_size=96)
    found, rows = Checkpoint(packed), of_experts(packed)
    for row in rows:
        blocks = row_blocks._blocks([row_blocks._stored(found, row, expert) for expert in range(8)])
        rows_of_blocks = [block_ER.shape[1] // row.values_shape[1] for block_ER in blocks]
        assert rows_of_blocks == [32] * (row.values_shape[0] // 32) and len(rows_of_blocks) >= 3


def test_columns_in_any_order_keep_their_own_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ with `desc_act`: every column names its group."""
    monkeypatch.setattr(row_blocks, "_BLOCK_VALUES", 1)
    packed, _ = checkpoint("gptq", tmp_path, hidden_size=128, moe_intermediate_size=96)
    tensors = read_tensors(packed)
    drawn = torch.Generator().manual_seed(1)
    shuffled = {
        name: tensor[torch.randperm(len(tensor), generator=drawn)] if name.endswith("g_idx") else tensor
        for name, tensor in tensors.items()
    }
    rewrite(packed, shuffled)
    rows, found = of_experts(packed), Checkpoint(packed)
    with TensorReader(found) as reader:
        values = {name: reader.read(name) for name in found.tensors}
    gram_EE = row_blocks.weight_gram(found, rows, 8)
    torch.testing.assert_close(torch.from_numpy(gram_EE), due(rows, values, 8), rtol=1e-5, atol=1e-5 * float(gram_EE.max()))
