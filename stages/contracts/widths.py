"""Widths: how many of its neurons (intermediate size) an expert keeps."""

from typing import NamedTuple

from stages.contracts.errors import InputError


class ExpertSizes(NamedTuple):
    """Routed experts of a layer, and neurons of one."""

    num_experts: int
    num_neurons: int


def kept_neurons(num_neurons: int, share: float, multiple: int) -> int:
    """The multiple that is nearest to a share of num_neurons, and at least one; all of them for a share of one.

    Raises InputError where nothing but all of them is such a multiple.
    """
    if share == 1:
        return num_neurons
    kept = max(multiple, round(share * num_neurons / multiple) * multiple)
    if kept >= num_neurons:
        raise InputError(
            f"clustering.targets: a width of {share:g} of {num_neurons} neurons is {share * num_neurons:g}, whose nearest "
            f"multiple of {multiple} is not below {num_neurons}; choose a smaller width, or set refit.width_multiple"
        )
    return kept
