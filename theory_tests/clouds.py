"""Clusters of near points on and off the origin, their exact logits, and what the backend is asked about them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from dfmath.backends.index import index_of
from dfmath.backends.request import Request
from hypothesis import strategies as st

from dfmath import PointMasses


def cloud(seed, count, dim, offset, scale, dtype):
    """Clusters of near points, on and off the origin."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, count // 8), dim))
    points = np.repeat(centres, 8, axis=0)[:count] + 0.01 * rng.standard_normal((min(count, 8 * len(centres)), dim))
    return (offset + scale * points).astype(dtype)


def exact_logits(points, logs, x, alpha, sigma):
    """From differences rounded once, in extended precision."""
    spread = np.longdouble(sigma) ** 2
    squares = (exact_residuals(x, alpha, points) ** 2).sum(axis=2)
    return logs - (squares / spread + points.shape[1] * np.log(2 * np.longdouble(np.pi) * spread)) / 2


def exact_residuals(x, alpha, points):
    """x - alpha y for all pairs, (B, N, d), rounded once: their terms may cancel to any depth."""
    a = Fraction(alpha)
    scaled = [[a * Fraction(float(value)) for value in row] for row in points]
    rows = [[[Fraction(float(u)) - w for u, w in zip(at, y, strict=True)] for y in scaled] for at in x]
    return np.array([[[rounded(r) for r in y] for y in row] for row in rows], dtype=np.longdouble)


def rounded(value):
    high = float(value)
    return np.longdouble(high) + np.longdouble(float(value - Fraction(high)))


clouds = {
    "seed": st.integers(0, 2**20),
    "count": st.integers(1, 24),
    "dim": st.sampled_from([1, 2, 7, 100]),
    "offset": st.sampled_from([0.0, 3.0, -1e4]),
    "scale": st.sampled_from([1e-20, 1e-3, 1.0, 255.0, 1e12]),
    "noise": st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 30.0]),
    "dtype": st.sampled_from([np.float32, np.float64]),
}


def asked(points, x, alpha, sigma, precision=0.0, tolerance=1e-20, weights=None):
    """The log density of point masses, and nothing else."""
    ones, components = np.ones(len(x)), PointMasses(points, weights).components
    ask = Request(x, components, alpha * ones, sigma * ones, frozenset(), "score", None, tolerance, precision)
    return ask.about(index_of(components))
