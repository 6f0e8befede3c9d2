"""Schemes in which checkpoints pack the values of a quantised tensor: facts without arithmetic, which `codec.py` has.

A packed tensor is stored as several parts, each a tensor of its own: its numbers, its scales, and what else the scheme has.
"""

from dataclasses import dataclass

WEIGHT, SCALES, ZERO_POINTS, SHAPE, GROUPS = "weight", "scales", "zero_points", "shape", "groups"
GLOBAL_SCALE, GLOBAL_DIVISOR, INPUT_SCALE, INPUT_DIVISOR = "global_scale", "global_divisor", "input_scale", "input_divisor"
"""Parts. groups: the group of each column, where they are not in order. A divisor is the reciprocal of a scale. Scales of
inputs belong to the activations that a kernel quantises; nothing here computes with them."""


FITTED = ("gptq", "awq")
"""Schemes in which no new values can be packed: their numbers are fitted to calibration data, by their own tools."""


@dataclass(frozen=True)
class Scheme:
    """How the values of a tensor [rows, columns] are packed.

    name: "fp8" (one byte a value), "mxfp4" (gpt-oss: four bits, one power of two per 32 rows of the transposed tensor),
    "mxfp4_rows" (the same numbers of a tensor that is stored as it is, from compressed-tensors), "nvfp4" (four bits, an FP8
    scale per 16 columns and one of the tensor), "int" (whole numbers of num_bits, from compressed-tensors, packed in words),
    "int_bytes" (the same, a byte each), "gptq" or "awq". block: rows and columns that share a scale; larger
    than the tensor where all do. is_symmetric: without zero points. has_whole_exponents: whether scales are powers of two.
    zero_offset: what "gptq" subtracts from every zero point that it stores.
    """

    name: str
    block: tuple[int, int]
    num_bits: int
    is_symmetric: bool = True
    has_whole_exponents: bool = False
    zero_offset: int = 0

    @property
    def is_written(self) -> bool:
        """Whether new values can be packed."""
        return self.name not in FITTED
