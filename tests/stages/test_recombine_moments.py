"""Products that moments are made of, and what W_down gives.

Dimensions: R tokens, D hidden size, F neurons of a slot, N columns.
"""

import pytest
import torch
from torch.nn import functional

from stages.recombine.moments import Moments, down, product


def test_float32_products_are_those_of_what_is_rounded_to_16_bits_at_most() -> None:
    """Whether the processor rounds or not."""
    torch.manual_seed(0)
    left_NR, right_RM = torch.randn(40, 500), torch.randn(500, 30)
    error = (product(left_NR, right_RM).double() - left_NR.double() @ right_RM.double()).abs().max()
    assert error < 2**-8 * float((left_NR.abs().double() @ right_RM.abs().double()).max())
    assert product(left_NR, right_RM).dtype == torch.float32


def test_float64_products_are_exact_to_their_last_digits() -> None:
    torch.manual_seed(0)
    left_NR, right_RM = torch.randn(40, 500, dtype=torch.float64), torch.randn(500, 30, dtype=torch.float64)
    torch.testing.assert_close(product(left_NR, right_RM), left_NR @ right_RM, rtol=0, atol=1e-12)


def test_a_product_leaves_the_precision_of_others_as_it_was() -> None:
    """Of the process: the next unit may evaluate a model of float32. After one that fails, too."""
    assert torch.get_float32_matmul_precision() == "highest"
    product(torch.ones(2, 3), torch.ones(3, 2))
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(RuntimeError):
        product(torch.ones(2, 3), torch.ones(2, 3))
    assert torch.get_float32_matmul_precision() == "highest"


def test_in_bfloat16_w_down_gives_what_the_model_makes_of_it_bit_for_bit() -> None:
    torch.manual_seed(0)
    a_RF, weight_DF = torch.randn(50, 24).bfloat16(), torch.randn(16, 24)
    given_RD = down(a_RF, weight_DF, torch.float32)
    assert torch.equal(given_RD, functional.linear(a_RF, weight_DF.bfloat16()))
    assert down(a_RF.half(), weight_DF, torch.float32).dtype == torch.float32  # W_down may exceed what float16 holds


def test_moments_of_columns_on_both_sides_of_the_diagonal_are_equal_and_none_is_negative() -> None:
    """More columns than tokens, so that most eigenvalues are zero; wider than a strip."""
    torch.manual_seed(0)
    columns_RN, target_RD = torch.randn(100, 300), torch.randn(100, 7)
    found = Moments.zeros(300, 7, columns_RN.device).with_rows(columns_RN, target_RD).whole()
    assert torch.equal(found.gram_NN, found.gram_NN.T)
    values_N = torch.linalg.eigvalsh(found.gram_NN)
    assert float(values_N[0]) > -1e-5 * float(values_N[-1])
    torch.testing.assert_close(found.gram_NN, columns_RN.double().T @ columns_RN.double(), rtol=0.02, atol=0.5)
    torch.testing.assert_close(found.cross_ND, columns_RN.double().T @ target_RD.double(), rtol=0.02, atol=0.5)
