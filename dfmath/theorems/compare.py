"""Turning two sides of a statement into one number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dfmath.theorems.registry import Outcome
from dfmath.theorems.truth import Derivative

STANDARD_ERRORS = 6.0


def length(values: Any) -> Any:
    """Euclidean norm of each row, flattened, in float64."""
    return np.sqrt((values.reshape(len(values), -1).astype(np.float64) ** 2).sum(axis=1))


def relative(got: Any, true: Any, scale: Any) -> float:
    """Return the largest |got - true|/scale over the rows; anything that is not a number counts as infinite."""
    difference = length(got - true)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(difference == 0, 0.0, difference / scale)
    worst = float(np.max(ratio))
    return math.inf if math.isnan(worst) else worst


def excess(value: Any, bound: Any, scale: Any) -> float:
    """Return by how much value exceeds its upper bound, relative to scale; 0 where it does not."""
    worst = float(np.max((np.asarray(value) - bound) / scale))
    return math.inf if math.isnan(worst) else max(worst, 0.0)


def against_derivative(got: Any, true: Derivative, scale: Any, precision: float) -> Outcome:
    """Compare with an extrapolated finite difference, which knows its own error; a blurred one cannot pass anything."""
    discrepancy = relative(got[:, None], true.value[:, None], scale)
    blur = float(np.max(true.error / scale))
    reason = f"{precision:.0e} promised, plus ten times the finite difference's own error, {blur:.0e}"
    return Outcome(discrepancy, precision + 10.0 * min(blur, 1e-5), reason)


def standard_errors(samples: Any, expected: Any = 0.0, slack: float = 0.0) -> Outcome:
    """Return how many standard errors the mean of samples (n, ...) is off, at worst, beyond a known absolute error."""
    samples = samples.reshape(len(samples), -1).astype(np.float64)
    mean, error = samples.mean(axis=0), samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
    off = np.maximum(np.abs(mean - np.reshape(expected, -1)) - slack, 0.0)
    return _in_errors(off, error, len(samples))


def sampled(draws: Any, values: Any, weights: Any, slack: float = 0.0) -> Outcome:
    """Compare averages of draws (n, B) with zero, allowing what Bernstein's inequality does for discrete values.

    Where rare values carry the variance, standard errors from the draws say nothing. The values (B, N) and weights
    (B, N) of the whole distribution bound a deviation that happens by chance once in 1e9.
    """
    n, log_chance = len(draws), math.log(2e9)
    weights = weights.astype(np.float64)
    seen = np.where(n * weights > 1e-12, np.abs(values), 0.0)
    variance = (weights * values**2).sum(axis=1)
    allowed = np.sqrt(2 * variance * log_chance / n) + 2 * seen.max(axis=1) * log_chance / (3 * n) + slack
    off = np.abs(draws.mean(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(off == 0, 0.0, off / allowed)
    return Outcome(float(ratio.max()), 1.0, f"Bernstein's bound for {n} draws, passed by chance once in 1e9")


def exceeds(samples: Any, bound: float, slack: float = 0.0) -> Outcome:
    """Return by how many standard errors the mean of samples (n,) exceeds an upper bound."""
    error = float(samples.std(ddof=1)) / math.sqrt(len(samples))
    return _in_errors(np.maximum(samples.mean() - bound - slack, 0.0), np.asarray(error), len(samples))


def _in_errors(off: Any, error: Any, n: int) -> Outcome:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(off == 0, 0.0, off / error)
    worst = float(np.max(ratio))
    reason = f"standard errors of an average over {n} samples; beyond 6 by chance once in 5e8"
    return Outcome(math.inf if math.isnan(worst) else worst, STANDARD_ERRORS, reason)
