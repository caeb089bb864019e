"""How precise logits must be, how precise plain arithmetic makes them, and worst-case bounds of rounded sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from dfmath.backends._compat import Array, array_namespace

MATTERS = 100.0  # components farther than the nearest by this, in |r|^2/S, weigh less than exp(-50) of it
LIMIT = 1e-11  # a logit error above this is worth more careful arithmetic: float64 results are to be right to 1e-10
SLACK = 32.0  # coarser results may have errors of so many times their precision: float32 ones are to be right to 1e-5

BLOCK = 32  # coordinates whose squares are summed in two terms before they are added to the others

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


def two_term_roundings(dim: int) -> float:
    """Bound the error of -|r|^2/(2 S) from r in two terms, in units of u^2 |r|^2/(2 S), however a backend sums.

    First terms are added exactly; what each addition leaves, at most u of the sum so far, is added to the second term,
    which is rounded then: u times its size. In a block of b squares the second term grows to u (b + 3) of their sum, so
    rounding it each time costs b^2/2 + 5.5 b + 7, with what squaring leaves out; over n blocks n^2/2 + n (b + 4.5) + b
    + 3; multiplying by -1/(2 S) and joining with the constant 2 (n + b + 5) + 4. Sums by halving take about log2(d)^2
    in all, which is less, and sums whose two terms are made disjoint after each step 5 d/128 + 35.
    """
    b, n = min(dim, BLOCK), -(-dim // BLOCK)
    return 0.5 * b**2 + 8.5 * b + 0.5 * n**2 + n * (b + 6.5) + 24.0
