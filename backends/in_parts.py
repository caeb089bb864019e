"""Posterior moments and draws of components that are held in parts: each part's own, joined.

Queries go to the parts, and only moments come back: (B, d) numbers and the forms that were asked for, whatever the
number of components is.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from dfmath.backends import sampling
from dfmath.backends._compat import Array, array_namespace, beside, from_numpy, index_dtype, to_numpy
from dfmath.backends.components import Whole
from dfmath.backends.moments import Moments, Space, Want, field_by_field, merge
from dfmath.backends.parts import Parts

from dfmath import backends

name = "in-parts"


@dataclass(frozen=True)
class Question:
    """What every part is asked; see `dfmath.backends.posterior_moments`. Arrays are NumPy's on their way."""

    queries: Any
    alpha: Any
    sigma: Any
    want: frozenset[Want] = frozenset()
    space: Space = "posterior"
    probes: Any | None = None
    tolerance: float = 0.0
    precision: float = 0.0
    backend: str | None = None

    def arrays(self, like: Array) -> list[Array | None]:
        """Queries, noise levels and probes beside a part's arrays."""
        values = (self.queries, self.alpha, self.sigma, self.probes)
        return [None if value is None else beside(value, like) for value in values]


def posterior_moments(
    queries: Array,
    components: Parts,
    alpha: Array,
    sigma: Array,
    *,
    want: frozenset[Want],
    space: Space,
    probes: Array | None = None,
    tolerance: float = 0.0,
    precision: float = 0.0,
    memory: object = None,
) -> Moments:
    """Return the posterior moments of `queries`; see `dfmath.backends.posterior_moments`. Nothing is remembered."""
    there = [None if a is None else to_numpy(a) for a in (queries, alpha, sigma, probes)]
    x, a, s, v = there
    ask = Question(x, a, s, want, space, v, tolerance, precision, backends.chosen())
    return _beside(components.reduce(_moments, _merge, ask), queries)


def _moments(part: Whole, ask: Question) -> Moments:
    """A part's moments, on the host."""
    x, alpha, sigma, probes = ask.arrays(part.centres)
    with backends.use(ask.backend) if ask.backend else nullcontext():
        found = backends.posterior_moments(
            x,
            part,
            alpha,
            sigma,
            ask.want,
            space=ask.space,
            probes=probes,
            tolerance=ask.tolerance,
            precision=ask.precision,
        )
    return field_by_field([found], lambda values: to_numpy(values[0]))


def _merge(a: Moments, b: Moments, ask: Question) -> Moments:
    return merge(a, b, ask.want, ask.probes)


def _beside(moments: Moments, like: Array) -> Moments:
    """The same where the queries are."""
    return field_by_field([moments], lambda values: from_numpy(values[0], like))


def posterior_indices(
    queries: Array, components: Parts, alpha: Array, sigma: Array, moments: Moments, uniforms: Array
) -> Array:
    """Return drawn components (B, n); see `dfmath.backends.sampling.posterior_indices`.

    A uniform chooses a part by the parts' shares of the mass, and what is left of it a component within the part.
    """
    ask = Question(to_numpy(queries), to_numpy(alpha), to_numpy(sigma), backend=backends.chosen())
    masses = components.each(_moments, ask)
    shares = np.exp([m.log_mass - to_numpy(moments.log_mass) for m in masses])  # (parts, B)
    owners, rest = _divided(shares.T, to_numpy(uniforms))
    asked = {int(i): (ask, masses[i], np.where(owners == i, rest, 0.0)) for i in np.unique(owners)}
    found = components.run(_indices, asked)
    chosen = sum(np.where(owners == i, components.starts[i] + places, 0) for i, places in found.items())
    return from_numpy(chosen, queries, index_dtype(queries))


def _divided(shares: Any, uniforms: Any) -> tuple[Any, Any]:
    """Which of the shares (B, parts) each uniform (B, n) falls into, and how far into it, in [0, 1)."""
    ends = np.cumsum(shares, axis=1)
    ends = ends / ends[:, -1:]
    owners = np.sum(uniforms[:, :, None] >= ends[:, None, :], axis=2)
    before = np.concatenate([np.zeros_like(ends[:, :1]), ends], axis=1)
    low, high = (np.take_along_axis(before, owners + step, axis=1) for step in (0, 1))
    return owners, np.minimum((uniforms - low) / (high - low), np.nextafter(1.0, 0.0))


def _indices(part: Whole, ask: Question, mass: Moments, uniforms: Any) -> Any:
    x, alpha, sigma, _ = ask.arrays(part.centres)
    mass = field_by_field([mass], lambda values: beside(values[0], part.centres))
    u = from_numpy(uniforms, x)
    return to_numpy(sampling.posterior_indices(x, part, alpha, sigma, mass, u))


def prior_indices(components: Parts, uniforms: Any) -> Any:
    """Return drawn components (n,); see `dfmath.backends.sampling.prior_indices`."""
    masses = np.array(components.each(_prior_mass))
    owners, rest = (found[0] for found in _divided(masses[None, :], uniforms[None, :]))
    asked = {int(i): (rest[owners == i],) for i in np.unique(owners)}
    chosen = np.empty(len(uniforms), dtype=np.int64)
    for i, places in components.run(sampling.prior_indices, asked).items():
        chosen[owners == i] = components.starts[i] + places
    return chosen


def _prior_mass(part: Whole) -> float:
    return float(array_namespace(part.log_weights).sum(array_namespace(part.log_weights).exp(part.log_weights)))
