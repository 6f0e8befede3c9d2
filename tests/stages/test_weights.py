"""Weighted sums of tensors: float32 accumulation, one rounding, clusters of one untouched."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stages.checkpoint.weighted_sum import merge_rows, weighted_sum
from stages.contracts.errors import InputError

SHARES = (0.37, 0.05, 0.21, 0.0, 0.12, 0.25)


def members(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(40, 50).to(dtype) for _ in SHARES]


def pairs(dtype: torch.dtype) -> Iterator[tuple[Tensor, float]]:
    return zip(members(dtype), SHARES, strict=True)


def exact_sum(dtype: torch.dtype) -> Tensor:
    return sum((tensor.double() * share for tensor, share in pairs(dtype)), torch.zeros(40, 50, dtype=torch.float64))


def half_ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of one rounding to dtype."""
    return torch.finfo(dtype).eps / 2 * torch.exp2(exact.abs().log2().floor())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    exact = exact_sum(dtype)
    merged = weighted_sum(pairs(dtype), dtype, "here")
    assert merged.dtype == dtype
    allowed = half_ulp(exact, dtype) + 1e-6
    assert ((merged.double() - exact).abs() <= allowed).all()
    rounded_often = sum((tensor * share for tensor, share in pairs(dtype)), torch.zeros(40, 50, dtype=dtype))
    assert ((rounded_often.double() - exact).abs() > allowed).any()


def test_a_sum_in_float32_is_that_of_float64_to_a_few_roundings() -> None:
    exact = exact_sum(torch.float32)
    scale = sum(tensor.double().abs() * share for tensor, share in pairs(torch.float32))
    error = (weighted_sum(pairs(torch.float32), torch.float32, "here").double() - exact).abs()
    assert (error <= len(SHARES) * torch.finfo(torch.float32).eps * scale).all()


def test_a_sum_that_is_not_finite_is_an_error_with_the_tensors_name() -> None:
    bad = torch.tensor([1.0, float("nan")])
    with pytest.raises(InputError, match=r"experts\.3\.w1: the merged expert is not finite"):
        weighted_sum(iter([(bad, 0.5), (torch.ones(2), 0.5)]), torch.float32, "experts.3.w1")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_are_combined_along_the_expert_axis(axis: int) -> None:
    torch.manual_seed(1)
    rows_E = torch.randn(4, 5, 6).movedim(0, axis)
    merged = merge_rows(rows_E, axis, [[(0, 0.25), (3, 0.75)], [(2, 1.0)], [(1, 1.0)]], "here").movedim(axis, 0)
    source = rows_E.movedim(axis, 0)
    torch.testing.assert_close(merged[0], 0.25 * source[0] + 0.75 * source[3])
    assert torch.equal(merged[1:], source[[2, 1]])


def test_a_row_alone_keeps_its_bytes() -> None:
    """Also those that arithmetic would change: a negative zero, the payload of a NaN."""
    bits = torch.tensor([[-(2**31), 0x7FC01234, 1], [0, 0, 0]], dtype=torch.int32)
    merged = merge_rows(bits.view(torch.float32), 0, [[(0, 1.0)], [(1, 1.0)]], "here")
    assert torch.equal(merged.view(torch.int32), bits)
