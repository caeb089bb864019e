"""What the backend of accelerators was asked, for a group of queries, and what follows from it alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dfmath.backends import double
from dfmath.backends._compat import Array, array_namespace
from dfmath.backends.device_index import DeviceIndex
from dfmath.backends.diagonal import Diagonal
from dfmath.backends.moments import Second, Space, Want, multiples_of_identity
from dfmath.backends.precision import limit

PRODUCT = 2**26  # numbers of a product that is held at a time


@dataclass(frozen=True)
class Ask:
    """What is asked of some queries; noise levels are (B,)."""

    queries: Array
    components: Diagonal
    index: DeviceIndex
    alpha: Array
    sigma: Array
    want: frozenset[Want]
    space: Space
    probes: Array | None
    tolerance: float
    precision: float

    def take(self, rows: Array) -> Ask:
        """The same for these queries alone."""
        parts = {name: getattr(self, name) for name in ("queries", "alpha", "sigma", "probes")}
        return replace(self, **{name: part[rows] for name, part in parts.items() if part is not None})

    @property
    def xp(self) -> Any:
        """The namespace."""
        return array_namespace(self.queries)

    @property
    def limit(self) -> float:
        """Error that logits may have."""
        return limit(self.precision)

    @property
    def covariance(self) -> bool:
        """Whether a posterior covariance is asked for, which counts beside its own size."""
        return self.space == "posterior" and not self.want <= {"mean"}

    @cached_property
    def spread(self) -> Array:
        """S, one for all components, (B,)."""
        return self.alpha**2 * self.components.variances[0, 0, 0] + self.sigma**2

    @cached_property
    def slope(self) -> Array:
        """u_k - u_l = slope (y_k - y_l) in either space, (B,)."""
        return (self.alpha if self.space == "score" else self.sigma**2) / self.spread

    def within(self) -> Second:
        """E[G]: a multiple of the identity, as all components have one variance."""
        size = 1.0 if self.space == "score" else self.sigma**2 * self.components.variances[0, 0, 0]
        return multiples_of_identity(size / self.spread, self.components.dim, self.want, self.probes)

    @cached_property
    def p(self) -> Array:
        """x - alpha c, rounded once, (B, d)."""
        product, low = double.two_product(self.alpha[:, None], self.index.centre[None, :])
        return (self.queries - product) - low

    @cached_property
    def length(self) -> Array:
        """|p|, (B,)."""
        return self.xp.linalg.vector_norm(self.p, axis=1)

    @cached_property
    def cut(self) -> Array:
        """How far below the largest a logit may be left out, (B,): what F and P lose is small beside S [MATH 4.8]."""
        xp = self.xp
        if self.tolerance <= 0:
            return xp.full_like(self.alpha, math.inf)
        reach = 4.0 * (self.alpha * self.index.radius) ** 2 / self.spread
        return math.log(self.components.count / self.tolerance) + xp.log1p(reach)
