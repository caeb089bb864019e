"""Posterior moments in arbitrary precision: the truth that accuracy is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np

DIGITS = 60
Vector = list[mpmath.mpf]


@dataclass(frozen=True)
class Truth:
    """For one query: log q, m, s, F v, P v, tr F, tr P, each rounded to float64 at the very end.

    `sizes` holds, for each of them, the sum of the norms of the terms that it is a sum of: where terms cancel (the
    score midway between two points is zero), rounding can only be small beside this.
    """

    log_density: float
    mean: Any
    score: Any
    fisher_product: Any
    covariance_product: Any
    fisher_trace: float
    covariance_trace: float
    sizes: dict[str, float]


def point_masses(
    points: Any, weights: Any, x: Any, alpha: float, sigma: float, v: Any, log_weights: Any = None
) -> Truth:
    """Evaluate MATH 1.3 as it is written, with 60 digits."""
    with mpmath.workdps(DIGITS):
        a, s2, d = mpmath.mpf(float(alpha)), mpmath.mpf(float(sigma)) ** 2, len(x)
        ys, x, v = [_row(y) for y in points], _row(x), _row(v)
        scores = [[(a * yj - xj) / s2 for xj, yj in zip(x, y, strict=True)] for y in ys]
        squares = [_square(s) for s in scores]
        logs = _log_weights(weights, log_weights)
        log_sum, w, live = _softmax([log - s2 * square / 2 for log, square in zip(logs, squares, strict=True)])
        ys, scores, squares = ([part[i] for i in live] for part in (ys, scores, squares))
        mean, product, trace, product_size = _spread(w, ys, v)
        factor = a**2 / s2**2
        v_size = mpmath.sqrt(_square(v))
        return Truth(
            log_density=float(log_sum - mpmath.mpf(d) / 2 * mpmath.log(2 * mpmath.pi * s2)),
            mean=_rounded(mean),
            score=_rounded(_average(w, scores)),
            fisher_product=_rounded([vj / s2 - factor * p for vj, p in zip(v, product, strict=True)]),
            covariance_product=_rounded(product),
            fisher_trace=float(d / s2 - factor * trace),
            covariance_trace=float(trace),
            sizes={
                "log_density": 1.0,
                "mean": float(_dot(w, [mpmath.sqrt(_square(y)) for y in ys])),
                "score": float(_dot(w, [mpmath.sqrt(square) for square in squares])),
                "fisher_product": float(v_size / s2 + factor * product_size),
                "covariance_product": float(product_size),
                "fisher_trace": float(d / s2 + factor * trace),
                "covariance_trace": float(trace),
            },
        )


def mixture(means: Any, covariances: Any, log_weights: Any, x: Any, alpha: float, sigma: float, v: Any) -> Truth:
    """Evaluate MATH 1.5 as it is written, with 60 digits; covariances (K, d, d), of floats or of mpmath numbers."""
    with mpmath.workdps(DIGITS):
        a, s2 = mpmath.mpf(float(alpha)), mpmath.mpf(float(sigma)) ** 2
        x, v = mpmath.matrix(_row(x)), mpmath.matrix(_row(v))
        parts = [_component(m, c, x, a, s2, v) for m, c in zip(means, covariances, strict=True)]
        logs = _log_weights(None, log_weights)
        log_sum, w, live = _softmax([log + part.log_density for log, part in zip(logs, parts, strict=True)])
        parts = [parts[i] for i in live]
        score, score_product, score_trace, score_size = _spread(w, [part.score for part in parts], list(v))
        mean, mean_product, mean_trace, mean_size = _spread(w, [part.mean for part in parts], list(v))
        precision = _average(w, [part.precision_product for part in parts])
        covariance = _average(w, [part.covariance_product for part in parts])
        precision_trace = _dot(w, [part.precision_trace for part in parts])
        covariance_trace = _dot(w, [part.covariance_trace for part in parts])
        return Truth(
            log_density=float(log_sum),
            mean=_rounded(mean),
            score=_rounded(score),
            fisher_product=_rounded([p - c for p, c in zip(precision, score_product, strict=True)]),
            covariance_product=_rounded([p + c for p, c in zip(covariance, mean_product, strict=True)]),
            fisher_trace=float(precision_trace - score_trace),
            covariance_trace=float(covariance_trace + mean_trace),
            sizes={
                "log_density": 1.0,
                "mean": float(_dot(w, [mpmath.sqrt(_square(part.mean)) for part in parts])),
                "score": float(_dot(w, [mpmath.sqrt(_square(part.score)) for part in parts])),
                "fisher_product": float(mpmath.sqrt(_square(precision)) + score_size),
                "covariance_product": float(mpmath.sqrt(_square(covariance)) + mean_size),
                "fisher_trace": float(precision_trace + score_trace),
                "covariance_trace": float(covariance_trace + mean_trace),
            },
        )


@dataclass(frozen=True)
class _Component:
    log_density: mpmath.mpf
    score: Vector
    mean: Vector
    precision_product: Vector
    covariance_product: Vector
    precision_trace: mpmath.mpf
    covariance_trace: mpmath.mpf


def _component(mu: Any, c: Any, x: Any, alpha: mpmath.mpf, s2: mpmath.mpf, v: Any) -> _Component:
    """N(mu, C) seen at x: its log density, s_k, m_k, L_k v, P_k v and traces."""
    mu, c = mpmath.matrix(_row(mu)), mpmath.matrix([_row(row) for row in c])
    s = alpha**2 * c + s2 * mpmath.eye(len(x))
    precision = mpmath.inverse(s)
    r = x - alpha * mu
    score = -precision * r
    posterior = c - alpha**2 * c * precision * c
    log_det = mpmath.log(mpmath.det(s)) + len(x) * mpmath.log(2 * mpmath.pi)
    return _Component(
        log_density=-((r.T * precision * r)[0] + log_det) / 2,
        score=list(score),
        mean=list(mu - alpha * c * score),
        precision_product=list(precision * v),
        covariance_product=list(posterior * v),
        precision_trace=mpmath.fsum(precision[i, i] for i in range(len(x))),
        covariance_trace=mpmath.fsum(posterior[i, i] for i in range(len(x))),
    )


def _spread(w: Vector, vectors: list[Vector], v: Vector) -> tuple[Vector, Vector, mpmath.mpf, mpmath.mpf]:
    """Return E[u], Cov[u] v, tr Cov[u], and the size of the terms of Cov[u] v."""
    mean = _average(w, vectors)
    centred = [[uj - mj for uj, mj in zip(u, mean, strict=True)] for u in vectors]
    along = [wi * _dot(c, v) for wi, c in zip(w, centred, strict=True)]
    squares = [_square(c) for c in centred]
    size = mpmath.fsum(abs(t) * mpmath.sqrt(c2) for t, c2 in zip(along, squares, strict=True))
    return mean, _average(along, centred), _dot(w, squares), size


def _row(values: Any) -> Vector:
    return [v if isinstance(v, mpmath.mpf) else mpmath.mpf(float(v)) for v in values]


def _dot(a: Vector, b: Vector) -> mpmath.mpf:
    return mpmath.fdot(zip(a, b, strict=True))


def _square(vector: Vector) -> mpmath.mpf:
    return _dot(vector, vector)


def _average(weights: Vector, vectors: list[Vector]) -> Vector:
    return [_dot(weights, column) for column in zip(*vectors, strict=True)]


def _rounded(vector: Vector) -> Any:
    return np.array([float(c) for c in vector])


def _log_weights(weights: Any, log_weights: Any) -> Vector:
    """Return normalised logarithms of the weights, -inf for zero."""
    if log_weights is None:
        given = [mpmath.log(p) if p > 0 else mpmath.ninf for p in _row(weights)]
    else:
        given = _row(log_weights)
    total, _, _ = _softmax(given)
    return [value - total for value in given]


def _softmax(logits: Vector) -> tuple[mpmath.mpf, Vector, list[int]]:
    """Return log sum exp, the weights that are not zero, and where they stand."""
    top = max(logits)
    live = [i for i, value in enumerate(logits) if value > mpmath.ninf]
    raw = [mpmath.exp(logits[i] - top) for i in live]
    mass = mpmath.fsum(raw)
    return top + mpmath.log(mass), [value / mass for value in raw], live
