"""Numbers in a page, compact: integers in base64, scaled where they are fractions.

Dimensions: N rows, M values of a row.
"""

import base64
from typing import NotRequired, TypedDict

import numpy as np

from stages.contracts.arrow import Array


class Packed(TypedDict):
    """data: base64 of little-endian integers, row after row. type: name of the JavaScript array that reads them. scales: of
    each row, what a value is multiplied by; absent for integers."""

    data: str
    type: str
    scales: NotRequired[list[float]]


_ARRAYS = {"uint8": "Uint8Array", "uint16": "Uint16Array", "int16": "Int16Array", "float32": "Float32Array"}


def packed(values: Array, dtype: str) -> Packed:
    """Values as they are, rounded to the dtype."""
    typed = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
    return {"type": _ARRAYS[dtype], "data": base64.b64encode(typed.tobytes()).decode()}


def scaled(values_NM: Array, dtype: str) -> Packed:
    """Values of at least zero, each row in steps of its largest value over that of the dtype. The largest error of a value is
    half a step: 0.2 % of the row's largest value in uint8, 0.0008 % in uint16."""
    steps = np.iinfo(dtype).max
    scale_N = values_NM.max(axis=1, initial=0) / steps
    steps_NM = np.divide(values_NM, scale_N[:, None], out=np.zeros(values_NM.shape), where=scale_N[:, None] > 0)
    return {**packed(np.rint(steps_NM), dtype), "scales": [float(f"{scale:.9g}") for scale in scale_N]}
