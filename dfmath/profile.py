"""How the diffusion Fisher changes along the noise levels of a data set: trace, spectrum, effective rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfmath._checks import positive_integer
from dfmath.backends._compat import to_numpy
from dfmath.marginal import Marginal
from dfmath.priors import Prior

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEN = 1e-6  # least share of the noise's variance, or of the data's, in tr P at which it is told from one point
TOGETHER = 2**22  # numbers of the matrices that are decomposed at a time: each time all points are gone through


@dataclass(frozen=True)
class LevelProfile:
    """The Fisher at one noise level, averaged over draws from q, in the canonical form rho^2 F = I - P/rho^2.

    Attributes
    ----------
    rho
        Noise-to-signal ratio.
    trace, trace_error
        Mean of tr(rho^2 F)/d, at most 1, and its standard error; NaN for a single draw.
    quantiles
        Means over the draws of the quantiles of the eigenvalues of rho^2 F, from the smallest to the largest; None
        without the spectrum.
    effective_rank, effective_rank_error
        Mean of (tr P)^2/|P|_F^2, how many directions the posterior spreads in, and its standard error. Draws with
        tr P up to 1e-6 of rho^2 and of the data's variance, one point as good as exactly, whose P is made of weights
        like 1e-200, are left out; None where all of them are, and without the spectrum.
    quantile_errors
        Standard errors of the quantiles; None without the spectrum.
    ranked
        Number of draws that the effective rank is the mean of; None without the spectrum.
    """

    rho: float
    trace: float
    trace_error: float
    quantiles: tuple[float, ...] | None
    effective_rank: float | None
    effective_rank_error: float | None
    quantile_errors: tuple[float, ...] | None = None
    ranked: int | None = None


def fisher_profile(prior: Prior, rho: float, n: int = 64, seed: int = 0, spectrum: bool = True) -> LevelProfile:
    """Return the profile of F at one noise level.

    Parameters
    ----------
    prior
        Data distribution.
    rho
        Noise-to-signal ratio.
    n, seed
        Number of draws from q, and their seed.
    spectrum
        Also decompose F and P, a d x d matrix for each draw, some at a time.
    """
    marginal = prior.diffuse(1.0, rho)
    x = marginal.sample(positive_integer("n", n), seed)
    trace = rho**2 * to_numpy(marginal.fisher(x).trace()).astype(np.float64) / prior.dim
    if not spectrum:
        return LevelProfile(rho, *_mean(trace), None, None, None)
    rows = _spectra(marginal, x)
    columns = np.transpose([np.quantile(1.0 - values / rho**2, QUANTILES) for values in rows])
    quantiles, errors = zip(*(_mean(column) for column in columns), strict=True)
    least = SEEN * min(rho**2, _variance(prior, seed))
    ranks = np.array([_effective_rank(values) for values in rows if values.sum() > least])
    rank, rank_error = _mean(ranks) if ranks.size else (None, None)
    return LevelProfile(rho, *_mean(trace), quantiles, rank, rank_error, errors, len(ranks))


def _variance(prior: Prior, seed: int) -> float:
    """Trace of the data's covariance, roughly: of some draws."""
    return float(to_numpy(prior.sample(64, seed)).astype(np.float64).var(axis=0).sum())


def _spectra(marginal: Marginal, x: Any) -> Any:
    """Eigenvalues of P at each x, (n, d)."""
    count, dim = x.shape
    step = max(1, TOGETHER // dim**2)
    parts = [marginal.fisher(x[i : i + step, :]).posterior_covariance().eigvalsh() for i in range(0, count, step)]
    return np.maximum(np.concatenate([to_numpy(part) for part in parts]).astype(np.float64), 0.0)


def _effective_rank(values: Any) -> float:
    relative = values / values.max()  # squares of the values themselves may underflow
    return float(relative.sum() ** 2 / (relative**2).sum())


def _mean(values: Any) -> tuple[float, float]:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error
