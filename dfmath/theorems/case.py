"""What a theorem is checked on: a prior at a noise level, queries where it is interesting, and an independent truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from dfmath.backends._compat import Array, array_namespace, to_numpy
from dfmath.fisher import DiffusionFisher
from dfmath.marginal import Marginal
from dfmath.priors import GaussianMixture, PointMasses, Prior
from dfmath.theorems.truth import DenseMixture, Derivative, Line, derivative

QUERIES = 8
SAMPLES = 512


@dataclass(frozen=True)
class Model:
    """A prior under test, beside the raw parameters that the truth is built from.

    `build` puts NumPy values into the namespace and dtype under test; `backend` is what computes, where it is not left
    to the kind of arrays.
    """

    prior: Prior
    means: Any  # (K, d) float64, exactly the values the prior was given
    covariances: Any | None  # (K, d, d), or None for point masses
    weights: Any  # (K,)
    build: Callable[[Any], Array]
    dtype: str
    backend: str | None = None

    @cached_property
    def truth(self) -> DenseMixture:
        """The same prior, evaluated independently."""
        return DenseMixture(self.means, self.covariances, self.weights)

    @property
    def dim(self) -> int:
        """Dimension d."""
        return int(self.means.shape[1])

    @property
    def is_points(self) -> bool:
        """Whether the prior is made of point masses."""
        return self.covariances is None

    @cached_property
    def shares(self) -> Any:
        """Normalised weights, (K,)."""
        return self.weights / self.weights.sum()

    @cached_property
    def mean(self) -> Any:
        """E[x0], (d,)."""
        return self.shares @ self.means

    @cached_property
    def covariance(self) -> Any:
        """Cov[x0], (d, d)."""
        centred = self.means - self.mean
        between = (centred * self.shares[:, None]).T @ centred
        if self.covariances is None:
            return between
        return between + np.einsum("k,kij->ij", self.shares, self.covariances)

    @cached_property
    def diameter(self) -> float:
        """An upper bound on the support's diameter: twice its largest distance from the middle of its box."""
        middle = (self.means.max(axis=0) + self.means.min(axis=0)) / 2
        return 2.0 * float(np.sqrt(((self.means - middle) ** 2).sum(axis=1).max()))

    def gaussian(self) -> GaussianMixture:
        """N(mean, covariance) of the data: the Gaussian prior that statements about Gaussian data are checked on."""
        return GaussianMixture(self.build(self.mean[None, :]), self.build(self.covariance[None, :, :]))


def point_model(
    points: Any, build: Callable[[Any], Array], dtype: str, hold: Callable[[Array], Any] = lambda array: array
) -> Model:
    """Return the empirical prior of data points (N, d); `hold` puts them where the prior is to find them."""
    given = build(points)
    exact = to_numpy(given).astype(np.float64)
    return Model(PointMasses(hold(given)), exact, None, np.ones(len(exact)), build, dtype)


def mixture_model(
    means: Any,
    covariances: Any,
    weights: Any,
    build: Callable[[Any], Array],
    dtype: str,
    hold: Callable[[Array], Any] = lambda array: array,
) -> Model:
    """Return a Gaussian mixture with full covariances (K, d, d); `hold` is as of `point_model`."""
    given = [build(values) for values in (means, covariances, weights)]
    exact = [to_numpy(values).astype(np.float64) for values in given]
    prior = GaussianMixture(hold(given[0]), given[1], weights=given[2])
    return Model(prior, exact[0], (exact[1] + exact[1].swapaxes(1, 2)) / 2, exact[2], build, dtype)


@dataclass(frozen=True)
class Case:
    """A model at one noise level (alpha, sigma), with queries; `rhos` is the whole range for checks of the prior."""

    model: Model
    rho: float
    rhos: tuple[float, ...]
    seed: int

    @property
    def alpha(self) -> float:
        """1/sqrt(1 + rho^2), the variance-preserving choice, so that alpha is not 1."""
        return 1.0 / math.sqrt(1.0 + self.rho**2)

    @property
    def sigma(self) -> float:
        """The noise level alpha rho."""
        return self.rho * self.alpha

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.model.dim

    def at(self, rho: float) -> Case:
        """The same model at another noise level."""
        return replace(self, rho=rho)

    def rng(self, stream: int) -> np.random.Generator:
        """A generator of its own for each use."""
        return np.random.default_rng([self.seed, stream])

    @cached_property
    def marginal(self) -> Marginal:
        """q at this noise level."""
        return self.model.prior.diffuse(self.alpha, self.sigma)

    @cached_property
    def x(self) -> Array:
        """Queries (8, d): half drawn from q, half midway between near neighbours, where P is largest."""
        half = QUERIES // 2
        drawn = to_numpy(self.marginal.sample(half, self.seed))
        rng = self.rng(1)
        means = self.model.means
        first = rng.integers(len(means), size=half)
        middles = [(means[i] + means[_neighbour(means, i)]) / 2 for i in first]
        between = self.alpha * np.array(middles) + 0.01 * self.sigma * rng.standard_normal((half, self.dim))
        return self.model.build(np.concatenate([drawn, between]))

    @cached_property
    def x64(self) -> Any:
        """The queries' exact values in float64."""
        return to_numpy(self.x).astype(np.float64)

    @cached_property
    def v(self) -> Array:
        """Directions (8, d) of length about 1."""
        return self.model.build(self.rng(2).standard_normal((QUERIES, self.dim)) / math.sqrt(self.dim))

    @cached_property
    def v64(self) -> Any:
        """The directions' exact values in float64."""
        return to_numpy(self.v).astype(np.float64)

    @cached_property
    def fisher(self) -> DiffusionFisher:
        """F at the queries."""
        return self.marginal.fisher(self.x)

    @cached_property
    def score(self) -> Any:
        """The library's score at the queries, float64."""
        return self.host(self.marginal.score(self.x))

    @cached_property
    def mean(self) -> Any:
        """The library's posterior mean at the queries, float64."""
        return self.host(self.marginal.posterior_mean(self.x))

    @cached_property
    def fisher_v(self) -> Any:
        """The library's F v, float64."""
        return self.host(self.fisher.matvec(self.v))

    @cached_property
    def covariance_v(self) -> Any:
        """The library's P v, float64."""
        return self.host(self.fisher.posterior_covariance().matvec(self.v))

    @cached_property
    def fisher_trace(self) -> Any:
        """The library's tr F, float64."""
        return self.host(self.fisher.trace())

    @cached_property
    def covariance_trace(self) -> Any:
        """The library's tr P, float64."""
        return self.host(self.fisher.posterior_covariance().trace())

    @cached_property
    def samples(self) -> Array:
        """Draws from q (512, d), for averages."""
        return self.marginal.sample(SAMPLES, self.seed + 1)

    @cached_property
    def sample_scores(self) -> Any:
        """Scores at the draws from q, float64."""
        return self.host(self.marginal.score(self.samples))

    @cached_property
    def true_weights(self) -> Any:
        """Posterior weights by the truth, (8, K) float64 from long double."""
        return self.model.truth.weights_at(self.x64, self.alpha, self.sigma)

    @cached_property
    def lines(self) -> list[Line]:
        """The true log density along x + h v, for each query."""
        return self.model.truth.along(self.x64, self.v64, self.alpha, self.sigma)

    @cached_property
    def slope(self) -> Derivative:
        """First derivative of the true log density at the queries along v."""
        return derivative(self.lines, 1, self._variation_length)

    @cached_property
    def curvature(self) -> Derivative:
        """Second derivative of the true log density at the queries along v."""
        return derivative(self.lines, 2, self._variation_length)

    @property
    def _variation_length(self) -> Any:
        """How far along v the log density varies: sigma, or less where the posterior is torn between distant points."""
        spread = np.sqrt(np.maximum(self.covariance_trace, 0.0))
        return self.sigma / (1.0 + spread / self.rho) / np.linalg.norm(self.v64, axis=1)

    def host(self, array: Array) -> Any:
        """Values as float64 on the host."""
        return to_numpy(array).astype(np.float64)

    @property
    def namespace(self) -> Any:
        """The array namespace under test."""
        return array_namespace(self.x)

    @property
    def precision(self) -> float:
        """The relative accuracy that the library promises in this dtype."""
        return 1e-10 if self.model.dtype == "float64" else 1e-5

    @property
    def promise(self) -> str:
        """Why the threshold of an exact identity is what it is."""
        return f"{self.model.dtype} results are promised to {self.precision:.0e} relative"


def _neighbour(means: Any, i: int) -> int:
    """The nearest mean that differs from mean i, or i itself if there is none."""
    distance = ((means - means[i]) ** 2).sum(axis=1)
    distance[distance == 0] = np.inf
    return int(distance.argmin()) if np.isfinite(distance.min()) else i
