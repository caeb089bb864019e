"""Posterior moments of point masses in arbitrary precision: the truth that accuracy is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np

DIGITS = 60


@dataclass(frozen=True)
class Truth:
    """For one query: log q, m, s, F v, P v, tr F, tr P, each rounded to float64 at the very end."""

    log_density: float
    mean: Any
    score: Any
    fisher_product: Any
    covariance_product: Any
    fisher_trace: float
    covariance_trace: float


def _row(values: Any) -> list[mpmath.mpf]:
    return [mpmath.mpf(float(v)) for v in values]


def _dot(a: list[mpmath.mpf], b: list[mpmath.mpf]) -> mpmath.mpf:
    return mpmath.fdot(zip(a, b, strict=True))


def point_masses(points: Any, weights: Any, x: Any, alpha: float, sigma: float, v: Any) -> Truth:
    """Evaluate MATH 1.3 as it is written, with 60 digits."""
    with mpmath.workdps(DIGITS):
        a, s2, d = mpmath.mpf(float(alpha)), mpmath.mpf(float(sigma)) ** 2, len(x)
        ys, x, v = [_row(y) for y in points], _row(x), _row(v)
        pis = _row(weights)
        total = mpmath.fsum(pis)
        residuals = [[xj - a * yj for xj, yj in zip(x, y, strict=True)] for y in ys]
        logits = [
            mpmath.log(p / total) - _dot(r, r) / (2 * s2) if p > 0 else mpmath.ninf
            for p, r in zip(pis, residuals, strict=True)
        ]
        top = max(logits)
        raw = [mpmath.exp(value - top) if value != mpmath.ninf else mpmath.mpf(0) for value in logits]
        mass = mpmath.fsum(raw)
        w = [value / mass for value in raw]
        live = [(wi, y) for wi, y in zip(w, ys, strict=True) if wi > 0]
        mean = [mpmath.fsum(wi * y[j] for wi, y in live) for j in range(d)]
        centred = [(wi, [yj - mj for yj, mj in zip(y, mean, strict=True)]) for wi, y in live]
        trace = mpmath.fsum(wi * _dot(c, c) for wi, c in centred)
        along = [(wi * _dot(c, v), c) for wi, c in centred]
        product = [mpmath.fsum(t * c[j] for t, c in along) for j in range(d)]
        factor = a**2 / s2**2
        return Truth(
            log_density=float(top + mpmath.log(mass) - mpmath.mpf(d) / 2 * mpmath.log(2 * mpmath.pi * s2)),
            mean=np.array([float(m) for m in mean]),
            score=np.array([float((a * m - xj) / s2) for m, xj in zip(mean, x, strict=True)]),
            fisher_product=np.array([float(vj / s2 - factor * p) for vj, p in zip(v, product, strict=True)]),
            covariance_product=np.array([float(p) for p in product]),
            fisher_trace=float(d / s2 - factor * trace),
            covariance_trace=float(trace),
        )
