"""Likelihoods of points that a prior may not have seen, at one noise level after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfmath.backends._compat import to_numpy
from dfmath.priors import Prior


@dataclass(frozen=True)
class LevelLikelihood:
    """Log densities of points under q at one noise level, alpha = 1.

    Attributes
    ----------
    rho
        Noise-to-signal ratio.
    log_density
        (n,) in nats, of whole points: NumPy, float64.
    dim
        d.
    """

    rho: float
    log_density: Any
    dim: int

    @property
    def nats(self) -> float:
        """Mean of -log q(x)/d, in nats per dimension."""
        return float(-self.log_density.mean() / self.dim)

    @property
    def bits(self) -> float:
        """The same in bits per dimension, of a density: coordinates have no bins."""
        return self.nats / math.log(2.0)

    @property
    def error(self) -> float:
        """Standard error of `nats` over the points; NaN for a single one."""
        n = len(self.log_density)
        return float(self.log_density.std(ddof=1) / math.sqrt(n) / self.dim) if n > 1 else math.nan

    def as_dict(self) -> dict[str, Any]:
        """The summary, for JSON."""
        return {"rho": self.rho, "nats per dimension": self.nats, "standard error": self.error}


def likelihood_at(prior: Prior, x: Any, rho: float) -> LevelLikelihood:
    r"""Return log q_rho(x) of points as they are given, no noise added [MATH 1.1].

    .. math:: q_\rho(x) = \sum_n w_n N(x;\, y_n, \rho^2 I)

    for point masses: the estimate of a density by Gaussian kernels of width rho. Its mean over points that the prior
    has not seen is largest where the width suits the data.

    Parameters
    ----------
    prior
        Data distribution.
    x
        (n, d).
    rho
        Noise-to-signal ratio.

    Raises
    ------
    TypeError, ValueError
        If the points do not fit the prior, or rho is out of range.

    Examples
    --------
    >>> from dfmath import GaussianMixture
    >>> found = likelihood_at(GaussianMixture(np.zeros((1, 1)), 3.0), np.array([[0.0]]), 1.0)
    >>> round(found.nats, 6) == round(0.5 * math.log(2 * math.pi * 4.0), 6)
    True
    """
    found = prior.diffuse(1.0, rho).log_density(x)
    return LevelLikelihood(rho, to_numpy(found).astype(np.float64), prior.dim)


def halves(points: Any, seed: int) -> tuple[Any, Any]:
    """Return a random half of the points, and the others, each in their order."""
    if len(points) < 2:
        raise ValueError(f"points must be at least two, to hold some of them out, got {len(points)}")
    order = np.random.default_rng(seed).permutation(len(points))
    return points[np.sort(order[: len(points) // 2])], points[np.sort(order[len(points) // 2 :])]
