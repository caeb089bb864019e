"""An independent truth: mixtures evaluated densely, in extended precision, from their raw parameters.

Nothing here calls the library's own moments. Log densities are summed as they are defined, in NumPy's long double (64
bits of significand where the platform has them), and derivatives are Ridders' extrapolated finite differences of
them, which report how accurate they are themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Real = np.longdouble


@dataclass(frozen=True)
class DenseMixture:
    """A Gaussian mixture by its definition; covariances (K, d, d), or None for point masses."""

    means: Any
    covariances: Any | None
    weights: Any

    @cached_property
    def log_weights(self) -> Any:
        """log pi, (K,)."""
        w = self.weights.astype(Real)
        with np.errstate(divide="ignore"):
            return np.log(w / w.sum())

    def log_joint(self, x: Any, alpha: float, sigma: float) -> Any:
        """Return log pi_k N(x_b; alpha mu_k, S_k), (B, K)."""
        root = self._root(alpha, sigma)
        constant = self.log_weights - (root.log_det + x.shape[1] * np.log(2 * Real(np.pi))) / 2
        return np.stack([constant - np.square(r).sum(axis=1) / 2 for r in self._whitened(root, x, alpha)])

    def log_density(self, x: Any, alpha: float, sigma: float) -> Any:
        """Return log q(x), (B,)."""
        return _log_sum_exp(self.log_joint(x, alpha, sigma))

    def weights_at(self, x: Any, alpha: float, sigma: float) -> Any:
        """Return the posterior weights, (B, K)."""
        joint = self.log_joint(x, alpha, sigma)
        return np.exp(joint - _log_sum_exp(joint)[:, None])

    def along(self, x: Any, v: Any, alpha: float, sigma: float) -> list[Line]:
        """Return the log density along the lines x + h v, one for each row."""
        root, joint = self._root(alpha, sigma), self.log_joint(x, alpha, sigma)
        white = [root.solve(np.broadcast_to(row, self.means.shape).astype(Real)) for row in v]
        residuals = self._whitened(root, x, alpha)
        return [
            Line(logits - logits.max(), np.einsum("kd,kd->k", r, w), np.square(w).sum(axis=1))
            for logits, r, w in zip(joint, residuals, white, strict=True)
        ]

    def _root(self, alpha: float, sigma: float) -> _Root:
        if self.covariances is None:
            return _Root(None, Real(sigma), 2 * self.means.shape[1] * np.log(Real(sigma)))
        eye = np.eye(self.means.shape[1], dtype=Real)
        factor = _cholesky(Real(alpha) ** 2 * self.covariances.astype(Real) + Real(sigma) ** 2 * eye)
        return _Root(factor, Real(sigma), 2 * np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1))

    def _whitened(self, root: _Root, x: Any, alpha: float) -> Iterator[Any]:
        """S_k^-1/2 (x_b - alpha mu_k), (K, d), one query at a time."""
        centres = Real(alpha) * self.means.astype(Real)
        return (root.solve(row.astype(Real) - centres) for row in x)


@dataclass(frozen=True)
class _Root:
    """A square root of every S_k: sigma I, or lower triangular factors (K, d, d)."""

    factor: Any | None
    sigma: Any
    log_det: Any

    def solve(self, r: Any) -> Any:
        """S_k^-1/2 r_k for r (K, d)."""
        if self.factor is None:
            return r / self.sigma
        y = r.copy()
        for j in range(r.shape[1]):
            y[:, j] /= self.factor[:, j, j]
            y[:, j + 1 :] -= y[:, j, None] * self.factor[:, j + 1 :, j]
        return y


def _cholesky(a: Any) -> Any:
    """Factor matrices (K, d, d) as L L^T, column by column; LAPACK has no long double."""
    for j in range(a.shape[1]):
        a[:, j:, j] /= np.sqrt(a[:, j, j])[:, None]
        a[:, j + 1 :, j + 1 :] -= a[:, j + 1 :, j, None] * a[:, None, j + 1 :, j]
    return np.tril(a)


def _log_sum_exp(logits: Any) -> Any:
    top = logits.max(axis=-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))


@dataclass(frozen=True)
class Line:
    """The log density along one line, less its value at h = 0.

    Each component's logit is a parabola there, l_k - h a_k - h^2 b_k/2 with a = v^T L r and b = v^T L v. So the log
    density is a sum of K terms for each h, without the rounding of logits that are huge at low noise.
    """

    logits: Any  # (K,), less the largest
    slopes: Any  # (K,)
    curvatures: Any  # (K,)

    def __call__(self, h: Any) -> Any:
        """Return log q(x + h v) - log q(x) for steps h (n,)."""
        h = h[:, None]
        shifted = self.logits - h * self.slopes - h * h * self.curvatures / 2
        return _log_sum_exp(shifted) - _log_sum_exp(self.logits)


@dataclass(frozen=True)
class Derivative:
    """An extrapolated finite difference (B,), and Ridders' estimate of its error (B,)."""

    value: Any
    error: Any


def derivative(lines: list[Line], order: int, scale: Any) -> Derivative:
    """Differentiate functions of one variable at 0, once or twice.

    Central differences at steps of 0.2 scale, shrinking by 1.5, are extrapolated in Neville's scheme; the entry that
    differs least from its neighbours is taken, and that difference is the error (Ridders 1982).

    Parameters
    ----------
    lines
        B functions that vanish at 0.
    order
        1 or 2.
    scale
        (B,) length over which each varies; a guess within a few orders of magnitude is enough.
    """
    ratio, levels = Real(1.5), 16
    steps = Real(0.2) * scale.astype(Real)[:, None] / ratio ** np.arange(levels)
    plus = np.stack([f(h) for f, h in zip(lines, steps, strict=True)])
    minus = np.stack([f(-h) for f, h in zip(lines, steps, strict=True)])
    table = (plus - minus) / (2 * steps) if order == 1 else (plus + minus) / steps**2
    return _extrapolate(table.T, ratio)


def _extrapolate(table: Any, ratio: Any) -> Derivative:
    best, error = table[0], np.full(table.shape[1], np.inf, dtype=Real)
    column, power = table, Real(1)
    while len(column) > 1:
        power *= ratio**2
        new = (power * column[1:] - column[:-1]) / (power - 1)
        spread = np.maximum(abs(new - column[1:]), abs(new - column[:-1]))
        row = spread.argmin(axis=0)
        picked = np.take_along_axis(spread, row[None], 0)[0]
        better = picked < error
        best = np.where(better, np.take_along_axis(new, row[None], 0)[0], best)
        error = np.where(better, picked, error)
        column = new
    return Derivative(best, error)
