"""What theorems are to be checked on, from whatever describes a prior."""

from __future__ import annotations

from typing import Any

import numpy as np

from dfmath import _checks
from dfmath.backends._compat import Array, from_numpy, to_numpy
from dfmath.parameters import LowRank
from dfmath.priors import GaussianMixture, PointMasses, Prior
from dfmath.theorems.case import Model


def subject_of(value: Model | Prior | Array) -> Model:
    """Return the prior and the raw parameters that the truth is built from.

    Parameters
    ----------
    value
        A prior in memory, points (N, d), or a `Model` already.

    Raises
    ------
    TypeError, ValueError
        If it is none of these, or its data are in parts.
    """
    if isinstance(value, Model):
        return value
    prior = value if isinstance(value, Prior) else PointMasses(value)
    if prior.home.shape[0] == 0:
        raise ValueError("subject must be held in memory, got data in parts; dfmath.theorems.run.model spreads points")
    return Model(prior, *_parameters(prior), lambda values: from_numpy(np.asarray(values), prior.home), _dtype(prior))


def _parameters(prior: Prior) -> tuple[Any, Any, Any]:
    """Means, covariances and weights in float64."""
    weights = _host(prior.weights)
    if isinstance(prior, PointMasses):
        return _host(prior.points), None, weights
    _checks.instance("subject", prior, GaussianMixture)
    means = _host(prior.means)  # type: ignore[attr-defined]
    return means, _dense(prior.covariances, *means.shape), weights  # type: ignore[attr-defined]


def _dense(covariances: Any, count: int, dim: int) -> Any:
    """(K, d, d), from every form that mixtures take."""
    if isinstance(covariances, LowRank):
        factors = _host(covariances.factors)
        return _dense(covariances.diagonal, count, dim) + factors @ factors.swapaxes(1, 2)
    given: Any = _host(covariances) if hasattr(covariances, "shape") else np.float64(covariances)
    if given.ndim == 3:
        return (given + given.swapaxes(1, 2)) / 2.0
    diagonals = given[:, None] if given.ndim == 1 else given
    return np.broadcast_to(diagonals, (count, dim))[:, :, None] * np.eye(dim)


def _host(array: Array) -> Any:
    return to_numpy(array).astype(np.float64)


def _dtype(prior: Prior) -> str:
    return str(to_numpy(prior.home[:0]).dtype)
