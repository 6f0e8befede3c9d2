"""Checks that numbers are finite while they are still in the processor's cache."""

import torch
from torch import Tensor


def is_finite(values: Tensor, may_be_infinite: bool = False) -> bool:
    """Whether no value is NaN or infinite. Integers always pass. may_be_infinite: only check that no value is NaN.

    A sum is tried first: it is one pass at cache speed, and NaN or infinity in it reveals either. But sums of finite values may
    overflow (float16 soon does), and infinities of both signs cancel to NaN. So a suspicious sum needs a second check.
    """
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.is_floating_point() or not values.numel():
        return True
    if values.element_size() == 1:  # torch has no arithmetic for one-byte floats
        values = values.float()
    if torch.isfinite(values.sum()) or (values.element_size() == 2 and torch.isfinite(values.sum(dtype=torch.float32))):
        return True
    return not torch.isnan(values).any() if may_be_infinite else bool(torch.isfinite(values).all())
