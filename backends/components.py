"""Mixture components of every covariance form, and what each one contributes at a query.

A component N(mu, C) seen through x = alpha x0 + sigma eps has S = alpha^2 C + sigma^2 I, L = S^-1 and, with the
residual r = x - alpha mu [MATH 1.5],

    log weight    log pi - (r^T L r + log det S + d log 2 pi)/2
    score         s = -L r                        precision             L
    posterior     m = mu + alpha C L r            posterior covariance  P = sigma^2 C L.

P is written as a product, never as C - alpha^2 C L C, and L never comes from inverting a d x d matrix: full covariances
are diagonal in their own eigenbasis at every noise level, and low rank plus diagonal is a rank-r correction of a
diagonal (Woodbury) in a form that squares no condition number.

Arrays are laid out to broadcast: queries (b, 1, d), components (1, k, d), or (m, 1, d) for m chosen pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

from dfmath.backends._compat import Array
from dfmath.backends.moments import Second, Space, Want

LOG_2PI = math.log(2.0 * math.pi)

Form = Literal["diagonal", "full", "low rank"]


class Local(Protocol):
    """What the components contribute at some queries, at one noise level each."""

    logits: Array  # (b, k) log pi_k N(x; alpha mu_k, S_k)
    logits_low: Array | None  # (b, k) their second terms, where plain rounding would show (see `double`)

    @property
    def common(self) -> bool:
        """Whether one multiple of the identity is the covariance of all."""

    def vectors(self, space: Space) -> Array:
        """The vectors u_k of the space, (b, k, d)."""

    def anchored(self, space: Space, index: Array) -> tuple[Array, Array, Array]:
        """One component's vector for each query, (b, 1, d) in two terms, and all vectors less it; index (b, 1)."""

    def within(self, space: Space, weights: Array, want: frozenset[Want], probes: Array | None) -> Second:
        """E[G] under the weights (b, k), in the wanted forms."""

    def draw(self, normals: Array, extra: Array) -> Array:
        """Samples of N(m_k, P_k) from standard normals (b, k, d) and, for the factors, (b, k, r)."""


class Components(Protocol):
    """K mixture components of one covariance form, wherever they are held."""

    @property
    def form(self) -> Form:
        """Which form that is."""

    @property
    def common(self) -> bool:
        """Whether one multiple of the identity is the covariance of all."""

    @property
    def centres(self) -> Array:
        """(1, K, d)."""

    @property
    def log_weights(self) -> Array:
        """(1, K)."""

    @property
    def count(self) -> int:
        """K."""

    @property
    def dim(self) -> int:
        """D."""

    @property
    def rank(self) -> int:
        """How many extra normals `Local.draw` needs."""

    def tile(self, start: int, stop: int, dtype: Any) -> Whole:
        """Components start..stop, in the dtype that moments accumulate in."""

    def pairs(self, index: Array, dtype: Any) -> Whole:
        """One chosen component for each of m queries, laid out as (m, 1, ...)."""

    def width(self, columns: int) -> int:
        """How many times (b, k, d) numbers a second moment with this many columns needs at a time."""

    def variance_range(self) -> tuple[float, float]:
        """Lower bound on the smallest and upper bound on the largest eigenvalue over all C_k."""

    def each(self, work: Callable[..., Any], *shared: Any) -> list[Any]:
        """What `work(part, *shared)` returns for every part that the components are held in: for most, the one."""


class Whole(Components, Protocol):
    """Components that are here as arrays."""

    def at(self, x: Array, alpha: Array, sigma: Array) -> Local:
        """Contributions at queries x (b, 1, d) and noise levels (b | 1, 1, 1)."""

    def draw_prior(self, normals: Array, extra: Array) -> Array:
        """Samples of N(mu_k, C_k) from standard normals, for components laid out by `pairs`."""
