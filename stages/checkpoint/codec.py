"""Arithmetic of the schemes: values of packed parts, and parts of new values. One expert's tensor at a time.

The `compressed-tensors` library packs, unpacks and rounds four-bit and whole numbers and computes their scales. FP8 with any
shape of blocks, and GPTQ's packing along rows, are here, because no library has them apart from modules.

The library takes two thirds of the time in which a worker starts: import this module where a quantised tensor is met.

Dimensions: R rows, C columns, G groups of columns.
"""

from collections.abc import Mapping, Sequence

import torch
from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from stages.checkpoint.schemes import (
    GLOBAL_DIVISOR,
    GLOBAL_SCALE,
    GROUPS,
    INPUT_DIVISOR,
    INPUT_SCALE,
    SCALES,
    SHAPE,
    WEIGHT,
    ZERO_POINTS,
    Scheme,
)

Parts = Mapping[str, Tensor]
_E8M0_BIAS = 127
_ROWS = 128
"""Least rows that are unpacked at a time."""


def dequantise(scheme: Scheme, parts: Parts) -> Tensor:
    """Values float32 [..., R, C] of a packed tensor."""
    weight, scales = parts[WEIGHT], parts[SCALES]
    if scheme.name == "fp8":
        return dequantise_fp8(weight, scales, scheme.block)
    if scheme.name == "mxfp4":
        return dequantise_mxfp4(weight, scales) if weight.ndim == 4 else dequantise_mxfp4(weight[None], scales[None])[0]
    if scheme.name == "nvfp4":
        rows, columns = weight.shape[0], 2 * weight.shape[1]
        numbers = unpack_fp4_from_uint8(weight, rows, columns, dtype=torch.float32)
        scale = scales.float() / parts[GLOBAL_DIVISOR] if GLOBAL_DIVISOR in parts else scales.float() * parts[GLOBAL_SCALE]
        return dequantize(numbers, scale, args=_arguments(scheme, columns))  # type: ignore[no-any-return]
    if scheme.name == "mxfp4_rows":
        numbers = unpack_fp4_from_uint8(weight, weight.shape[0], 2 * weight.shape[1], dtype=torch.float32)
        arguments = _arguments(scheme, numbers.shape[1])
        return dequantize(numbers, torch.exp2(scales.float() - _E8M0_BIAS), args=arguments)  # type: ignore[no-any-return]
    if scheme.name == "int":
        return _dequantise_int(scheme, parts)
    if scheme.name == "int_bytes":
        arguments = _arguments(scheme, weight.shape[1])
        return dequantize(weight, scales.float(), parts.get(ZERO_POINTS), arguments)  # type: ignore[no-any-return]
    return _dequantise_fitted(scheme, parts)


def quantise(
    scheme: Scheme, values_RC: Tensor, members: Sequence[Parts], stored: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """Parts of new values, scales by the scheme's own rule.

    values_RC: float32; for "mxfp4" transposed, as the model stores them. members: the parts of which the values were made, with
    at least those that are one number: a scale of the whole tensor covers the range of every member, so that tensors which
    engines join (gate and up) still share one. stored: dtype of every part.
    """
    assert scheme.is_written, scheme.name
    if scheme.name == "fp8":
        made = quantise_fp8(values_RC, scheme, stored[WEIGHT], stored[SCALES])
    elif scheme.name == "mxfp4":
        made = _quantise_mxfp4(values_RC)
    elif scheme.name == "mxfp4_rows":
        made = _quantise_mxfp4_rows(values_RC)
    elif scheme.name == "nvfp4":
        made = _quantise_nvfp4(values_RC, members, GLOBAL_SCALE if GLOBAL_SCALE in stored else GLOBAL_DIVISOR)
    else:
        made = _quantise_int(scheme, values_RC, stored[SCALES])
    if INPUT_SCALE in stored:
        made[INPUT_SCALE] = torch.stack([member[INPUT_SCALE] for member in members]).amax(0)
    if INPUT_DIVISOR in stored:
        made[INPUT_DIVISOR] = torch.stack([member[INPUT_DIVISOR] for member in members]).amin(0)
    if SHAPE in stored:
        made[SHAPE] = torch.tensor(values_RC.shape)
    return {part: made[part].to(dtype) for part, dtype in stored.items()}


def dequantise_fp8(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Values float32 [..., R, C] of FP8 numbers [..., R, C] with one scale per block of rows and columns."""
    *lead, rows, columns = weight.shape
    scale = scales.float().reshape(*lead, -(-rows // block[0]), -(-columns // block[1]))
    scale = scale.repeat_interleave(min(block[1], columns), -1)[..., :columns]  # a block may be wider than the tensor
    values = torch.empty(weight.shape, device=weight.device)
    num_blocks = -(-_ROWS // block[0])
    for number, first in enumerate(range(0, rows, num_blocks * block[0])):  # these rows fit in the cache: 1.7 times as fast
        some = values[..., first : first + num_blocks * block[0], :]
        some.copy_(weight[..., first : first + num_blocks * block[0], :])
        factors = scale[..., number * num_blocks : (number + 1) * num_blocks, :]
        if factors.shape[-2] > 1:
            factors = factors.repeat_interleave(block[0], -2)[..., : some.shape[-2], :]
        some.mul_(factors)
    return values


def quantise_fp8(values_RC: Tensor, scheme: Scheme, dtype: torch.dtype, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """FP8 numbers, and scales that take the largest value of each block to the largest number.

    Source of the rule: DeepSeek-V3, arXiv:2412.19437, section 3.3.2. Scales are rounded to their dtype before they are used.
    """
    rows, columns = values_RC.shape
    height, width = min(scheme.block[0], rows), min(scheme.block[1], columns)
    num_down, num_across = -(-rows // height), -(-columns // width)
    padding = (0, num_across * width - columns, 0, num_down * height - rows)
    blocks = torch.nn.functional.pad(values_RC, padding).view(num_down, height, num_across, width)
    largest = torch.finfo(dtype).max
    scales = blocks.abs().amax((1, 3)) / largest
    if scheme.has_whole_exponents:
        scales = scales.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil().exp2()
    least = torch.finfo(torch.float32 if scale_dtype == torch.float64 else scale_dtype).tiny
    scales = torch.where(scales > 0, scales.clamp(min=least), 1.0).to(scale_dtype).float()
    numbers = (blocks / scales[:, None, :, None]).clamp(-largest, largest)  # a cast makes NaN of what is larger
    numbers = numbers.view(num_down * height, num_across * width)[:rows, :columns].to(dtype)
    return {WEIGHT: numbers, SCALES: scales}


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Values float32 [E, 32 B, R] of packed four-bit numbers [E, R, B, 16] with one exponent per block [E, R, B]."""
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


def _arguments(scheme: Scheme, columns: int) -> QuantizationArgs:
    """What compressed-tensors calls the scheme, of a tensor with so many columns: a block may be wider than an expert whose
    neurons have become fewer."""
    kind = "int" if scheme.name in ("int", "int_bytes") else "float"
    return QuantizationArgs(
        num_bits=scheme.num_bits,
        type=kind,
        symmetric=scheme.is_symmetric,
        strategy="group",
        group_size=min(scheme.block[1], columns),
    )


def _quantise_mxfp4(values_CR: Tensor) -> dict[str, Tensor]:
    """Blocks [R, B, 16] and exponents [R, B] of a tensor that is stored transposed."""
    made = _quantise_mxfp4_rows(values_CR.T.contiguous())
    return {**made, WEIGHT: made[WEIGHT].view(*made[SCALES].shape, 16)}


def _quantise_mxfp4_rows(values_RC: Tensor) -> dict[str, Tensor]:
    """Pairs of numbers U8 [R, C / 2] and exponents [R, B]. The exponents' rule is that of the OCP Microscaling format, section
    6.3, but for blocks whose largest value it would round past the largest number: they get the next exponent."""
    size = 32
    largest_RB = values_RC.view(len(values_RC), -1, size).abs().amax(-1)
    exponents_RB = generate_mx_scales(largest_RB).clamp(0, 2 * _E8M0_BIAS)
    scales_RB = torch.exp2(exponents_RB - _E8M0_BIAS)
    return {WEIGHT: quantize_and_pack_fp4(values_RC, scales_RB, group_size=size), SCALES: exponents_RB}


def _quantise_nvfp4(values_RC: Tensor, members: Sequence[Parts], part: str) -> dict[str, Tensor]:
    """Pairs of numbers U8 [R, C / 2], scales [R, C / 16] and the scale of the tensor, by the rules of compressed-tensors."""
    size = 16
    low, high = values_RC.aminmax()
    divisors = [generate_gparam(low, high)]
    for member in members:
        divisors.append(1 / member[part].float().reshape(1) if part == GLOBAL_SCALE else member[part].float().reshape(1))
    whole = torch.cat(divisors).amin(0, keepdim=True)
    arguments = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=size, scale_dtype=torch.float8_e4m3fn
    )
    low_RG, high_RG = values_RC.view(len(values_RC), -1, size).aminmax(dim=-1)
    scales_RG, _ = calculate_qparams(low_RG, high_RG, arguments, global_scale=whole)
    packed = quantize_and_pack_fp4(values_RC, scales_RG, global_scale=whole, group_size=size)
    shape = members[0][part].shape
    return {WEIGHT: packed, SCALES: scales_RG, part: (1 / whole if part == GLOBAL_SCALE else whole).reshape(shape)}


def _dequantise_int(scheme: Scheme, parts: Parts) -> Tensor:
    rows, words = parts[WEIGHT].shape
    columns = min(parts[SCALES].shape[1] * scheme.block[1], words * 32 // scheme.num_bits)
    if SHAPE in parts:
        columns = int(parts[SHAPE][1])
    numbers = unpack_from_int32(parts[WEIGHT], scheme.num_bits, torch.Size((rows, columns)))
    zeros = None
    if ZERO_POINTS in parts:
        shape = torch.Size((rows, parts[SCALES].shape[1]))
        zeros = unpack_from_int32(parts[ZERO_POINTS], scheme.num_bits, shape, packed_dim=0)
    return dequantize(numbers, parts[SCALES].float(), zeros, _arguments(scheme, columns))  # type: ignore[no-any-return]


def _quantise_int(scheme: Scheme, values_RC: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Numbers I32 [R, words] or I8 [R, C], scales [R, G] and, if there are any, zero points, by compressed-tensors' rules."""
    arguments = _arguments(scheme, values_RC.shape[1])
    size = min(scheme.block[1], values_RC.shape[1])
    low_RG, high_RG = values_RC.view(len(values_RC), -1, size).aminmax(dim=-1)
    scales_RG, zeros_RG = calculate_qparams(low_RG, high_RG, arguments)
    scales_RG = scales_RG.to(scale_dtype).float()
    numbers = quantize(values_RC, scales_RG, None if scheme.is_symmetric else zeros_RG, arguments, dtype=torch.int8)
    if scheme.name == "int_bytes":
        return {WEIGHT: numbers, SCALES: scales_RG, ZERO_POINTS: zeros_RG}
    made = {WEIGHT: pack_to_int32(numbers, scheme.num_bits), SCALES: scales_RG}
    if not scheme.is_symmetric:
        made[ZERO_POINTS] = pack_to_int32(zeros_RG.to(torch.int8), scheme.num_bits, packed_dim=0)
    return made


def _dequantise_fitted(scheme: Scheme, parts: Parts) -> Tensor:
    """Values of GPTQ (numbers packed along columns of the values) and AWQ (along rows, in its own order)."""
    bits, mask = scheme.num_bits, (1 << scheme.num_bits) - 1
    weight, zeros = parts[WEIGHT], parts[ZERO_POINTS]
    if scheme.name == "awq":
        numbers_CR, zeros_GR = AutoAWQConverter.reverse_awq_order(*AutoAWQConverter.unpack_awq(weight, zeros, bits), bits)
        assert zeros_GR is not None
    else:
        shifts = torch.arange(0, 32, bits, device=weight.device, dtype=torch.int32)
        numbers_CR = (weight[:, None, :] >> shifts[None, :, None]).flatten(0, 1)
        zeros_GR = (zeros[:, :, None] >> shifts).flatten(1, 2)
    numbers_CR, zeros_GR = (numbers_CR & mask).float(), ((zeros_GR & mask) + scheme.zero_offset).float()
    columns = torch.arange(len(numbers_CR), device=weight.device)
    groups_C = parts[GROUPS].long() if GROUPS in parts else columns // scheme.block[1]
    values_CR: Tensor = (numbers_CR - zeros_GR[groups_C]) * parts[SCALES].float()[groups_C]
    return values_CR.T.contiguous()
