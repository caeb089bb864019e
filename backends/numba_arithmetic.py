"""Sums of products in compiled loops: as fast as rounding rules allow, or in two terms where rounding would show."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from dfmath.backends.precision import BLOCK
from numba import njit, prange
from numba.extending import overload

_STRIDE = 128  # coordinates between two looks at whether a distance is already too long

_options = {"cache": True, "error_model": "numpy", "nogil": True}
exactly = njit(**_options)  # every operation as written: two-term arithmetic
fused = njit(fastmath={"contract"}, **_options)  # multiply-adds fused, order kept
summing = njit(fastmath={"contract", "reassoc", "nsz"}, **_options)  # sums in vector lanes: only for plain dot products


@njit(fastmath={"nnan", "nsz", "reassoc"}, **_options)
def largest_of(values):  # type: ignore[no-untyped-def]
    """The largest of some numbers, none of them NaN."""
    largest = values[0]
    for i in range(values.shape[0]):
        largest = max(largest, values[i])
    return largest


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
    """|x - alpha y|^2 in two terms, a block of coordinates at a time; see `precision.two_term_roundings`."""
    dim, high, low = x.shape[0], 0.0, 0.0
    for first in range(0, dim, BLOCK):
        part, part_low = 0.0, 0.0
        for j in range(first, min(first + BLOCK, dim)):
            r, r_low = residual(x[j], alpha, np.float64(y[j]))
            square, square_low = two_product(r, r)
            part, error = two_sum(part, square)
            part_low += error + square_low + 2.0 * r * r_low
        high, error = two_sum(high, part)
        low += error + part_low
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


def exp_in_place(values, powers):  # type: ignore[no-untyped-def]
    """Replace values by their exponentials, to 2 ulp, in loops that vectorise; `powers` is scratch, int32.

    exp(x) = 2^k exp(r), |r| <= log(2)/2: a Taylor polynomial, and k added to the exponent's bits. For float64 values in
    in [-700, 0] and float32 ones in [-85, 0]. Compiled code alone can call it.
    """
    raise NotImplementedError


@overload(exp_in_place)
def _exp_in_place(values, powers):  # type: ignore[no-untyped-def]
    exponentials = _exp_32 if values.dtype == numba.float32 else _exp_64

    def in_place(values, powers):  # type: ignore[no-untyped-def]
        exponentials(values, powers)

    return in_place


@fused
def _exp_64(values, powers):  # type: ignore[no-untyped-def]
    bits = values.view(np.int64)
    for i in range(values.shape[0]):
        k = np.floor(values[i] * 1.4426950408889634 + 0.5)
        r = (values[i] - k * 0.6931471803691238) - k * 1.9082149292705877e-10  # log 2 in two parts
        p = 1.0 / 479001600.0
        p = p * r + 1.0 / 39916800.0
        p = p * r + 1.0 / 3628800.0
        p = p * r + 1.0 / 362880.0
        p = p * r + 1.0 / 40320.0
        p = p * r + 1.0 / 5040.0
        p = p * r + 1.0 / 720.0
        p = p * r + 1.0 / 120.0
        p = p * r + 1.0 / 24.0
        p = p * r + 1.0 / 6.0
        p = p * r + 0.5
        p = p * r + 1.0
        values[i] = p * r + 1.0
        powers[i] = np.int32(k)
    for i in range(values.shape[0]):
        bits[i] += np.int64(powers[i]) << 52


@fused
def _exp_32(values, powers):  # type: ignore[no-untyped-def]
    bits = values.view(np.int32)
    for i in range(values.shape[0]):
        k = np.floor(values[i] * np.float32(1.4426950408889634) + np.float32(0.5))
        r = (values[i] - k * np.float32(0.693359375)) + k * np.float32(2.12194440e-4)  # log 2 in two parts
        p = np.float32(1.0 / 5040.0)
        p = p * r + np.float32(1.0 / 720.0)
        p = p * r + np.float32(1.0 / 120.0)
        p = p * r + np.float32(1.0 / 24.0)
        p = p * r + np.float32(1.0 / 6.0)
        p = p * r + np.float32(0.5)
        p = p * r + np.float32(1.0)
        values[i] = p * r + np.float32(1.0)
        powers[i] = np.int32(k)
    for i in range(values.shape[0]):
        bits[i] += powers[i] << np.int32(23)


@njit(cache=True, parallel=True, nogil=True)
def add_four(
    total: Any, a: float, x: Any, b: float, y: Any, c: float, z: Any, d: float, w: Any
) -> None:  # pragma: no cover - compiled
    """Add a x + b y + c z + d w to the total, term by term in this order."""
    for i in prange(total.shape[0]):
        total[i] = total[i] + a * x[i] + b * y[i] + c * z[i] + d * w[i]
