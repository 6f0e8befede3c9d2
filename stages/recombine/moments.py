"""Moments of weighted columns, and the products that they are made of.

Dimensions: R tokens, D hidden size, F neurons of a slot, N columns, M columns of a right factor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_STRIP = 128
"""Columns of a moment matrix that are computed at a time: only what is not above the diagonal."""


def product(left_NR: Tensor, right_RM: Tensor) -> Tensor:
    """Product of two matrices. Numbers of float32 may be rounded first, to bfloat16 on a CPU and to TF32 on a GPU, where there
    are fast instructions for these; sums are float32.

    Columns of float32 are those of a model of 16 bits, whose activations have been rounded as much already. What is rounded is
    rounded alike wherever it stands, so H^T H is exact for slightly different columns, and has no negative eigenvalue.
    """
    if left_NR.dtype != torch.float32:
        return left_NR @ right_RM
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return left_NR @ right_RM
    finally:
        torch.set_float32_matmul_precision(before)


def down(a_RF: Tensor, weight_DF: Tensor, wide: torch.dtype) -> Tensor:
    """What W_down makes of activations, [R, D]: in bfloat16 as a model of that dtype does, which is several times as fast as
    float32 where a processor has instructions for it; else in `wide`."""
    dtype = a_RF.dtype if a_RF.dtype == torch.bfloat16 else wide
    return a_RF.to(dtype) @ weight_DF.T.to(dtype)


@dataclass(frozen=True)
class Moments:
    """A = H^T H [N, N], C = H^T Y [N, D] and |Y|^2 over some tokens, float64."""

    gram_NN: Tensor
    cross_ND: Tensor
    total: float

    @classmethod
    def zeros(cls, num_columns: int, hidden_size: int, device: torch.device) -> "Moments":
        """Of no tokens."""
        gram_NN = torch.zeros(num_columns, num_columns, dtype=torch.float64, device=device)
        return cls(gram_NN, torch.zeros(num_columns, hidden_size, dtype=torch.float64, device=device), 0.0)

    def with_rows(self, columns_RN: Tensor, target_RD: Tensor) -> "Moments":
        """With some tokens added, in place; above the diagonal not before `whole`."""
        for first in range(0, len(self.gram_NN), _STRIP):
            stop = min(first + _STRIP, len(self.gram_NN))
            self.gram_NN[first:stop, :stop] += product(columns_RN[:, first:stop].T, columns_RN[:, :stop])
        self.cross_ND.add_(product(columns_RN.T, target_RD))
        return Moments(self.gram_NN, self.cross_ND, self.total + float(target_RD.square().sum(dtype=torch.float64)))

    def whole(self) -> "Moments":
        """With what is above the diagonal filled in, in place."""
        for first in range(0, len(self.gram_NN), _STRIP):
            stop = min(first + _STRIP, len(self.gram_NN))
            self.gram_NN[:first, first:stop] = self.gram_NN[first:stop, :first].T
            square = self.gram_NN[first:stop, first:stop]
            square.copy_(square.tril() + square.tril(-1).T)
        return self

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.gram_NN + other.gram_NN, self.cross_ND + other.cross_ND, self.total + other.total)

    def with_own(self, own_ND: Tensor) -> "Moments":
        """With Y + H W in the place of Y."""
        own_part_ND = self.gram_NN @ own_ND
        total = self.total + float((own_ND * (2 * self.cross_ND + own_part_ND)).sum())
        return Moments(self.gram_NN, self.cross_ND + own_part_ND, total)

    def error(self, weight_ND: Tensor) -> float:
        """|Y - H W|^2, from the moments alone."""
        linear = float((weight_ND * self.cross_ND).sum())
        return self.total - 2 * linear + float((weight_ND * (self.gram_NN @ weight_ND)).sum())
