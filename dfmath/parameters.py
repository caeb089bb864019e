"""What users give a prior, weights, centres and covariances, checked and laid out as components [MATH 1.5]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dfmath import _checks
from dfmath.backends._compat import Array, accumulation_dtype, array_namespace, is_torch_array, to_numpy
from dfmath.backends.components import Components
from dfmath.backends.diagonal import Diagonal
from dfmath.backends.full import Full
from dfmath.backends.low_rank_plus_diagonal import LowRankPlusDiagonal


@dataclass(frozen=True)
class LowRank:
    """Covariances diag(diagonal_k) + factors_k factors_k^T, for `GaussianMixture`; no d x d matrix is ever formed.

    Attributes
    ----------
    diagonal
        (K, d) zero or positive.
    factors
        (K, d, r).

    Examples
    --------
    >>> import numpy as np
    >>> from dfmath import GaussianMixture
    >>> covariances = LowRank(np.full((1, 3), 0.1), np.ones((1, 3, 1)))
    >>> prior = GaussianMixture(np.zeros((1, 3)), covariances)
    >>> prior.diffuse(1.0, 0.5).fisher(np.zeros((1, 3))).logdet().round(6)
    array([0.890684])
    """

    diagonal: Array
    factors: Array


def point_components(points: Array, logs: Array) -> Diagonal:
    """Point masses as components of no covariance."""
    still = array_namespace(points).zeros((1, 1, 1), dtype=logs.dtype, device=points.device)
    return Diagonal(points[None, ...], logs[None, :], still)


def normalised(points: Array, weights: Array | None, log_weights: Array | None) -> Array:
    """Return normalised log-weights (N,) in the accumulation dtype."""
    if weights is None and log_weights is None:
        return uniform(points, points.shape[0])
    xp, logs = array_namespace(points), log_weights_of(points, weights, log_weights)
    top = heaviest("weights" if log_weights is None else "log_weights", logs)
    return logs - top - xp.log(xp.sum(xp.exp(logs - top)))


def uniform(points: Array, count: int) -> Array:
    """Return log(1/count) for each point."""
    xp = array_namespace(points)
    return xp.full((points.shape[0],), -math.log(count), dtype=accumulation_dtype(xp, points), device=points.device)


def heaviest(name: str, logs: Array) -> Array:
    """Return the largest log-weight, or say that there is nothing to normalise."""
    top = array_namespace(logs).max(logs)
    if bool(top == -math.inf):
        raise ValueError(f"{name} must give some point positive weight, got zero for all {logs.shape[0]}")
    return top


def log_weights_of(points: Array, weights: Array | None, log_weights: Array | None) -> Array:
    """Return log-weights (N,) in the accumulation dtype, as they were given in one of the two ways."""
    xp = array_namespace(points)
    dtype = accumulation_dtype(xp, points)
    if weights is not None and log_weights is not None:
        raise ValueError("weights and log_weights must not both be given, got both")
    name, given = ("weights", weights) if weights is not None else ("log_weights", log_weights)
    n = points.shape[0]
    _checks.real_array(name, given, f"({n},)", 1)
    _checks.same_home(points=points, **{name: given})
    if given.shape[0] != n:  # type: ignore[union-attr]
        raise ValueError(f"{name} must have shape ({n},), one for each point, got {_checks.describe(given)}")
    logs = xp.astype(given, dtype)
    if weights is not None:
        _check_entries(name, logs, xp.isfinite(logs) & (logs >= 0), "non-negative and finite")
        zero = logs == 0
        logs = xp.where(zero, -xp.inf, xp.log(xp.where(zero, xp.ones_like(logs), logs)))
    _check_entries(name, logs, ~xp.isnan(logs) & (logs < xp.inf), "finite or -inf")
    return logs


def _check_entries(name: str, values: Array, good: Array, expected: str, unit: str = "row") -> None:
    """Raise unless all entries are good; name the first row that is not, unless the unit is empty."""
    flags = to_numpy(good)
    if not flags.all():
        row = int(flags.reshape(len(flags), -1).all(axis=1).argmin())
        worst = to_numpy(values)[row]
        shown = f"{worst:g}" if worst.ndim == 0 else f"{worst[~flags[row]].ravel()[0]:g}"
        raise ValueError(
            f"{name} must be {expected}, got {shown}" + (f" in {unit} {_checks.counted(row)}" if unit else "")
        )


def mixture_components(means: Array, logs: Array, covariances: Any) -> Components:
    """Choose the covariance form from the shape given."""
    xp = array_namespace(means)
    count, dim = means.shape
    centres, logs = means[None, ...], logs[None, :]
    if isinstance(covariances, LowRank):
        return _low_rank(centres, logs, covariances)
    if _checks.is_number(covariances):
        number = _checks.real_number("covariances", covariances)
        covariances = xp.asarray(number, dtype=logs.dtype, device=means.device)
    shapes = f"a scalar, ({count},), ({count}, {dim}), ({count}, {dim}, {dim}) or LowRank"
    _checks.namespace("covariances", covariances, f"{shapes}, as an array where not a scalar")
    ndim = covariances.ndim
    _checks.real_array("covariances", covariances, shapes, ndim)
    _checks.same_home(means=means, covariances=covariances)
    if tuple(covariances.shape) != (count, dim, dim)[:ndim]:
        raise ValueError(f"covariances must be {shapes}, got {_checks.describe(covariances)}")
    values = xp.astype(covariances, logs.dtype)
    if ndim == 3:
        return _full(centres, logs, values)
    variances = xp.reshape(values, (1, 1, 1) if ndim == 0 else (1, count, 1) if ndim == 1 else (1, count, dim))
    rows = xp.reshape(variances, (variances.shape[1], variances.shape[2]))
    good, unit = xp.isfinite(rows) & (rows >= 0), "component" if ndim else ""
    _check_entries("covariances", rows, good, "non-negative and finite", unit)
    return Diagonal(centres, logs, variances)


def _full(centres: Array, logs: Array, matrices: Array) -> Full:
    xp = array_namespace(centres)
    _checks.finite_rows("covariances", matrices, "component")
    scale = xp.max(xp.abs(matrices), axis=(1, 2))
    eps = xp.finfo(centres.dtype).eps
    skew = xp.max(xp.abs(matrices - xp.matrix_transpose(matrices)), axis=(1, 2))
    _check_components(skew <= 8 * eps * scale, "symmetric", skew)
    matrices = _differentiable("covariances", matrices)
    values, basis = xp.linalg.eigh((matrices + xp.matrix_transpose(matrices)) / 2)
    rounding = centres.shape[2] * eps * scale
    _check_components(values[:, 0] >= -rounding, "positive semidefinite", values[:, 0])
    return Full(centres, logs, xp.where(values < 0, xp.zeros_like(values), values)[None, ...], basis[None, ...])


def _differentiable(name: str, matrices: Array) -> Array:
    """Torch tensors: the derivative of an eigen-decomposition is not defined where eigenvalues coincide."""
    if not is_torch_array(matrices):
        return matrices
    from dfmath.backends.torch_device import refuse_nan_gradients

    sentence = "must have distinct eigenvalues (singular values, for factors) to be differentiated, got equal ones"
    return refuse_nan_gradients(matrices, f"{name} {sentence}; use diagonal covariances, or separate them")


def _check_components(good: Array, expected: str, measured: Array) -> None:
    flags = to_numpy(good)
    if not flags.all():
        k = int(flags.argmin())
        what = "asymmetry" if expected == "symmetric" else "smallest eigenvalue"
        raise ValueError(
            f"covariances must be {expected}, got {what} {to_numpy(measured)[k]:.3g} in component {_checks.counted(k)}"
        )


def _low_rank(centres: Array, logs: Array, given: LowRank) -> LowRankPlusDiagonal:
    xp = array_namespace(centres)
    _, count, dim = centres.shape
    _checks.real_array("covariances.diagonal", given.diagonal, f"({count}, {dim})", 2)
    _checks.real_array("covariances.factors", given.factors, f"({count}, {dim}, r)", 3)
    parts = {"covariances.diagonal": given.diagonal, "covariances.factors": given.factors}
    _checks.same_home(means=centres, **parts)
    if tuple(given.diagonal.shape) != (count, dim):
        raise ValueError(
            f"covariances.diagonal must have shape ({count}, {dim}), got {_checks.describe(given.diagonal)}"
        )
    if tuple(given.factors.shape[:2]) != (count, dim) or given.factors.shape[2] < 1:
        raise ValueError(
            f"covariances.factors must have shape ({count}, {dim}, r), got {_checks.describe(given.factors)}"
        )
    diagonal, factors = xp.astype(given.diagonal, logs.dtype), xp.astype(given.factors, logs.dtype)
    good = xp.isfinite(diagonal) & (diagonal >= 0)
    _check_entries("covariances.diagonal", diagonal, good, "non-negative and finite", "component")
    _checks.finite_rows("covariances.factors", factors, "component")
    factors = _differentiable("covariances.factors", factors)
    return LowRankPlusDiagonal(centres, logs, diagonal[None, ...], factors[None, ...])
