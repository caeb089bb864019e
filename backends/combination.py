"""Linear combinations of arrays, as the steps of integrators are made of.

Arrays of the size of many Jacobians do not fit in cache: every pass over them counts, and term by term there are two
passes for each. NumPy arrays are combined four at a time instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dfmath.backends._compat import Array, is_numpy_array

AT_ONCE = 4
LARGE = 2**16  # numbers in an array that is worth the trouble


def combination(coefficients: Any, arrays: list[Array]) -> Array:
    """Return sum_i c_i a_i; terms whose coefficient is 0 are not looked at."""
    terms = [(float(c), array) for c, array in zip(coefficients, arrays, strict=True) if c != 0.0]
    if not is_numpy_array(arrays[0]) or arrays[0].size < LARGE or arrays[0].dtype != np.float64:
        return sum(c * array for c, array in terms)
    from dfmath.backends.numba_arithmetic import add_four

    flat = [(c, np.ascontiguousarray(array).reshape(-1)) for c, array in terms]
    total = np.zeros(arrays[0].size)
    for start in range(0, len(flat), AT_ONCE):
        group = flat[start : start + AT_ONCE]
        group += [(0.0, group[0][1])] * (AT_ONCE - len(group))
        add_four(total, *(part for term in group for part in term))
    return total.reshape(arrays[0].shape)
