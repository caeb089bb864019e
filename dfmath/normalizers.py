"""The size that predicted noises have at each level, which DEIS-SN divides by before it interpolates [MATH 6.2]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dfmath import _checks
from dfmath.backends._compat import Array, array_namespace, to_numpy
from dfmath.canonical import Model, canonical_noise, states
from dfmath.priors import Prior
from dfmath.samplers import follow
from dfmath.solvers import scheme

__all__ = ["Normalizer", "normalizer_along_run", "normalizer_of_prior"]


@dataclass(frozen=True)
class Normalizer:
    r"""n(rho), the mean absolute value of predicted noises over samples and coordinates.

    .. math:: n(\rho) = \mathbb{E}\, \tfrac{1}{d} \lVert \epsilon(z, \rho) \rVert_1, \qquad K = \sigma / n

    K is what Xia et al. multiply the score by, so that K s has the mean absolute value 1 at every level; of the
    schedule it knows nothing. Between levels a monotone cubic in (log rho, log n); below them K is constant, as in the
    published code over its first times; above them n is.

    Attributes
    ----------
    rhos
        Levels, increasing.
    sizes
        n at each.
    standard_errors
        Of them, over samples.

    Raises
    ------
    TypeError, ValueError
        If lengths differ, levels do not increase, or sizes are not positive.

    References
    ----------
    Xia, Shen, Lei, Zhou, Yi, Zhao, Wang, Chen: *Score normalization for a faster diffusion exponential integrator
    sampler*, arXiv 2311.00157.

    Examples
    --------
    >>> n = Normalizer((1.0, 4.0), (0.5, 0.75), (0.0, 0.0))
    >>> n(1.0), n(0.5), n(8.0)
    (0.5, 0.25, 0.75)
    """

    rhos: tuple[float, ...]
    sizes: tuple[float, ...]
    standard_errors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.rhos) == len(self.sizes) == len(self.standard_errors) >= 2:
            lengths = f"{len(self.rhos)}, {len(self.sizes)} and {len(self.standard_errors)}"
            raise ValueError(f"rhos, sizes and standard_errors must be of one length, 2 at least, got {lengths}")
        if not all(0.0 < a < b < math.inf for a, b in zip(self.rhos, self.rhos[1:], strict=False)):
            raise ValueError(f"rhos must be positive and finite and increase, got {self.rhos}")
        if not all(0.0 < size < math.inf for size in self.sizes):
            raise ValueError(f"sizes must be positive and finite, got {self.sizes}")

    def __call__(self, rho: float) -> float:
        """Return n(rho)."""
        low, high = self.rhos[0], self.rhos[-1]
        if rho <= low:
            return self.sizes[0] * rho / low
        return self.sizes[-1] if rho >= high else math.exp(float(self._curve(math.log(rho))))

    @property
    def kinks(self) -> tuple[float, ...]:
        """Where the curve is not smooth: at the levels."""
        return self.rhos

    @cached_property
    def _curve(self) -> Any:
        from scipy.interpolate import PchipInterpolator

        return PchipInterpolator(np.log(self.rhos), np.log(self.sizes))


def normalizer_of_prior(prior: Prior, rhos: Sequence[float], *, samples: int = 4096, seed: int = 0) -> Normalizer:
    """Return the normalizer of an exact prior, by samples of its noised density at each level.

    Parameters
    ----------
    prior
        Data distribution with a closed form.
    rhos
        Noise-to-signal ratios, at least two, in any order; a 0, where there is no noise to measure, is left out.
    samples
        At each level.
    seed
        Of the samples.

    Returns
    -------
    Normalizer

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    _checks.instance("prior", prior, Prior)
    count, noise = _checks.positive_integer("samples", samples), canonical_noise(prior)
    levels = sorted(rho for rho in (_checks.real_number("rhos", rho) for rho in rhos) if rho != 0.0)
    if len(levels) < 2 or not 0.0 < levels[0] <= levels[-1] < math.inf:
        raise ValueError(f"rhos must be at least two positive noise-to-signal ratios, got {list(rhos)}")
    children = np.random.SeedSequence(_checks.random_seed(seed)).generate_state(len(levels))
    found = [
        _size(noise(prior.diffuse(1.0, rho).sample(count, int(child)), rho))
        for rho, child in zip(levels, children, strict=True)
    ]
    return _normalizer(levels, found)


def normalizer_along_run(model: Model, x: Array, rhos: Sequence[float]) -> Normalizer:
    """Return the normalizer of any model along a run of DDIM over many levels, as the authors collect it.

    Parameters
    ----------
    model
        As `dfmath.samplers.sample` takes it.
    x
        (B, ...) canonical states at the first level, many.
    rhos
        Decreasing, many; the last may be 0.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    plan, noise, sizes = scheme("ddim", rhos), canonical_noise(model), {}

    def recorded(z: Array, rho: float) -> Array:
        found = noise(z, rho)
        sizes[rho] = _size(found)
        return found

    for _ in follow(plan, states(x), recorded):
        pass
    levels = sorted(sizes)
    return _normalizer(levels, [sizes[rho] for rho in levels])


def _normalizer(levels: Sequence[float], found: Sequence[tuple[float, float]]) -> Normalizer:
    return Normalizer(tuple(levels), tuple(size for size, _ in found), tuple(error for _, error in found))


def _size(noise: Array) -> tuple[float, float]:
    """Mean absolute value, and its standard error over samples; infinite for one sample."""
    xp = array_namespace(noise)
    rows = to_numpy(xp.mean(xp.abs(xp.reshape(noise, (noise.shape[0], -1))), axis=1)).astype(np.float64)
    error = float(rows.std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else math.inf
    return float(rows.mean()), error
