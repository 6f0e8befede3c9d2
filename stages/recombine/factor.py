"""Cholesky factors of moments and a ridge.

Dimensions: N columns, D hidden size, or any number of right-hand sides.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.contracts.errors import InputError

FACTOR_DTYPES = {"cuda": torch.float32}
"""Dtype of factors by kind of device, float64 elsewhere: float32 is many times as fast on most GPUs."""
_REFINEMENTS = 20
_ENOUGH = 1e-10
"""Norm of what a refined solution leaves, in that of the right-hand side."""


@dataclass(frozen=True)
class Factor:
    """lower_NN: Cholesky factor of moments with a ridge, float64 or float32. matrix_NN: the moments, float64; None where they
    are not needed for refinement. shift: what the ridge adds to their diagonal."""

    lower_NN: Tensor
    matrix_NN: Tensor | None
    shift: float

    def solve(self, right_ND: Tensor) -> Tensor:
        """Solution [N, D], float64.

        With a factor of float32 it is refined: what a solution leaves, in float64, is solved for again (Higham, Accuracy and
        Stability of Numerical Algorithms, chapter 12). Where that does not converge, a factor of float64 solves.
        """
        dtype = self.lower_NN.dtype
        solution_ND = torch.cholesky_solve(right_ND.to(dtype), self.lower_NN).double()
        if self.matrix_NN is None:
            return solution_ND
        enough = _ENOUGH * float(right_ND.norm())
        for _ in range(_REFINEMENTS):
            left_ND = right_ND - self.matrix_NN @ solution_ND
            if float(left_ND.norm()) <= enough:
                return solution_ND
            solution_ND += torch.cholesky_solve(left_ND.to(dtype), self.lower_NN).double()
        return torch.cholesky_solve(right_ND, torch.linalg.cholesky(self.matrix_NN))


def factor_of(gram_NN: Tensor, ridge: float, place: str, remedy: str) -> Factor:
    """Factor of moments and a ridge, a share of their mean diagonal. Raises InputError, with place and condition, where they
    are not positive definite in spite of it.

    A matrix that is positive definite in float64 alone has a factor of float64 on a GPU, too. remedy: what the user may do
    then, an imperative.
    """
    matrix_NN = gram_NN.clone()
    shift = ridge * float(gram_NN.diagonal().mean())
    matrix_NN.diagonal().add_(shift)
    for dtype in dict.fromkeys((FACTOR_DTYPES.get(gram_NN.device.type, torch.float64), torch.float64)):
        lower_NN, info = torch.linalg.cholesky_ex(matrix_NN.to(dtype))
        if not int(info):
            return Factor(lower_NN, matrix_NN if dtype != torch.float64 else None, shift)
    raise InputError(
        f"{place}: the moments of {len(gram_NN)} columns are not positive definite at ridge {ridge:g} "
        f"({_condition(matrix_NN)}, column {int(info)}); {remedy}"
    )


def _condition(matrix_NN: Tensor) -> str:
    """The least and the largest eigenvalue, in words."""
    if not torch.isfinite(matrix_NN).all():
        return "some are not finite"
    values_N = torch.linalg.eigvalsh(matrix_NN)
    return f"eigenvalues from {float(values_N[0]):.3g} to {float(values_N[-1]):.3g}"
