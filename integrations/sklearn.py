"""scikit-learn mixtures as priors."""

from __future__ import annotations

from typing import Any

import numpy as np

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
