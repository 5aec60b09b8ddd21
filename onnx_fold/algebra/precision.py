"""The float types of weights, and how finely each rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

SIXTEEN_BITS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""The float types that are widened to float32."""


FRACTION_BITS = {
    ir.DataType.DOUBLE: 53,
    ir.DataType.FLOAT: 24,
    ir.DataType.FLOAT16: 11,
    ir.DataType.BFLOAT16: 8,
}
"""The float types of weights, and how many binary digits each holds."""


def unit_roundoff(dtype: ir.DataType | None) -> float:
    """Return the largest relative error of one rounding to ``dtype``, or to float32 if unknown."""
    return 2.0 ** -FRACTION_BITS.get(dtype or ir.DataType.FLOAT, 24)


def smallest_number(dtype: np.dtype[Any]) -> float:
    """Return the smallest number of a float type above zero."""
    return float(np.nextafter(*np.array([0, 1], dtype)))


def product_dtype(dtype: ir.DataType) -> npt.DTypeLike:
    """Type in which products of stored weights accumulate: float32 for 16 bits, else float64."""
    return np.float32 if dtype.bitwidth <= 16 else np.float64


def is_float(array: np.ndarray[Any, np.dtype[Any]]) -> bool:
    """Whether ``array`` holds floats, bfloat16 included."""
    return array.dtype.kind == "f" or array.dtype in (t.numpy() for t in SIXTEEN_BITS)
