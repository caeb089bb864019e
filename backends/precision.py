"""How precise logits must be, how precise plain arithmetic makes them, and worst-case bounds of rounded sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from dfmath.backends._compat import Array, array_namespace

MATTERS = 100.0  # components farther than the nearest by this, in |r|^2/S, weigh less than exp(-50) of it
LIMIT = 1e-11  # a logit error above this is worth more careful arithmetic: float64 results are to be right to 1e-10
SLACK = 32.0  # coarser results may have errors of so many times their precision: float32 ones are to be right to 1e-5

ROUND_32, ROUND_64 = 2.0**-24, 2.0**-53


def limit(precision: float) -> float:
    """Return the logit error that results of this relative precision may have."""
    return max(LIMIT, SLACK * precision)


def rounding(dtype: Any) -> float:
    """Return the unit roundoff of a NumPy dtype, float32 or float64."""
    return 0.5 * float(np.finfo(dtype).eps)


def gamma(terms: int, unit: float) -> float:
    """Bound the relative error of a sum of products: gamma_n = n u/(1 - n u) (Higham 2002, section 3.1)."""
    return terms * unit / (1.0 - terms * unit) if terms * unit < 0.5 else math.inf


def plain_logit_error(nearest: Array, reach: Array, eps: float, dim: int) -> Array:
    """Estimate the error of the logits -|x - alpha y|^2/(2 S) that matter, when computed by plain differences.

    `nearest` is |x - alpha y|^2/S of the nearest component and `reach` is |x|/sqrt(S). Each coordinate of the
    residual r is off by about eps (|x| + |r|), and the sum of squares by eps times a slowly growing factor.
    """
    xp = array_namespace(nearest)
    square = nearest + MATTERS
    root = xp.sqrt(square)
    return eps * (root * (2.0 * reach + root) + square * (0.25 * math.sqrt(dim) + 4.0))
