"""scikit-learn mixtures as priors, and priors as scikit-learn mixtures."""

from __future__ import annotations

from typing import Any

import numpy as np
from dfmath.backends._compat import to_numpy
from dfmath.backends.diagonal import Diagonal
from dfmath.backends.full import Full

from dfmath import _checks
from dfmath.priors import GaussianMixture


def mixture_from_sklearn(fitted: Any) -> GaussianMixture:
    """Return a fitted `sklearn.mixture.GaussianMixture` or `BayesianGaussianMixture` as a prior.

    Parameters
    ----------
    fitted
        Any covariance type: ``spherical``, ``diag``, ``tied`` or ``full``.

    Raises
    ------
    ValueError
        If it is not fitted, or of an unknown covariance type.
    """
    if not hasattr(fitted, "means_"):
        raise ValueError(f"mixture must be fitted before it is converted, got {type(fitted).__name__}")
    kind, covariances = fitted.covariance_type, fitted.covariances_
    if kind not in ("spherical", "diag", "tied", "full"):
        raise ValueError(f"covariance_type must be spherical, diag, tied or full, got {kind!r}")
    if kind == "tied":
        covariances = np.repeat(covariances[None], len(fitted.means_), axis=0)
    return GaussianMixture(fitted.means_, covariances, weights=fitted.weights_)


def mixture_to_sklearn(prior: GaussianMixture) -> Any:
    """Return a prior as a fitted `sklearn.mixture.GaussianMixture`, to score, predict and sample with it.

    Its covariance type is ``spherical`` where the prior has a variance, or one for each component, ``diag`` where it
    has diagonals, and ``full`` where it has matrices. A prior does not keep that components share a matrix, so that a
    ``tied`` mixture returns as ``full``, with more parameters in its `bic` and `aic`. Arrays are NumPy's, in float64.

    Parameters
    ----------
    prior
        Not singular: scikit-learn works with precisions.

    Raises
    ------
    TypeError, ValueError
        If it is no mixture, or has a component without volume.
    """
    from sklearn.mixture import GaussianMixture as Fitted

    _checks.instance("prior", prior, GaussianMixture)
    parts: Any = prior.components.tile(0, prior.count, prior.dtype)  # gathered, where a cluster holds them
    covariances = _covariances(parts)
    fitted = Fitted(prior.count, covariance_type=("spherical", "diag", "full")[covariances.ndim - 1])
    fitted.weights_ = np.exp(_numpy(parts.log_weights)[0])
    fitted.weights_ /= fitted.weights_.sum()
    fitted.means_, fitted.covariances_ = _numpy(parts.centres)[0], covariances
    roots = fitted.precisions_cholesky_ = _roots_of_precisions(covariances)
    fitted.precisions_ = roots @ roots.transpose(0, 2, 1) if roots.ndim == 3 else roots**2
    fitted.converged_, fitted.n_iter_, fitted.lower_bound_ = True, 0, -np.inf
    fitted.n_features_in_ = prior.dim
    return fitted


def _covariances(parts: Any) -> np.ndarray:
    """Variances (K,) or (K, d), or covariances (K, d, d)."""
    if isinstance(parts, Diagonal):
        variances, (count, dim) = _numpy(parts.variances)[0], parts.centres.shape[1:]
        if variances.shape[1] == 1:
            return np.broadcast_to(variances[:, 0], count).copy()
        return np.broadcast_to(variances, (count, dim)).copy()
    if isinstance(parts, Full):
        values, basis = _numpy(parts.values)[0], _numpy(parts.basis)[0]
        return (basis * values[:, None, :]) @ basis.transpose(0, 2, 1)
    diagonal, factors = _numpy(parts.diagonal)[0], _numpy(parts.factors)[0]
    return diagonal[:, :, None] * np.eye(diagonal.shape[1]) + factors @ factors.transpose(0, 2, 1)


def _roots_of_precisions(covariances: np.ndarray) -> np.ndarray:
    """Upper U with U U^T = C^-1, as scikit-learn keeps them; 1/sqrt of variances."""
    try:
        if covariances.ndim == 3:
            return np.linalg.inv(np.linalg.cholesky(covariances)).transpose(0, 2, 1)
        if (covariances <= 0.0).any():
            raise np.linalg.LinAlgError
    except np.linalg.LinAlgError:
        raise ValueError("prior must have components of positive volume, got a singular covariance") from None
    return 1.0 / np.sqrt(covariances)


def _numpy(part: Any) -> np.ndarray:
    return to_numpy(part).astype(np.float64)
