"""Class numbers: what counts as a label, in files of arrays and in data sets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastebm.data.errors import DataError

NEEDED = "a class number is needed: a whole number from 0, or -1 for no class"


def class_numbers(name: str, values: NDArray[Any]) -> NDArray[np.int64]:
    """`values` as int64: integers, booleans, and floats that are whole.

    Raises DataError, with `name`, for other types, and for the first value that is not whole or does not fit in int64.
    """
    if values.dtype.kind not in "buif":
        raise DataError(f"{name}: the labels are {values.dtype}; {NEEDED}")
    if values.dtype.kind == "f":
        floats = values.astype(np.promote_types(values.dtype, np.float64))
        wrong = ~((floats == np.floor(floats)) & (np.abs(floats) < 2.0**63))
    elif values.dtype.kind == "u":
        wrong = values > np.uint64(np.iinfo(np.int64).max)
    else:
        wrong = np.zeros(values.shape, bool)
    if wrong.any():
        raise DataError(f"{name}: the label {values[wrong][0]} is not whole or does not fit in int64; {NEEDED}")
    return values.astype(np.int64)
