"""Weights of a layer's experts: in transformers' module, mapped from the checkpoint's files, or packed as there.

Dimensions: D hidden size, F intermediate size, P columns of the first product (2 F with a gate, else F), E experts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.contracts.errors import InputError
from stages.model.mapped import MappedStack
from stages.model.packed import PackedStack

Stack = MappedStack | PackedStack
NOTHING_MAPPED: Mapping[str, Stack] = {}


@dataclass(frozen=True)
class ExpertsLayout:
    """How an experts module stores its weights, from the flags that transformers' module declares."""

    is_transposed: bool
    has_bias: bool
    has_gate: bool

    @classmethod
    def of(cls, experts: Any) -> "ExpertsLayout":
        """Read the flags. Llama 4's module has none and multiplies from the right.
        Raises InputError for any other module without flags."""
        if all(isinstance(getattr(experts, flag, None), bool) for flag in ("is_transposed", "has_bias", "has_gate")):
            return cls(experts.is_transposed, experts.has_bias, experts.has_gate)
        if is_llama4(experts):
            return cls(is_transposed=True, has_bias=False, has_gate=True)
        raise InputError(
            f"experts of class {type(experts).__name__} do not say how they keep their weights, so this model is not "
            "supported; use one of docs/families.md"
        )

    @property
    def first(self) -> str:
        """Name of the weight in the first product, with the hidden states."""
        return "gate_up_proj" if self.has_gate else "up_proj"


def is_llama4(experts: Any) -> bool:
    """Whether a module is Llama 4's experts, or the subclass of it in a tied export."""
    names = [(base.__module__.split(".")[0], base.__name__) for base in type(experts).mro()]
    return ("transformers", "Llama4TextExperts") in names


class ExpertWeights:
    """Matrices for multiplication from the right: [D, P] (`layout.first`) and [F, D] (`down_proj`).

    experts: transformers' module with its layout flags; mapped and packed weights are on its meta device. mapped: these, by
    name of the weight.
    """

    def __init__(self, experts: Any, mapped: Mapping[str, Stack] = NOTHING_MAPPED) -> None:
        self.experts, self._mapped = experts, mapped
        self.layout = ExpertsLayout.of(experts)
        self.num_experts = len(experts.down_proj)
        rows, columns = experts.down_proj.shape[1:]
        self.intermediate, self.hidden_size = (rows, columns) if self.layout.is_transposed else (columns, rows)
        self.dtype = experts.down_proj.dtype
        self.device = mapped["down_proj"].device if "down_proj" in mapped else experts.down_proj.device

    def num_columns(self, name: str) -> int:
        """Number of columns of a matrix: P or D."""
        return getattr(self.experts, name).shape[2 if self.layout.is_transposed else 1]  # type: ignore[no-any-return]

    def is_loaded(self, name: str) -> bool:
        """Whether transformers' module has the weight."""
        return name not in self._mapped

    def can_join(self, name: str) -> bool:
        """Whether the matrices of neighbouring experts can be used as one matrix."""
        return not self.layout.is_transposed and self.is_loaded(name)

    def matrices(self, name: str, first: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Matrices of experts [first, stop).
        Yields the column at which a matrix begins in the joint product, and the matrix."""
        if name not in self._mapped:
            weight = getattr(self.experts, name)[first:stop]
            if self.can_join(name):
                yield 0, weight.flatten(0, 1).T
            else:
                yield from ((i * weight.shape[2], matrix) for i, matrix in enumerate(weight))
            return
        width = self.num_columns(name)
        for expert in range(first, stop):
            for piece in self._mapped[name].experts[expert]:
                matrix = piece.values if self.layout.is_transposed else piece.values.T
                yield (expert - first) * width + piece.row, matrix

    def bias(self, name: str, first: int, stop: int) -> Tensor | None:
        """Biases of experts [first, stop), concatenated; None if the module has none."""
        return getattr(self.experts, f"{name}_bias")[first:stop].flatten() if self.layout.has_bias else None

    def down_square_norms(self, expert: int) -> Tensor:
        """Squared norms of the columns of an expert's W_down, float64 [F]: for each neuron."""
        norm_F = torch.zeros(self.intermediate, dtype=torch.float64, device=self.device)
        for _, weight_FD in self.matrices("down_proj", expert, expert + 1):
            norm_F += weight_FD.double().square().sum(1)
        self.release("down_proj", expert, expert + 1)
        return norm_F

    def release(self, name: str, first: int, stop: int) -> None:
        """Release the mapped pages or unpacked values of experts [first, stop), which are not needed for the moment."""
        if name in self._mapped:
            for expert in range(first, stop):
                self._mapped[name].release(expert)
