"""A Gaussian model of the Fisher that learns from the trajectory, as quasi-Newton methods learn [MATH 4.6b; new]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from dfmath.integrations.data_covariance import DataCovariance, gaussian_product

if TYPE_CHECKING:
    from dfmath.integrations.trajectory import Trajectory

Tensor: TypeAlias = torch.Tensor
CURVATURE = 1e-6  # least cosine of a pair (p, q) that is taken for one of a covariance


@dataclass(frozen=True)
class Secant:
    r"""The Gaussian model, corrected so that it explains how the mean moves along the trajectory [MATH 2.2, 4.6b; new].

    Along the flow of Gaussian data dm/drho = -S eps with S = P/rho^2 = C (C + rho^2 I)^{-1}; in general there is a term
    -rho^3 grad tr F beside it, which is small at high noise and where the posterior is near Gaussian. So
    S eps = y := -dm/drho is a secant equation, in which y comes from means that the trajectory has anyway. For C it is

    .. math:: C p = q, \quad p = \epsilon - y, \quad q = \rho^2 y, \qquad
              C_+ = C - \frac{C p\, p^T C}{p^T C p} + \frac{q\, q^T}{p^T q}

    with the update of Broyden, Fletcher, Goldfarb and Shanno, and F = (C_+ + rho^2 I)^{-1} obeys 0 <= F <= I/rho^2. No
    evaluation of the network, and three products with the Gaussian model instead of one. Where p^T q or
    p^T C p is not positive this is no covariance, and the model is left as it is.

    Attributes
    ----------
    covariance
        `DataCovariance` of the data, in the dtype and on the device of the states.
    """

    covariance: DataCovariance

    def __call__(self, trajectory: Trajectory, i: int, v: Tensor) -> Tensor:
        """Return F v."""
        rho = trajectory.rho(i)
        plain, slope = self._model(rho, v), mean_slope(trajectory, i)
        if slope is None:
            return plain
        p, q = trajectory.noises[i] + slope, -(rho**2) * slope
        a = self.covariance.apply(p)
        fa, fq = self._model(rho, a), self._model(rho, q)
        # Woodbury: C+ - C has rank two. Its small matrix [[-k, m], [m, n]] is regular, for k and n are positive.
        k, m, n = rho**2 * _dot(p, fa), _dot(a, fq), _dot(p, q) + _dot(q, fq)
        good = (_dot(p, q) > CURVATURE * _size(p) * _size(q)) & (k > 0.0)
        along_a, along_q, determinant = _dot(fa, v), _dot(fq, v), torch.where(good, k * n + m**2, torch.ones_like(k))
        change = (fa * (n * along_a - m * along_q) - fq * (m * along_a + k * along_q)) / determinant
        return torch.where(good, plain + change, plain)

    def _model(self, rho: float, v: Tensor) -> Tensor:
        return gaussian_product(self.covariance, rho, v, None)


def mean_slope(trajectory: Trajectory, i: int) -> Tensor | None:
    """dm/drho along a trajectory at evaluation i, from the parabola in log rho through its neighbours' means.

    Neighbours are at other levels, which predictors of a step may not be. From one of them where there is no other, and
    None where there is none.
    """
    logs = [math.log(rho) for rho in trajectory.scheme.rhos[: len(trajectory.states)]]
    before = next((j for j in range(i - 1, -1, -1) if logs[j] > logs[i]), None)
    after = next((j for j in range(i + 1, len(logs)) if logs[j] < logs[i]), None)
    near = [j for j in (before, after) if j is not None]
    if not near:
        return None
    mean, gaps = trajectory.mean(i), [abs(logs[j] - logs[i]) for j in near]
    slopes = [(trajectory.mean(j) - mean) / (logs[j] - logs[i]) for j in near]
    weights = [1.0] if len(near) == 1 else [gaps[1] / sum(gaps), gaps[0] / sum(gaps)]
    slope: Tensor = sum(w * s for w, s in zip(weights, slopes, strict=True))
    return slope / trajectory.rho(i)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1, keepdim=True)


def _size(a: Tensor) -> Tensor:
    return a.norm(dim=1, keepdim=True)
