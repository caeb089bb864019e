"""The backend for NumPy arrays: posterior moments of spherical components in compiled, threaded loops.

Spherical means a variance per component or one for all: point masses, isotropic mixtures, kernel density estimates —
the priors with many components. Other covariance forms spend their time in matrix products, which the array-API
reference already does in BLAS; they are handed to it.

With one variance for all there are two ways, and every query takes the one that its accuracy allows:

- where rounding in matrix products cannot show in its weights, `products`: two products, as dense as they come;
- elsewhere a float32 product, or a cheaper one along principal directions, bounds all logits (`screening`), and the
  few components that can matter are taken up again from differences in float64 (`sweep`).

Each query is worked on by one thread from start to end, so loops do not depend on the number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import numba
import numpy as np
from dfmath.backends import array_api
from dfmath.backends.components import Components, Diagonal
from dfmath.backends.double import limit
from dfmath.backends.index import Index, index_of
from dfmath.backends.moments import SECOND_ORDER, Moments, Second, Space, Want, take
from dfmath.backends.products import WIDEST, Products, logit_error, multiples_of_identity
from dfmath.backends.screening import NOTHING, Pilot
from dfmath.backends.sweep import DEPTH, Problem, State, Tile, sweep
from dfmath.backends.threaded import threads

name = "numba"

TILE_BYTES = 2**23  # a tile of points stays in the last-level cache while all queries pass over it
TILE_MOST = 4096
BUFFER_BYTES = 2**17  # one thread's vectors: a part of its second-level cache
THREAD_WORK = 2**17  # coordinates that are worth a thread: waking one up costs some tens of microseconds
CERTAIN = 2e-9  # worst relative error of what comes from products in float64
TRY = 50.0  # products are tried where their logits may be off by this many times what results may be
QUERY_BLOCK = 256  # queries that share one read of the points


@dataclass(frozen=True)
class _Ask:
    """What `posterior_moments` was asked, for some of the queries."""

    queries: Any  # (B, d)
    components: Diagonal
    alpha: Any  # (B,)
    sigma: Any  # (B,)
    want: frozenset[Want]
    space: Space
    probes: Any | None  # (B, d, p)
    tolerance: float
    precision: float

    def take(self, rows: Any) -> _Ask:
        """Return the same for these queries alone."""
        probes = None if self.probes is None else self.probes[rows]
        return replace(self, queries=self.queries[rows], alpha=self.alpha[rows], sigma=self.sigma[rows], probes=probes)


def supports(components: Components) -> bool:
    """Return whether these components are spherical and so have a kernel here."""
    return isinstance(components, Diagonal) and components.variances.shape[2] == 1


def posterior_moments(
    queries: Any,
    components: Components,
    alpha: Any,
    sigma: Any,
    *,
    want: frozenset[Want],
    space: Space,
    probes: Any | None = None,
    tolerance: float = 0.0,
    precision: float = 0.0,
) -> Moments:
    """Return the posterior moments of `queries`; see `dfmath.backends.posterior_moments`."""
    if not supports(components):
        return array_api.posterior_moments(
            queries, components, alpha, sigma, want=want, space=space, probes=probes, tolerance=tolerance
        )
    spherical, count = cast(Diagonal, components), queries.shape[0]
    alpha, sigma = (np.ascontiguousarray(np.broadcast_to(a, (count,))) for a in (alpha, sigma))
    ask = _Ask(np.ascontiguousarray(queries), spherical, alpha, sigma, want, space, probes, tolerance, precision)
    worth = count * spherical.count * spherical.dim // THREAD_WORK
    with threads(max(1, min(numba.get_num_threads(), worth))):
        blocks = [slice(start, start + QUERY_BLOCK) for start in range(0, max(1, count), QUERY_BLOCK)]
        parts = [_by_what_suits(ask.take(rows)) for rows in blocks]
    return parts[0] if len(parts) == 1 else array_api.concatenate(parts)


def _by_what_suits(ask: _Ask) -> Moments:
    """Take each query's moments from products where rounding cannot show, and from differences elsewhere."""
    if ask.components.variances.shape[1] > 1 or len(ask.queries) == 0:
        return _by_differences(ask, None)
    index = index_of(ask.components)
    easy = np.flatnonzero(_easy(ask, index))
    if len(easy) == 0:
        return _by_differences(ask, index)
    found, right, possible = _by_products(ask.take(easy), index)
    rest = np.setdiff1d(np.arange(len(ask.queries)), easy[right])
    if len(rest) == 0:
        return found
    parts = [take(found, np.flatnonzero(right)), _by_differences(ask.take(rest), index)]
    together = take(array_api.concatenate(parts), np.argsort(np.concatenate([easy[right], rest])))
    # Other forms of the same queries may be right by products: certificates hold for those, too.
    certificates = [np.zeros(len(ask.queries)) for _ in range(2)]
    for total, part in zip(certificates, (found.logit_error, found.sum_error), strict=True):
        total[easy[possible]] = part[possible]
    return replace(together, logit_error=certificates[0], sum_error=certificates[1])


def _easy(ask: _Ask, index: Index) -> Any:
    """Whether rounding of products shows in a query's logits (B,), by an estimate from norms alone."""
    if "dense" in ask.want and ask.components.dim > WIDEST:
        return np.zeros(len(ask.queries), dtype=bool)
    spread = ask.alpha**2 * index.variance + ask.sigma**2
    return logit_error(index, ask.queries, ask.alpha, spread, _dtype(ask)) <= TRY * limit(ask.precision)


def _dtype(ask: _Ask) -> Any:
    return np.float32 if ask.precision >= np.finfo(np.float32).eps else np.float64


def _by_products(ask: _Ask, index: Index) -> tuple[Moments, Any, Any]:
    """Return moments by products, the queries they are right for, and those that other forms could be right for."""
    cut = _cut(replace(ask, tolerance=_at_first(ask)) if ask.space == "posterior" else ask, index)
    products = Products(ask.queries, index, ask.alpha, ask.sigma, ask.want, ask.probes, _dtype(ask), cut)
    products.run()
    moments = products.moments(ask.space, ask.probes)
    # Where it can be had, they are to be certainly right, too.
    certain = products.certified(moments, ask.space) <= CERTAIN
    possible = certain | (_dtype(ask) == np.float32)
    return moments, possible & (products.error(moments, ask.space) <= limit(ask.precision)), possible


def _by_differences(ask: _Ask, index: Index | None) -> Moments:
    """Return moments from differences.

    A posterior covariance counts beside its own size, which is known afterwards: what was left out at first is taken up
    again for the queries where it could show.
    """
    if index is None or ask.space == "score" or ask.want <= {"mean"}:
        return _swept(ask, index)
    found = _swept(replace(ask, want=ask.want | {"trace"}, tolerance=_at_first(ask)), index)
    size: Any = found.within.trace + found.between.trace  # type: ignore[operator]
    faint = _left_out(found.omitted, ask, index) > limit(ask.precision) * size
    found = replace(found, within=_only(found.within, ask.want), between=_only(found.between, ask.want))
    if ask.tolerance >= _at_first(ask) or not faint.any():
        return found
    again = _swept(ask.take(faint), index)
    order = np.argsort(np.concatenate([np.flatnonzero(~faint), np.flatnonzero(faint)]))
    return take(array_api.concatenate([take(found, np.flatnonzero(~faint)), again]), order)


def _only(second: Second, want: frozenset[Want]) -> Second:
    return Second(**{form: getattr(second, form) for form in SECOND_ORDER if form in want})


def _at_first(ask: _Ask) -> float:
    return max(ask.tolerance, min(ask.precision**2, 1e-20))


def _left_out(mass: Any, ask: _Ask, index: Index) -> Any:
    """Bound what this omitted mass does to a posterior covariance, (B,) [MATH 4.8]."""
    spread = ask.alpha**2 * index.variance + ask.sigma**2
    return mass * (2.0 * index.radius * ask.sigma**2 / spread) ** 2


def _swept(ask: _Ask, index: Index | None) -> Moments:
    """Sweep over tiles of components; with an index, of those alone that its bounds leave over."""
    components, (count, dim) = ask.components, ask.queries.shape
    problem, state = _problem(ask, index), _state(ask)
    pilot = None if index is None else Pilot(problem, index, state.best)
    near = max(16, min(TILE_MOST, TILE_BYTES // (dim * components.centres.dtype.itemsize)))
    logs, variances = (
        np.asarray(a, dtype=np.float64) for a in (components.log_weights[0], components.variances[0, :, 0])
    )
    stop = 0
    while stop < components.count:
        # A sketch leaves so few points over that they need not stay near.
        start, step = stop, TILE_MOST if pilot is not None and pilot.sketch is not None else near
        stop = min(start + step, components.count)
        tile = Tile(
            components.centres[0, start:stop],
            logs[start:stop],
            variances[start:stop] if len(variances) > 1 else variances,
        )
        upper = NOTHING if pilot is None else pilot.bounds(start, stop)
        sweep(problem, tile, upper, state, max(1, min(8, -(-count // numba.get_num_threads()))))
    return _moments(state, ask)


def _cut(ask: _Ask, index: Index | None) -> Any:
    """How far below the largest a logit may be left out, (B,): what F and P lose is small beside S then [MATH 4.8]."""
    if ask.tolerance <= 0:
        return np.full(len(ask.queries), math.inf)
    cut = math.log(ask.components.count / ask.tolerance)
    low, high = (ask.alpha**2 * variance + ask.sigma**2 for variance in ask.components.variance_range())
    if index is not None:
        return cut + np.log1p(4.0 * (ask.alpha * index.radius) ** 2 / low)
    # Components of different S: |s|^2 and L of any one, beside L of the widest.
    return cut + 2.0 * np.log(high / low) + math.log(2.0 * DEPTH)


def _problem(ask: _Ask, index: Index | None) -> Problem:
    dim = ask.queries.shape[1]
    probes = np.zeros((len(ask.queries), 0, dim)) if ask.probes is None else np.swapaxes(ask.probes, 1, 2)
    return Problem(
        queries=ask.queries,
        alpha=ask.alpha,
        sigma=ask.sigma,
        cut=_cut(ask, index),
        probes=np.ascontiguousarray(probes),
        score=ask.space == "score",
        vectors=bool(ask.want),
        limit=limit(ask.precision),
        buffer=max(4, min(256, BUFFER_BYTES // (8 * dim))),
    )


def _state(ask: _Ask) -> State:
    (count, dim), want = ask.queries.shape, ask.want
    width = 0 if ask.probes is None else ask.probes.shape[2]
    return State(
        log_mass=np.full(count, -np.inf),
        log_mass_low=np.zeros(count),
        best=np.full(count, -np.inf),
        omitted=np.zeros(count),
        kept=np.zeros(count),
        within=np.zeros(count),
        anchor=np.zeros((count, dim)),
        shift=np.zeros((count, dim)),
        trace=np.zeros((count, int("trace" in want))),
        diagonal=np.zeros((count, dim if "diagonal" in want else 0)),
        product=np.zeros((count, width, dim)),
        dense=np.zeros((count, dim, dim) if "dense" in want else (count, 0, 0)),
    )


def _moments(state: State, ask: _Ask) -> Moments:
    mass, certified = (
        (state.log_mass, state.log_mass_low),
        (state.omitted, *np.zeros((2, len(state.omitted))), state.kept),
    )
    if not ask.want:
        return Moments(*mass, None, None, Second(), Second(), *certified)
    between = Second(
        trace=state.trace[:, 0] if "trace" in ask.want else None,
        diagonal=state.diagonal if "diagonal" in ask.want else None,
        product=np.swapaxes(state.product, 1, 2) if "product" in ask.want else None,
        dense=_symmetric(state.dense) if "dense" in ask.want else None,
    )
    within = multiples_of_identity(state.within, ask.components.dim, ask.want, ask.probes)
    return Moments(*mass, state.anchor, state.shift, within, between, *certified)


def _symmetric(lower: Any) -> Any:
    """Mirror the lower triangles in place."""
    rows, columns = np.triu_indices(lower.shape[1], 1)
    lower[:, rows, columns] = lower[:, columns, rows]
    return lower
