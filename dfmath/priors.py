"""Data distributions q0 with a closed form: point masses and Gaussian mixtures [MATH 1.3-1.5]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from dfmath import _checks
from dfmath.backends import cluster
from dfmath.backends._compat import Array, accumulation_dtype, array_namespace, is_torch_array, to_numpy
from dfmath.backends.components import Components, Diagonal, Full, LowRankPlusDiagonal
from dfmath.draws import draw_prior
from dfmath.marginal import Marginal


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
    >>> covariances = LowRank(np.full((1, 3), 0.1), np.ones((1, 3, 1)))
    >>> prior = GaussianMixture(np.zeros((1, 3)), covariances)
    >>> prior.diffuse(1.0, 0.5).fisher(np.zeros((1, 3))).logdet().round(6)
    array([0.890684])
    """

    diagonal: Array
    factors: Array


class Prior:
    """A mixture with known components; see `PointMasses` and `GaussianMixture`."""

    def __init__(self, components: Components, home: Array) -> None:
        self._components = components
        self._home = home  # an array of the caller's, for its namespace, dtype and device

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.count} components in {self.dim} dimensions, dtype {self.dtype}>"

    @property
    def dim(self) -> int:
        """Dimension d of the data."""
        return self._components.dim

    @property
    def count(self) -> int:
        """Number of components."""
        return self._components.count

    @property
    def dtype(self) -> Any:
        """Dtype of the data, and of samples."""
        return self._home.dtype

    @property
    def weights(self) -> Array:
        """Normalised weights pi, (N,)."""
        return array_namespace(self._home).exp(self._components.log_weights[0, :])

    @property
    def components(self) -> Components:
        """The components as the backends see them."""
        return self._components

    def cluster(self, count: int | None = None, seed: int = 0) -> Self:
        """Sort the components into k-means clusters, so that evaluations at low noise look at near ones alone.

        Worth its time, a few products of all points with the centres, for data in few dimensions or in real clusters.
        Clusters whose balls are too far away are left out as a whole, which is certified as `tolerance` is [MATH 4.8];
        results change by rounding only. It has no effect but on NumPy arrays and components of one variance.

        Parameters
        ----------
        count
            Number of clusters; 2 sqrt(N) by default.
        seed
            Seed of the points that the centres start from.

        Returns
        -------
        Prior
            This prior.

        Raises
        ------
        TypeError, ValueError
            If `count` is not a positive integer, or `seed` not a non-negative one.

        Examples
        --------
        >>> import numpy as np
        >>> prior = PointMasses(np.random.default_rng(0).standard_normal((1000, 2))).cluster()
        >>> prior.diffuse(1.0, 0.01).posterior_mean(np.zeros((1, 2))).shape
        (1, 2)
        """
        count = None if count is None else _checks.positive_integer("count", count)
        cluster(self._home, self._components, count, _checks.random_seed(seed))
        return self

    def sample(self, n: int, seed: int) -> Array:
        """Draw x0 from the prior.

        Parameters
        ----------
        n
            Number of samples.
        seed
            Seed of a NumPy PCG64 generator; the same seed gives the same samples in every namespace.

        Returns
        -------
        Array
            (n, d).
        """
        rng, n = np.random.default_rng(_checks.random_seed(seed)), _checks.positive_integer("n", n)
        _checks.fits_in_memory("the samples", n, self.dim, instead="draw fewer with smaller n")
        return array_namespace(self._home).astype(draw_prior(self._components, self._home, n, rng), self.dtype)

    def diffuse(self, alpha: float | Array, sigma: float | Array, tolerance: float | None = None) -> Marginal:
        """Return the density q of x = alpha x0 + sigma eps.

        Parameters
        ----------
        alpha, sigma
            Numbers or 0-d arrays, or (B,) with one noise level for each query. ``prior.diffuse(*schedule(t))``.
        tolerance
            Posterior mass that may be left out of moments, and precision that arithmetic must have for what is not.
            By default both follow from the results' dtype: float64 is right to about 1e-10 and float32 to 1e-5, with
            matrix products in that dtype where an estimate of their rounding allows it. What the worst case could
            be, `error_bound` says; a small tolerance makes that bound tight for float32 results, too.

        Raises
        ------
        TypeError, ValueError
            If alpha or sigma is not positive, or sigma is 0 where a component's covariance is singular.
        """
        return Marginal(self._components, self._home, alpha, sigma, tolerance)


class PointMasses(Prior):
    """Empirical data q0 = sum_i pi_i delta(y_i) [MATH 1.3; paper, Prop. 1].

    Parameters
    ----------
    points
        (N, d) float32 or float64 array of any array-API namespace. It is kept as it is, not copied.
    weights, log_weights
        (N,) non-negative weights, or their logarithms (-inf for zero); normalised inside. Uniform if neither is given.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes, devices or values do not fit; the message names the argument and the row.

    Examples
    --------
    >>> import numpy as np
    >>> prior = PointMasses(np.array([[0.0], [1.0]]))
    >>> q = prior.diffuse(alpha=1.0, sigma=0.5)
    >>> q.posterior_mean(np.array([[0.5]]))
    array([[0.5]])
    """

    def __init__(self, points: Array, weights: Array | None = None, log_weights: Array | None = None) -> None:
        _checks.points("points", points)
        logs = _normalised(points, weights, log_weights)
        xp = array_namespace(points)
        still = xp.zeros((1, 1, 1), dtype=logs.dtype, device=points.device)
        super().__init__(Diagonal(points[None, ...], logs[None, :], still), points)

    @property
    def points(self) -> Array:
        """The data, (N, d)."""
        return self._home

    @classmethod
    def from_file(cls, path: str | Path) -> PointMasses:
        """Read points from a ``.npy`` file (N, d), or ``points`` and optionally ``weights`` from an ``.npz``.

        A ``.npy`` file is memory-mapped. Pickled arrays are refused.
        """
        from dfmath.datasets import load_arrays

        arrays = load_arrays(path, required=("points",), optional=("weights", "log_weights"))
        with _checks.on_behalf_of(f"file {str(path)!r}"):
            return cls(**arrays)


class GaussianMixture(Prior):
    """Gaussian mixture q0 = sum_k pi_k N(mu_k, C_k) [MATH 1.5].

    Parameters
    ----------
    means
        (K, d) float32 or float64 array of any array-API namespace.
    covariances
        A scalar variance; (K,) one for each component; (K, d) diagonals; (K, d, d) full matrices; or
        `LowRank` (diagonal plus low rank). Positive semidefinite; zero is allowed.
    weights, log_weights
        (K,), as for `PointMasses`.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes, devices or values do not fit; a covariance that is not symmetric or not positive
        semidefinite is named by its component. Eigenvalues below zero by no more than rounding, d eps times the
        largest, count as zero.

    Examples
    --------
    >>> import numpy as np
    >>> prior = GaussianMixture(np.zeros((1, 2)), 1.0)
    >>> prior.diffuse(1.0, 1.0).fisher(np.ones((1, 2))).trace()
    array([1.])
    """

    def __init__(
        self,
        means: Array,
        covariances: float | Array | LowRank,
        weights: Array | None = None,
        log_weights: Array | None = None,
    ) -> None:
        _checks.points("means", means, "(K, d)")
        logs = _normalised(means, weights, log_weights)
        super().__init__(_components(means, logs, covariances), means)

    @property
    def means(self) -> Array:
        """The components' means, (K, d)."""
        return self._home

    @classmethod
    def from_file(cls, path: str | Path) -> GaussianMixture:
        """Read ``means``, ``covariances`` and optionally ``weights`` from an ``.npz`` file; pickles are refused."""
        from dfmath.datasets import load_arrays

        arrays = load_arrays(path, required=("means", "covariances"), optional=("weights", "log_weights"))
        with _checks.on_behalf_of(f"file {str(path)!r}"):
            return cls(**arrays)


def _normalised(points: Array, weights: Array | None, log_weights: Array | None) -> Array:
    """Return normalised log-weights (N,) in the accumulation dtype."""
    xp = array_namespace(points)
    dtype = accumulation_dtype(xp, points)
    if weights is not None and log_weights is not None:
        raise ValueError("weights and log_weights must not both be given, got both")
    if weights is None and log_weights is None:
        return xp.full((points.shape[0],), -math.log(points.shape[0]), dtype=dtype, device=points.device)
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
    top = xp.max(logs)
    if bool(top == -math.inf):
        raise ValueError(f"{name} must give some point positive weight, got zero for all {n}")
    return logs - top - xp.log(xp.sum(xp.exp(logs - top)))


def _check_entries(name: str, values: Array, good: Array, expected: str, unit: str = "row") -> None:
    """Raise unless all entries are good; name the first row that is not, unless the unit is empty."""
    flags = to_numpy(good)
    if not flags.all():
        row = int(flags.reshape(len(flags), -1).all(axis=1).argmin())
        worst = to_numpy(values)[row]
        shown = f"{worst:g}" if worst.ndim == 0 else f"{worst[~flags[row]].ravel()[0]:g}"
        raise ValueError(f"{name} must be {expected}, got {shown}" + (f" in {unit} {row}" if unit else ""))


def _components(means: Array, logs: Array, covariances: Any) -> Components:
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
        raise ValueError(f"covariances must be {expected}, got {what} {to_numpy(measured)[k]:.3g} in component {k}")


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
