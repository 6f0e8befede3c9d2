"""Packing is undone by unpacking, for every shape of blocks and dtype of scales; bad parts are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.checkpoint.codec import dequantise, quantise
from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.schemes import GLOBAL_DIVISOR, SCALES, WEIGHT, ZERO_POINTS, Scheme
from stages.contracts.errors import InputError
from stages.model.survey import survey
from tests.quantised import checkpoint
from tests.runs import read_config, read_tensors, rewrite

ROWS, COLUMNS = 40, 96
FP8 = {WEIGHT: torch.float8_e4m3fn, SCALES: torch.float32}
CASES: dict[str, tuple[Scheme, dict[str, torch.dtype], float]] = {
    "tensor": (Scheme("fp8", (ROWS, COLUMNS), 8), FP8, 2**-4),
    "rows": (Scheme("fp8", (1, COLUMNS), 8), FP8, 2**-4),
    "blocks": (Scheme("fp8", (24, 36), 8), FP8, 2**-4),
    "wide": (Scheme("fp8", (10**9, 10**9), 8), FP8, 2**-4),
    "e5m2": (Scheme("fp8", (16, 16), 8), {**FP8, WEIGHT: torch.float8_e5m2}, 2**-3),
    "half": (Scheme("fp8", (16, 16), 8), {**FP8, SCALES: torch.float16}, 2**-4),
    "exponents": (Scheme("fp8", (16, 16), 8, has_whole_exponents=True), {**FP8, SCALES: torch.float8_e8m0fnu}, 2**-4),
    **{
        f"int{bits}": (Scheme("int", (1, size), bits), {WEIGHT: torch.int32, SCALES: torch.float32}, 1.01 / (2**bits - 1))
        for bits, size in ((2, 32), (3, 96), (4, 96), (8, 32))
    },
    "narrowed rows": (Scheme("int", (1, 2 * COLUMNS), 4), {WEIGHT: torch.int32, SCALES: torch.float32}, 1.01 / 15),
    "narrowed bytes": (Scheme("int_bytes", (1, 2 * COLUMNS), 8), {WEIGHT: torch.int8, SCALES: torch.float32}, 1.01 / 255),
    "zeros": (
        Scheme("int", (1, 32), 4, is_symmetric=False),
        {WEIGHT: torch.int32, SCALES: torch.bfloat16, ZERO_POINTS: torch.int32},
        1.1 / 15,
    ),
    "bytes": (Scheme("int_bytes", (1, COLUMNS), 8), {WEIGHT: torch.int8, SCALES: torch.float32}, 1.01 / 255),
    "grouped bytes": (Scheme("int_bytes", (1, 32), 8), {WEIGHT: torch.int8, SCALES: torch.float32}, 1.01 / 255),
    "bytes with zeros": (
        Scheme("int_bytes", (1, 32), 8, is_symmetric=False),
        {WEIGHT: torch.int8, SCALES: torch.bfloat16, ZERO_POINTS: torch.int8},
        1.1 / 255,
    ),
    "mxfp4": (Scheme("mxfp4_rows", (1, 32), 4), {WEIGHT: torch.uint8, SCALES: torch.uint8}, 0.26),
    "nvfp4": (
        Scheme("nvfp4", (1, 16), 4),
        {WEIGHT: torch.uint8, SCALES: torch.float8_e4m3fn, GLOBAL_DIVISOR: torch.float32},
        0.18,
    ),
}  # fmt: skip
"""Scheme, dtypes of its parts, and the largest error relative to the largest value of the block: half a step of its numbers."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_what_is_packed_is_near_and_stays_when_packed_again(name: str, size: float) -> None:
    scheme, stored, bound = CASES[name]
    if name == "half" and size == 1e-6:
        pytest.skip("float16 has no such scales")
    values = size * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    values[:, 0] = 0
    members: list[dict[str, Tensor]] = [{GLOBAL_DIVISOR: torch.tensor([1e30])}]
    parts = quantise(scheme, values, members, stored)
    assert {part: tensor.dtype for part, tensor in parts.items()} == stored
    found = dequantise(scheme, parts)
    assert float((found - values).abs().max()) <= bound * float(values.abs().max())
    if scheme.name not in ("int", "int_bytes"):  # whole numbers have one more below zero than above
        again = dequantise(scheme, quantise(scheme, found, members, stored))
        torch.testing.assert_close(again, found, rtol=0.07 if name == "nvfp4" else 1e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_zeros_stay_zeros(name: str) -> None:
    scheme, stored, _ = CASES[name]
    parts = quantise(scheme, torch.zeros(ROWS, COLUMNS), [{GLOBAL_DIVISOR: torch.ones(1)}], stored)
    assert torch.equal(dequantise(scheme, parts), torch.zeros(ROWS, COLUMNS))


EXPERT = "model.layers.0.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("scheme", "tensors", "section", "named"),
    [
        ("int4", {"weight_scale": None}, {}, f"{EXPERT}.weight_scale is missing"),
        ("int4", {"weight_scale": torch.ones(32, 3)}, {}, "12 words a row|96 columns"),
        ("int4", {"weight_packed": None}, {}, f"{EXPERT}.weight_s.* holds scales"),
        ("int4", {"weight_packed": torch.ones(32, 8)}, {}, f"{EXPERT}.weight_packed is F32"),
        ("int4", {"weight_shape": torch.ones(3)}, {}, f"{EXPERT}.weight_shape is F32"),
        ("int4", {"weight_g_idx": torch.ones(64)}, {}, "weight_g_idx orders columns"),
        ("int4", {}, {"format": "marlin-24"}, "format marlin-24"),
        ("int4", {}, {"config_groups": None}, "config_groups is missing"),
        ("int4", {}, {"config_groups": {"a": {"targets": ["re:("], "weights": {}}}}, "names the pattern"),
        ("int4", {}, {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": "4"}}}}, "num_bits is '4'"),
        ("int8", {"weight_scale": torch.ones(32)}, {}, f"{EXPERT}.weight_scale is F32"),
        (
            "int8",
            {},
            {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "tensor"}}}},
            "channel",
        ),
        ("int8-groups", {"weight_zero_point": None}, {}, f"{EXPERT}.weight_zero_point is missing"),
        ("int8-groups", {"weight_zero_point": torch.ones(32, 2)}, {}, f"{EXPERT}.weight_zero_point is F32"),
        (
            "int8-groups",
            {},
            {
                "config_groups": {
                    "a": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "group", "group_size": 48}}
                }
            },
            "32 columns, which do not divide into groups of 48; use",
        ),
        ("mxfp4-rows", {"weight_scale": None}, {}, f"{EXPERT}.weight_scale is missing"),
        ("mxfp4-rows", {"weight_packed": torch.ones(32, 8)}, {}, f"{EXPERT}.weight_packed is F32"),
        ("nvfp4", {"weight_global_scale": None}, {}, f"{EXPERT}.weight_global_scale is missing"),
        ("nvfp4", {"weight_scale": torch.ones(32, 4)}, {}, f"{EXPERT}.weight_scale is F32"),
        ("modelopt", {"weight_scale_2": None}, {}, f"{EXPERT}.weight_scale_2 is missing"),
        ("modelopt", {}, {"quant_algo": "W4A8"}, "quant_algo is 'W4A8'"),
        ("fp8-tensor", {"weight_scale_inv": torch.ones(2, 2)}, {}, "weight_block_size"),
        ("gptq", {"qzeros": None}, {}, f"{EXPERT}.qzeros is missing"),
        ("gptq", {}, {"bits": 3}, "3 bits"),
        ("awq", {}, {"version": "gemv"}, "version 'gemv'"),
        ("awq", {}, {"group_size": 0}, "group_size is 0"),
        (
            "int4",
            {"weight_packed": None, "weight_scale": None, "weight_shape": None, "weight": torch.ones(32, 64).bfloat16()},
            {},
            "packed in another way than the same tensor of other experts",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    scheme: str, tensors: dict[str, Tensor | None], section: dict[str, Any], named: str, tmp_path: Path
) -> None:
    packed, _ = checkpoint(scheme, tmp_path)
    changed = {**read_tensors(packed), **{f"{EXPERT}.{name}": tensor for name, tensor in tensors.items()}}
    config = read_config(packed)
    config["quantization_config"] |= section
    rewrite(packed, {name: tensor for name, tensor in changed.items() if tensor is not None}, config)
    with pytest.raises(InputError, match=named):
        survey(Checkpoint(packed))
