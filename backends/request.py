"""What the backend for NumPy arrays was asked, for a group of queries, and what follows from it alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from dfmath.backends.candidates import Candidates
from dfmath.backends.diagonal import Diagonal
from dfmath.backends.index import Index
from dfmath.backends.moments import Space, Want
from dfmath.backends.precision import limit
from dfmath.backends.sweep import DEPTH

WIDE = 4  # a matrix costs d^2/2 for each component, and p products with it 2 d p
WIDEST = 512  # dimensions up to which all products of two coordinates fit in a tile


@dataclass(frozen=True)
class Request:
    """See `dfmath.backends.posterior_moments`; noise levels are (B,).

    With an index, components have one variance, and p is x - alpha c.
    """

    queries: Any  # (B, d)
    components: Diagonal
    alpha: Any  # (B,)
    sigma: Any  # (B,)
    want: frozenset[Want]
    space: Space
    probes: Any | None  # (B, d, p)
    tolerance: float
    precision: float
    memory: Candidates | None = None
    listed: Any = None  # (B, L) the only components that can matter, or -1; None if that is not known
    index: Index | None = None
    p: Any = None  # (B, d)

    def about(self, index: Index) -> Request:
        """Return the same, seen from the index's centre."""
        return replace(self, index=index, p=index.offsets(self.queries, self.alpha))

    def take(self, rows: Any) -> Request:
        """Return the same for these queries alone."""
        names = ("queries", "alpha", "sigma", "probes", "listed", "p")
        parts = {name: getattr(self, name) for name in names}
        return replace(self, **{name: part[rows] for name, part in parts.items() if part is not None})

    def in_double(self) -> Request:
        """Return the same with matrix products in float64, for results no more precise than they were to be."""
        return replace(self, precision=min(self.precision, 0.99 * float(np.finfo(np.float32).eps)))

    def among(self, listed: Any) -> Request:
        """Return the same, asking about no other components than these, (B, L)."""
        return replace(self, listed=listed)

    def at_first(self) -> Request:
        """Return the same with what may be left out before a posterior covariance's own size is known."""
        return replace(self, tolerance=max(self.tolerance, min(self.precision**2, 1e-20)))

    @property
    def about_index(self) -> Index:
        """The index; components that have none are not asked about it."""
        assert self.index is not None
        return self.index

    @property
    def limit(self) -> float:
        """Error that logits may have."""
        return limit(self.precision)

    @property
    def dtype(self) -> Any:
        """Dtype of matrix products."""
        return np.float32 if self.precision >= np.finfo(np.float32).eps else np.float64

    @property
    def covariance(self) -> bool:
        """Whether a posterior covariance is asked for, which counts beside its own size."""
        return self.space == "posterior" and not self.want <= {"mean"}

    @property
    def wide(self) -> bool:
        """Whether there are so many probes that matrices are cheaper than products with each."""
        dim = self.components.dim
        return self.probes is not None and WIDE * self.probes.shape[2] >= dim and dim <= WIDEST

    @cached_property
    def spread(self) -> Any:
        """S, one for all components, (B,)."""
        return self.alpha**2 * self.components.variances[0, 0, 0] + self.sigma**2

    @cached_property
    def length(self) -> Any:
        """|p|, (B,)."""
        return np.linalg.norm(self.p, axis=1)

    @cached_property
    def rows(self) -> Any:
        """Probes as contiguous rows, (B, p, d)."""
        count, dim = self.queries.shape
        probes = np.zeros((count, 0, dim)) if self.probes is None else np.swapaxes(self.probes, 1, 2)
        return np.ascontiguousarray(probes)

    @cached_property
    def cut(self) -> Any:
        """How far below the largest a logit may be left out, (B,): what F and P lose is small beside S [MATH 4.8]."""
        if self.tolerance <= 0:
            return np.full(len(self.queries), math.inf)
        cut = math.log(self.components.count / self.tolerance)
        low, high = (self.alpha**2 * variance + self.sigma**2 for variance in self.components.variance_range())
        if self.index is not None:
            return cut + np.log1p(4.0 * (self.alpha * self.index.radius) ** 2 / low)
        # Components of different S: |s|^2 and L of any one, beside L of the widest.
        return cut + 2.0 * np.log(high / low) + math.log(2.0 * DEPTH)
