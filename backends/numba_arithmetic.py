"""Sums of products in compiled loops: as fast as rounding rules allow, or in two terms where rounding would show."""

from __future__ import annotations

import numpy as np
from numba import njit

_STRIDE = 128  # coordinates between two looks at whether a distance is already too long

_options = {"cache": True, "error_model": "numpy", "nogil": True}
exactly = njit(**_options)  # every operation as written: two-term arithmetic
fused = njit(fastmath={"contract"}, **_options)  # multiply-adds fused, order kept
summing = njit(fastmath={"contract", "reassoc", "nsz"}, **_options)  # sums in vector lanes: only for plain dot products


@summing
def dot(a, b):  # type: ignore[no-untyped-def]
    """a . b"""
    total = 0.0
    for j in range(a.shape[0]):
        total += a[j] * b[j]
    return total


@summing
def _squared_distance(x, alpha, y):  # type: ignore[no-untyped-def]
    square = 0.0
    for j in range(x.shape[0]):
        difference = x[j] - alpha * y[j]
        square += difference * difference
    return square


@exactly
def squared_distance(x, alpha, y, limit):  # type: ignore[no-untyped-def]
    """|x - alpha y|^2, or infinity as soon as it is known to be beyond the limit."""
    dim, square = x.shape[0], 0.0
    for first in range(0, dim, _STRIDE):
        last = min(first + _STRIDE, dim)
        square += _squared_distance(x[first:last], alpha, y[first:last])  # slices: plain indices vectorise
        if square > limit:
            return np.inf
    return square


@exactly
def two_term_squared_distance(x, alpha, y):  # type: ignore[no-untyped-def]
    """|x - alpha y|^2 in two terms."""
    high, low = 0.0, 0.0
    for j in range(x.shape[0]):
        r, r_low = residual(x[j], alpha, np.float64(y[j]))
        square, square_low = two_product(r, r)
        high, error = two_sum(high, square)
        low += error + square_low + 2.0 * r * r_low
    return high, low


@exactly
def residual(x, alpha, y):  # type: ignore[no-untyped-def]
    """X - alpha y in two terms."""
    p, p_low = two_product(alpha, y)
    r, r_low = two_sum(x, -p)
    return two_sum(r, r_low - p_low)


@exactly
def two_sum(a, b):  # type: ignore[no-untyped-def]
    """A + b in two terms."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@exactly
def two_product(a, b):  # type: ignore[no-untyped-def]
    """A b in two terms."""
    p = a * b
    c, d = 134217729.0 * a, 134217729.0 * b
    a_high, b_high = c - (c - a), d - (d - b)
    a_low, b_low = a - a_high, b - b_high
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low
