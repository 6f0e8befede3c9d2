"""Quantised sources are read as values, by transformers' arithmetic, and written as plain numbers; bytes are never averaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from stages.checkpoint.codec import dequantise_fp8, dequantise_mxfp4
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.model.survey import survey
from tests.quantised import fp4_pairs, mxfp4_checkpoint
from tests.runs import read_config, read_tensors, rewrite, run_all, streamed_logits, token_ids
from tests.tiny import build, load, logits, save

FP8_BLOCK = (16, 20)  # the last block of a matrix is smaller


def quantise_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = (-(-size // block) for size, block in zip(values.shape, FP8_BLOCK, strict=True))
    scales = torch.empty(rows, columns)
    numbers = torch.empty_like(values, dtype=torch.float32)
    for i in range(rows):
        for j in range(columns):
            area = (slice(i * 16, (i + 1) * 16), slice(j * 20, (j + 1) * 20))
            scales[i, j] = values[area].abs().max().float() / 400
            numbers[area] = values[area].float() / scales[i, j]
    return numbers.to(torch.float8_e4m3fn), scales


def fp8_checkpoint(folder: Path) -> tuple[Path, Path]:
    """A DeepSeek-V3 in FP8, and the same values in float32, both to be computed in bfloat16."""
    plain = save(build("deepseek_v3", torch.bfloat16), folder / "plain")
    config = {**read_config(plain), "dtype": "bfloat16"}
    packed, values = {}, {}
    for name, tensor in read_tensors(plain).items():
        if tensor.ndim == 2 and ".layers." in name and "gate.weight" not in name:
            numbers, scales = quantise_fp8(tensor)
            packed |= {name: numbers, f"{name}_scale_inv": scales}
            values[name] = dequantise_fp8(numbers, scales, FP8_BLOCK)
        else:
            packed[name] = values[name] = tensor
    section = {"quant_method": "fp8", "weight_block_size": list(FP8_BLOCK), "activation_scheme": "dynamic", "fmt": "e4m3"}
    save(build("deepseek_v3", torch.bfloat16), folder / "quantised")
    rewrite(folder / "quantised", packed, {**config, "quantization_config": section})
    return folder / "quantised", rewrite(plain, values, config)


CHECKPOINTS = {"fp8": fp8_checkpoint, "mxfp4": mxfp4_checkpoint}


def test_fp8_arithmetic_is_that_of_transformers() -> None:
    numbers = torch.randn(2, 32, 48).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, 3)
    theirs = [Fp8Dequantize(None)._dequantize_one(numbers[i], scales[i], torch.float32) for i in range(2)]
    assert torch.equal(dequantise_fp8(numbers, scales, (16, 16)), torch.stack(theirs))


def test_a_block_wider_than_the_tensor_takes_no_more_memory_than_the_tensor() -> None:
    numbers, scales = torch.randn(32, 48).to(torch.float8_e4m3fn), torch.rand(2, 1)
    assert torch.equal(dequantise_fp8(numbers, scales, (16, 10**12)), dequantise_fp8(numbers, scales, (16, 48)))
    assert torch.equal(dequantise_fp8(numbers, scales[:1], (10**12, 10**12)), numbers.float() * scales[0])


def test_mxfp4_arithmetic_is_that_of_transformers_and_of_the_format() -> None:
    blocks = torch.randint(0, 256, (2, 3, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 3, 2), dtype=torch.uint8)
    values = dequantise_mxfp4(blocks, scales)
    assert torch.equal(values.bfloat16(), convert_moe_packed_tensors(blocks, scales))
    expected = fp4_pairs(blocks) * torch.exp2(scales.float() - 127)[..., None]
    assert torch.equal(values, expected.flatten(-2).transpose(1, 2))


@pytest.mark.parametrize("scheme", CHECKPOINTS)
def test_a_quantised_source_gives_what_its_values_give(scheme: str, tmp_path: Path) -> None:
    quantised, plain = CHECKPOINTS[scheme](tmp_path)
    path, ids = token_ids(tmp_path)
    streamed = [streamed_logits(Checkpoint(folder), 3, ids) for folder in (quantised, plain)]
    assert torch.equal(*streamed)
    changes: dict[str, Any] = {"export": {"dtype": "float32"}}
    reference = run_all(plain, tmp_path / "run-plain", path, [8, 4], ["stock", "tied"])
    exact = run_all(quantised, tmp_path / "run-exact", path, [4], ["stock"], **changes)
    found = run_all(quantised, tmp_path / "run", path, [8, 4], ["stock", "tied"], export={"dtype": "bfloat16"})
    for target, folder in found.items():
        due = read_tensors(reference[target])
        tensors = read_tensors(folder)
        assert set(tensors) == set(due)
        assert {tensor.dtype for tensor in tensors.values()} <= {torch.bfloat16, torch.int64, torch.float32}
        for name, tensor in tensors.items():
            assert torch.equal(tensor, due[name].to(tensor.dtype)), name
        config = read_config(folder)
        assert "quantization_config" not in config and config["dtype"] == "bfloat16"
        assert torch.isfinite(logits(load(folder, trust_remote_code=True), ids)).all()
    due = read_tensors(reference["4e-stock"])
    assert all(torch.equal(tensor, due[name]) for name, tensor in read_tensors(exact["4e-stock"]).items())
    assert read_config(exact["4e-stock"])["dtype"] == "float32"


def edited(folder: Path, tensors: dict[str, Tensor | None], **config: Any) -> Path:
    kept = {name: tensor for name, tensor in {**read_tensors(folder), **tensors}.items() if tensor is not None}
    text = {key: value for key, value in {**read_config(folder), **config}.items() if value is not None}
    return rewrite(folder, kept, text)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"


@pytest.mark.parametrize(
    ("scheme", "tensors", "config", "named"),
    [
        ("fp8", {f"{EXPERT}_scale_inv": None}, {}, EXPERT),
        ("fp8", {f"{EXPERT}_scale_inv": torch.ones(1, 1)}, {}, f"{EXPERT}_scale_inv"),
        ("fp8", {EXPERT: torch.ones(24, 32, dtype=torch.bfloat16)}, {}, f"{EXPERT}_scale_inv"),
        ("fp8", {}, {"quantization_config": None}, "quantised but config.json has no quantization_config"),
        ("fp8", {}, {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        ("fp8", {}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
        *(
            (
                "fp8",
                {},
                {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}},
                f"weight_block_size is {block}",
            )
            for block in ([0, 20], [16, -20], [True, 20], [16.0, 20], [16], 16)
        ),
        (
            "fp8",
            {},
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [10**9, 1]}},
            "blocks of 1000000000 x 1",
        ),
        ("fp8", {f"{EXPERT}_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, {}, f"{EXPERT}_scale_inv is I32"),
        ("mxfp4", {BLOCKS: torch.ones(8, 32, 0, 16, dtype=torch.uint8)}, {}, BLOCKS),
        (
            "mxfp4",
            {
                BLOCKS: torch.ones(8, 32, 0, 16, dtype=torch.uint8),
                BLOCKS.replace("_blocks", "_scales"): torch.ones(8, 32, 0, dtype=torch.uint8),
            },
            {},
            "down_proj",
        ),
        ("mxfp4", {BLOCKS: torch.ones(8, 32, 1, 0, dtype=torch.uint8)}, {}, BLOCKS),
        ("mxfp4", {BLOCKS.replace("_blocks", "_scales"): None}, {}, BLOCKS),
        ("mxfp4", {BLOCKS: None}, {}, BLOCKS.replace("_blocks", "_scales")),
        ("mxfp4", {}, {"quantization_config": None}, "_blocks"),
    ],
)
def test_packed_bytes_are_never_taken_for_numbers(
    scheme: str, tensors: dict[str, Tensor | None], config: dict[str, Any], named: str, tmp_path: Path
) -> None:
    quantised, _ = CHECKPOINTS[scheme](tmp_path)
    edited(quantised, tensors, **config)
    with pytest.raises(InputError) as caught:
        survey(Checkpoint(quantised))
    assert named in str(caught.value)


def test_integers_in_place_of_experts_are_refused(tmp_path: Path) -> None:
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    edited(source, {name: torch.ones(48, 32, dtype=torch.uint8)})
    with pytest.raises(InputError, match=r"model\.safetensors: tensor .*experts\.2\.w1\.weight is U8"):
        survey(Checkpoint(source))
    assert json.loads((source / "config.json").read_text())["model_type"] == "mixtral"
