"""Data distributions q0 with a closed form: point masses and Gaussian mixtures [MATH 1.3-1.5]."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from dfmath import _checks, scattered
from dfmath.backends import cluster
from dfmath.backends._compat import Array, array_namespace, beside, is_dask_array
from dfmath.backends.components import Components
from dfmath.draws import draw_prior
from dfmath.marginal import Marginal
from dfmath.parameters import LowRank, mixture_components, normalised, point_components
from dfmath.row_files import RowFile, open_rows


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
    def home(self) -> Array:
        """An array of the namespace, the dtype and the device that queries are to have; empty for data in parts."""
        return self._home

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
        self._points = points
        if is_dask_array(points):
            parts = scattered.point_parts(points, weights, log_weights)
            super().__init__(parts, parts.outline.home)
        else:
            _checks.points("points", points)
            super().__init__(point_components(points, normalised(points, weights, log_weights)), points)

    @classmethod
    def _streamed(cls, rows: RowFile, weights: Any, log_weights: Any, like: Array | None) -> Self:
        """A prior whose points stay in their file."""
        prior, parts = cls.__new__(cls), scattered.streamed_parts(rows, weights, log_weights, like)
        Prior.__init__(prior, parts, parts.outline.home)
        prior._points = rows
        return prior

    @property
    def points(self) -> Array:
        """The data, (N, d): as they were given, or where they are in a file, to be read by slices of rows."""
        return self._points

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        column: str | None = None,
        weights: Array | None = None,
        log_weights: Array | None = None,
        memory: int = 2**30,
        like: Array | None = None,
    ) -> PointMasses:
        """Read points from a file, or where they are more than `memory` holds, read them anew at each evaluation.

        Results are the same up to rounding. Points that stay in their file are read by rows while the rows before them
        are worked on, 64 MiB at a time; they are checked as they are read. Many queries in one call share one reading.

        Parameters
        ----------
        path
            A ``.npy`` file (N, d), an ``.npz`` with ``points`` and optionally ``weights``, which is always loaded,
            a Zarr store (a folder) that holds one array, or a ``.parquet`` file with a column of lists.
        column
            Column of a Parquet file, where it has several.
        weights, log_weights
            (N,) NumPy arrays, as for `PointMasses`; not for an ``.npz``, which holds its own.
        memory
            Largest size in bytes of points that are loaded.
        like
            An array of the library and on the device to compute with, such as ``torch.empty(0, device="cuda")``; points
            go there as they are read. NumPy if not given. Not for an ``.npz``.

        Raises
        ------
        TypeError, ValueError
            If the file does not exist, is damaged, or holds pickled objects or other than float32 or float64 points.
            Evaluations raise it where a row is not finite, naming it, or where the file has become shorter.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np
        >>> path = tempfile.mkdtemp() + "/points.npy"
        >>> np.save(path, np.eye(3))
        >>> PointMasses.from_file(path, memory=0).diffuse(1.0, 0.5).score(np.zeros((1, 3))).round(3)
        array([[1.333, 1.333, 1.333]])
        """
        from dfmath.datasets import holds_named_arrays, load_arrays

        _checks.instance("memory", memory, int)
        if holds_named_arrays(path):
            arrays = load_arrays(path, required=("points",), optional=("weights", "log_weights"))
            with _checks.on_behalf_of(f"file {str(path)!r}"):
                return cls(**arrays)
        rows = open_rows(path, column)
        with _checks.on_behalf_of(f"file {str(path)!r}"):
            if rows.nbytes <= memory:
                given = (rows[:], weights, log_weights)
                return cls(*given) if like is None else cls(*(None if a is None else beside(a, like) for a in given))
            return cls._streamed(rows, weights, log_weights, like)


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
        self._means, self._covariances = means, covariances
        if is_dask_array(means):
            parts = scattered.mixture_parts(means, covariances, weights, log_weights)
            super().__init__(parts, parts.outline.home)
        else:
            _checks.points("means", means, "(K, d)")
            logs = normalised(means, weights, log_weights)
            super().__init__(mixture_components(means, logs, covariances), means)

    @property
    def means(self) -> Array:
        """The components' means, (K, d)."""
        return self._means

    @property
    def covariances(self) -> float | Array | LowRank:
        """The components' covariances, in the form that they were given in."""
        return self._covariances

    @classmethod
    def from_file(cls, path: str | Path) -> GaussianMixture:
        """Read ``means``, ``covariances`` and optionally ``weights`` from an ``.npz`` file; pickles are refused."""
        from dfmath.datasets import load_arrays

        arrays = load_arrays(path, required=("means", "covariances"), optional=("weights", "log_weights"))
        with _checks.on_behalf_of(f"file {str(path)!r}"):
            return cls(**arrays)
