"""Tiny checkpoints in every scheme, with random packed numbers, and their values by formulas written out here.

Nothing is taken from `stages`: these are the reference of its arithmetic. Dimensions: R rows, C columns, G groups of columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.runs import read_config, read_tensors, rewrite
from tests.tiny import build, save

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
FP8_BLOCK, RAGGED_BLOCK = (16, 32), (24, 20)
"""Sizes of the tiny matrices are no multiples of the second, so that the last block of a row or column is smaller."""
INT_GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column, within eight, of each four bits of a word from the lowest on (AutoAWQ, gemm)."""
IGNORED = ["lm_head", "re:.*mlp.gate$", "re:.*layers.1.mlp.*", "model.embed_tokens"]


def fp4_pairs(packed: Tensor) -> Tensor:
    """Numbers of bytes that hold two each, the lower four bits first."""
    return torch.stack([FP4[(packed & 15).long()], FP4[(packed >> 4).long()]], -1).flatten(-2)


def fields(words: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of int32 words along the last axis, the lowest bits first."""
    unsigned = words.long() & 0xFFFFFFFF
    return torch.stack([(unsigned >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)], -1).flatten(-2)


@dataclass(frozen=True)
class Drawn:
    """A packed matrix: its parts by what follows the module's name, and its values float32 [R, C]."""

    parts: dict[str, Tensor]
    values: Tensor


def _bytes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _words(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator, dtype=torch.int64).int()


def _uniform(generator: torch.Generator, *shape: int, least: float = 0.5, most: float = 2.0) -> Tensor:
    return least + (most - least) * torch.rand(shape, generator=generator)


def _fp8_numbers(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return (60 * torch.randn(rows, columns, generator=generator)).to(torch.float8_e4m3fn)


def _fp8_blocks(generator: torch.Generator, rows: int, columns: int, block: tuple[int, int]) -> Drawn:
    numbers = _fp8_numbers(generator, rows, columns)
    scales = _uniform(generator, -(-rows // block[0]), -(-columns // block[1])) / 1000
    whole = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    return Drawn({"weight": numbers, "weight_scale_inv": scales}, numbers.float() * whole)


def fp8_block(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    return _fp8_blocks(generator, rows, columns, FP8_BLOCK)


def fp8_ragged(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    return _fp8_blocks(generator, rows, columns, RAGGED_BLOCK)


def fp8_tensor(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    numbers, scale = _fp8_numbers(generator, rows, columns), _uniform(generator)[()] / 1000
    static = {"activation_scale": _uniform(generator)[()]}
    return Drawn({"weight": numbers, "weight_scale_inv": scale, **static}, numbers.float() * scale)


def fp8_channel(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    numbers, scales = _fp8_numbers(generator, rows, columns), (_uniform(generator, rows, 1) / 1000).bfloat16()
    return Drawn({"weight": numbers, "weight_scale": scales}, numbers.float() * scales.float())


def int4(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    words = _words(generator, rows, columns // 8)
    scales = (_uniform(generator, rows, columns // INT_GROUP) / 60).bfloat16()
    values = (fields(words, 4) - 8) * scales.float().repeat_interleave(INT_GROUP, 1)
    return Drawn({"weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor([rows, columns])}, values)


def int4_zeros(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    drawn = int4(generator, rows, columns)
    zeros = _words(generator, rows // 8, columns // INT_GROUP)
    zeros_RG = fields(zeros.T, 4).T
    numbers = fields(drawn.parts["weight_packed"], 4) - zeros_RG.repeat_interleave(INT_GROUP, 1)
    values = numbers * drawn.parts["weight_scale"].float().repeat_interleave(INT_GROUP, 1)
    return Drawn({**drawn.parts, "weight_zero_point": zeros}, values)


def int8_rows(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    numbers = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales = (_uniform(generator, rows, 1) / 1000).bfloat16()
    return Drawn({"weight": numbers, "weight_scale": scales}, numbers * scales.float())


def int8_groups(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    drawn = int8_rows(generator, rows, columns)
    scales = (_uniform(generator, rows, columns // INT_GROUP) / 1000).bfloat16()
    zeros = torch.randint(-128, 128, scales.shape, generator=generator, dtype=torch.int8)
    numbers = drawn.parts["weight"].float() - zeros.float().repeat_interleave(INT_GROUP, 1)
    parts = {"weight": drawn.parts["weight"], "weight_scale": scales, "weight_zero_point": zeros}
    return Drawn(parts, numbers * scales.float().repeat_interleave(INT_GROUP, 1))


def mxfp4_rows(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    packed = _bytes(generator, rows, columns // 2)
    exponents = torch.randint(120, 124, (rows, columns // 32), generator=generator, dtype=torch.uint8)
    values = fp4_pairs(packed) * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    return Drawn({"weight_packed": packed, "weight_scale": exponents}, values)


def nvfp4(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    packed = _bytes(generator, rows, columns // 2)
    scales = _uniform(generator, rows, columns // 16, least=40, most=400).to(torch.float8_e4m3fn)
    divisor = torch.tensor([8192.0])
    values = fp4_pairs(packed) * (scales.float() / divisor).repeat_interleave(16, 1)
    inputs = {"input_global_scale": _uniform(generator, 1)}
    return Drawn({"weight_packed": packed, "weight_scale": scales, "weight_global_scale": divisor, **inputs}, values)


def modelopt(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    drawn = nvfp4(generator, rows, columns)
    parts = {"weight": drawn.parts["weight_packed"], "weight_scale": drawn.parts["weight_scale"]}
    scales = {"weight_scale_2": torch.tensor(1 / 8192.0), "input_scale": _uniform(generator)[()]}
    return Drawn({**parts, **scales}, drawn.values)


def modelopt_fp8(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    numbers, scale = _fp8_numbers(generator, rows, columns), _uniform(generator)[()] / 1000
    return Drawn({"weight": numbers, "weight_scale": scale, "input_scale": _uniform(generator)[()]}, numbers.float() * scale)


def gptq(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    words, zeros = _words(generator, columns // 8, rows), _words(generator, columns // INT_GROUP, rows // 8)
    scales = (_uniform(generator, columns // INT_GROUP, rows) / 60).half()
    groups = torch.arange(columns) // INT_GROUP
    numbers_RC = fields(words.T, 4)
    values = (numbers_RC - (fields(zeros, 4) + 1).T[:, groups]) * scales.float().T[:, groups]
    return Drawn({"qweight": words, "qzeros": zeros, "scales": scales, "g_idx": groups.int()}, values)


def awq(generator: torch.Generator, rows: int, columns: int) -> Drawn:
    words, zeros = _words(generator, columns, rows // 8), _words(generator, columns // INT_GROUP, rows // 8)
    scales = (_uniform(generator, columns // INT_GROUP, rows) / 60).half()

    def ordered(packed: Tensor) -> Tensor:
        found = fields(packed, 4).unflatten(-1, (-1, 8))
        out = torch.empty_like(found)
        for place, column in enumerate(AWQ_ORDER):
            out[..., column] = found[..., place]
        return out.flatten(-2)

    groups = torch.arange(columns) // INT_GROUP
    values = (ordered(words) - ordered(zeros)[groups]) * scales.float()[groups]
    return Drawn({"qweight": words, "qzeros": zeros, "scales": scales}, values.T.contiguous())


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    arguments = {"symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": IGNORED,
        "config_groups": {"group_0": group},
    }  # fmt: skip


_FITTED = {"bits": 4, "group_size": INT_GROUP}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": INT_GROUP}
_FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}

SCHEMES: dict[str, tuple[Callable[[torch.Generator, int, int], Drawn], dict[str, Any]]] = {
    "fp8-block": (
        fp8_block,
        {
            "quant_method": "fp8", "weight_block_size": list(FP8_BLOCK), "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head", "gate", "model.layers.1.mlp"],
        },
    ),
    "fp8-ragged": (fp8_ragged, {"quant_method": "fp8", "weight_block_size": list(RAGGED_BLOCK)}),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}),
    "fp8-channel": (fp8_channel, _compressed("float-quantized", num_bits=8, type="float", strategy="channel")),
    "int4": (int4, _compressed("pack-quantized", **_INT4)),
    "int4-zeros": (int4_zeros, _compressed("pack-quantized", **{**_INT4, "symmetric": False})),
    "nvfp4": (nvfp4, _compressed("nvfp4-pack-quantized", **_FP4)),
    "modelopt": (modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*mlp.gate"]}),
    "modelopt-fp8": (modelopt_fp8, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*mlp.gate"]}),
    "int8": (int8_rows, _compressed("int-quantized", num_bits=8, type="int", strategy="channel")),
    "int8-groups": (int8_groups, _compressed("int-quantized", **{**_INT4, "num_bits": 8, "symmetric": False})),
    "mxfp4-rows": (mxfp4_rows, _compressed("mxfp4-pack-quantized", **{**_FP4, "strategy": "group", "group_size": 32})),
    "gptq": (gptq, {"quant_method": "gptq", **_FITTED, "desc_act": False, "sym": False}),
    "awq": (awq, {"quant_method": "awq", **_FITTED, "version": "gemm", "zero_point": True}),
}  # fmt: skip
"""By name: how a matrix is drawn, and the section `quantization_config`."""


def checkpoint(scheme: str, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """A qwen3_moe whose experts and attention are packed, and one of the same values in float32; both compute in bfloat16.

    changes: of its config.
    """
    draw, section = SCHEMES[scheme]
    model = build("qwen3_moe", torch.bfloat16, **{"hidden_size": 64, "moe_intermediate_size": 32, **changes})
    plain, packed = save(model, folder / "plain"), save(model, folder / "packed")
    config = {**read_config(plain), "dtype": "bfloat16"}
    generator = torch.Generator().manual_seed(0)
    stored, values = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in read_tensors(plain).items():
        if tensor.ndim == 2 and (".experts." in name or ".self_attn." in name):
            drawn = draw(generator, *tensor.shape)
            stored |= {name.removesuffix("weight") + part: one for part, one in drawn.parts.items()}
            values[name] = drawn.values
        else:
            stored[name] = values[name] = tensor
    return rewrite(packed, stored, {**config, "quantization_config": section}), rewrite(plain, values, config)


def mxfp4_checkpoint(folder: Path, intermediate_size: int = 32) -> tuple[Path, Path]:
    """A gpt_oss in MXFP4, and the same values in float32, both to be computed in bfloat16."""
    model = build("gpt_oss", torch.bfloat16, intermediate_size=intermediate_size)
    plain, packed = save(model, folder / "plain"), save(model, folder / "packed")
    config = {**read_config(plain), "dtype": "bfloat16"}
    generator = torch.Generator().manual_seed(0)
    stored, values = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in read_tensors(plain).items():
        if name.endswith(("gate_up_proj", "down_proj")) and "experts" in name:
            num_experts, columns, rows = tensor.shape
            blocks = _bytes(generator, num_experts, rows, columns // 32, 16)
            scales = torch.randint(120, 124, (num_experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            numbers = fp4_pairs(blocks) * torch.exp2(scales.float() - 127)[..., None]
            values[name] = numbers.flatten(-2).transpose(1, 2)
        else:
            stored[name] = values[name] = tensor
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return rewrite(packed, stored, {**config, "quantization_config": section}), rewrite(plain, values, config)
