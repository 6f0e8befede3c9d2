"""Whether numbers are finite, looked at while they are still in the processor's cache."""

import torch
from torch import Tensor


def is_finite(values: Tensor, may_be_infinite: bool = False) -> bool:
    """Whether no value is NaN or infinite; may_be_infinite: whether none is NaN. Integers always are.

    A sum is one pass at the speed of the cache, and shows both. Sums of finite values may overflow (of float16 soon), and
    infinities of both signs cancel out to NaN, hence the further looks.
    """
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.is_floating_point() or not values.numel():
        return True
    if values.element_size() == 1:  # torch does no arithmetic with these
        values = values.float()
    if torch.isfinite(values.sum()) or (values.element_size() == 2 and torch.isfinite(values.sum(dtype=torch.float32))):
        return True
    return not torch.isnan(values).any() if may_be_infinite else bool(torch.isfinite(values).all())
