"""The backend for NumPy arrays: posterior moments of spherical components in compiled, threaded loops.

Spherical means a variance per component or one for all: point masses, isotropic mixtures, kernel density estimates —
the priors with many components. Other covariance forms spend their time in matrix products, which the array-API
reference already does in BLAS; they are handed to it.

With one variance for all there are four ways, and every query takes the first that its accuracy allows:

- where an earlier query of the same trajectory knows which components can matter (`candidates`), those alone;
- where the points are sorted into clusters and few of those are near (`clusters`), their points alone;
- where rounding in matrix products cannot show in its weights, `products`: two products, as dense as they come, in the
  results' precision or, where many components matter, in float64;
- elsewhere a float32 product, or a cheaper one along principal directions, bounds all logits (`screening`), and the
  few components that can matter are taken up again from differences in float64 (`sweep`).

Each query is worked on by one thread from start to end, so loops do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numba
import numpy as np
from dfmath.backends import array_api
from dfmath.backends.candidates import LEAST, Candidates
from dfmath.backends.clusters import default_count, make_clusters
from dfmath.backends.components import Components
from dfmath.backends.diagonal import Diagonal
from dfmath.backends.index import index_of
from dfmath.backends.moments import Moments, Second, Space, Want, concatenate, field_by_field, multiples_of_identity
from dfmath.backends.products import Products, logit_error
from dfmath.backends.request import WIDEST, Request
from dfmath.backends.screening import NOTHING, Pilot, crowded
from dfmath.backends.sweep import Problem, State, sweep, whole_tile
from dfmath.backends.threaded import threads

name = "numba"

TILE_BYTES = 2**23  # a tile of points stays in the last-level cache while all queries pass over it
TILE_MOST = 4096
BUFFER_BYTES = 2**17  # one thread's vectors: a part of its second-level cache
THREAD_WORK = 2**17  # coordinates that are worth a thread: waking one up costs some tens of microseconds
CERTAIN = 2e-9  # worst relative error of what comes from products in float64
TRY = 50.0  # products are tried where their logits may be off by this many times what results may be
QUERY_BLOCK = 256  # queries that share one read of the points


def supports(components: Components) -> bool:
    """Return whether these components are spherical and so have a kernel here."""
    return isinstance(components, Diagonal) and components.variances.shape[2] == 1


def memory_for(components: Components, growth: float) -> Candidates | None:
    """Return an empty memory where there are components enough to be worth one; see `dfmath.backends.memory_for`."""
    return Candidates(growth) if _common(components) and components.count >= LEAST else None


def cluster(components: Components, count: int | None, seed: int) -> None:
    """Sort components of one variance into clusters; see `dfmath.backends.cluster`."""
    if _common(components):
        index = index_of(cast(Diagonal, components))
        index.clusters = make_clusters(index, min(count or default_count(components.count), components.count), seed)


def _common(components: Components) -> bool:
    """Whether one variance is that of all components in all directions."""
    return isinstance(components, Diagonal) and components.variances.shape[1:] == (1, 1)


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
    memory: Candidates | None = None,
) -> Moments:
    """Return the posterior moments of `queries`; see `dfmath.backends.posterior_moments`."""
    if not supports(components):
        return array_api.posterior_moments(
            queries, components, alpha, sigma, want=want, space=space, probes=probes, tolerance=tolerance
        )
    spherical, count = cast(Diagonal, components), queries.shape[0]
    alpha, sigma = (np.ascontiguousarray(np.broadcast_to(a, (count,))) for a in (alpha, sigma))
    columns = None if probes is None else np.ascontiguousarray(probes)
    queries = np.ascontiguousarray(queries)
    ask = Request(queries, spherical, alpha, sigma, want, space, columns, tolerance, precision, memory)
    worth = count * spherical.count * spherical.dim // THREAD_WORK
    with threads(max(1, min(numba.get_num_threads(), worth))):
        blocks = [slice(start, start + QUERY_BLOCK) for start in range(0, max(1, count), QUERY_BLOCK)]
        parts = [_by_what_suits(ask.take(rows)) for rows in blocks]
    return parts[0] if len(parts) == 1 else concatenate(parts)


def _by_what_suits(ask: Request) -> Moments:
    """Take each query's moments from the few components known to matter, from products, or from differences."""
    if ask.components.variances.shape[1] > 1 or len(ask.queries) == 0:
        return _swept(ask)
    ask = ask.about(index_of(ask.components))
    return _sorted_out(ask) if ask.memory is None else _listed_first(ask, *ask.memory.covering(ask), _sorted_out)


def _sorted_out(ask: Request) -> Moments:
    """Look at the points of near clusters alone, where there are clusters and few of them are near."""
    clusters = ask.about_index.clusters
    if clusters is None or not clusters.worth(ask).any():
        return _afresh(ask)
    return _listed_first(ask, *clusters.near(ask, _problem(ask)), _afresh)


def _listed_first(ask: Request, known: Any, listed: Any, others: Callable[[Request], Moments]) -> Moments:
    """Look at listed components alone for the queries that are known, (B,), and do what `others` does for the rest."""
    if known.all():
        return _by_differences(ask.among(listed))
    if not known.any():
        return others(ask)
    places = [np.flatnonzero(known), np.flatnonzero(~known)]
    near, rest = ask.take(places[0]).among(listed[places[0]]), ask.take(places[1])
    return _placed([_by_differences(near), others(rest)], places)


def _afresh(ask: Request) -> Moments:
    """Look at all components, and remember what was seen where that is asked for."""
    found = _among_all(ask)
    if ask.memory is not None:
        ask.memory.learn(ask)
    return found


def _among_all(ask: Request) -> Moments:
    """Choose between products and differences for each query."""
    easy = np.flatnonzero(_easy(ask))
    if len(easy) == 0:
        return _otherwise(ask)
    found, right, possible = _by_products(ask if len(easy) == len(ask.queries) else ask.take(easy))
    wrong = np.ones(len(ask.queries), dtype=bool)
    wrong[easy[right]] = False
    rest = np.flatnonzero(wrong)
    if len(rest) == 0:
        return found
    together = _placed([found, _otherwise(ask.take(rest))], [easy, rest])
    # Other forms of the same queries may be right by products: certificates hold for those, too.
    certificates = np.zeros((2, len(ask.queries)))
    certificates[:, easy[possible]] = found.logit_error[possible], found.sum_error[possible]
    bounds = np.maximum(certificates, [together.logit_error, together.sum_error])
    return replace(together, logit_error=bounds[0], sum_error=bounds[1])


def _otherwise(ask: Request) -> Moments:
    """Take what float32 products will not do from float64 ones where many components matter, else from differences."""
    if ask.dtype == np.float64:
        return _by_differences(ask)
    many = crowded(ask)
    if not many.any():
        return _by_differences(ask)
    if many.all():
        return _among_all(ask.in_double())
    places = [np.flatnonzero(many), np.flatnonzero(~many)]
    return _placed([_among_all(ask.take(places[0]).in_double()), _by_differences(ask.take(places[1]))], places)


def _placed(parts: list[Moments], places: list[Any]) -> Moments:
    """Put the moments of groups of queries in their places in the batch, later groups over earlier ones."""
    count = 1 + max(int(at.max()) for at in places)

    def join(values: list[Any]) -> Any:
        whole = np.empty((count, *values[0].shape[1:]))
        for at, value in zip(places, values, strict=True):
            whole[at] = value
        return whole

    return field_by_field(parts, join)


def _easy(ask: Request) -> Any:
    """Whether products are worth trying for a query, (B,), by an estimate from norms alone."""
    if ask.about_index.weightless or ("dense" in ask.want and ask.components.dim > WIDEST):
        return np.zeros(len(ask.queries), dtype=bool)
    return logit_error(ask) <= TRY * ask.limit


def _by_products(ask: Request) -> tuple[Moments, Any, Any]:
    """Return moments by products, the queries they are right for, and those that other forms could be right for."""
    products = Products(ask.at_first() if ask.covariance else ask)
    products.run()
    moments = products.moments()
    # Where it can be had, they are to be certainly right, too.
    possible = (products.certified(moments) <= max(CERTAIN, ask.limit)) | (ask.dtype == np.float32)
    return moments, possible & (products.error(moments) <= ask.limit), possible


def _by_differences(ask: Request) -> Moments:
    """Return moments from differences.

    What was left out of a posterior covariance at first is taken up again for the queries where it could show.
    """
    first = ask.at_first()
    if not ask.covariance or first.tolerance == ask.tolerance:
        return _swept(ask)
    found = _swept(replace(first, want=ask.want | {"trace"}))
    size: Any = found.within.trace + found.between.trace  # type: ignore[operator]
    faint = np.flatnonzero(_left_out(found.omitted, ask) > ask.limit * size)
    found = replace(found, within=found.within.only(ask.want), between=found.between.only(ask.want))
    if not len(faint):
        return found
    return _placed([found, _swept(ask.take(faint))], [np.arange(len(ask.queries)), faint])


def _left_out(mass: Any, ask: Request) -> Any:
    """Bound what this omitted mass does to a posterior covariance, (B,) [MATH 4.8]."""
    return mass * (2.0 * ask.about_index.radius * ask.sigma**2 / ask.spread) ** 2


def _swept(ask: Request) -> Moments:
    """Sweep over tiles of components; with an index, of those alone that its bounds leave over."""
    if ask.wide and ask.index is None:
        return _by_matrices(ask)
    components, (count, dim) = ask.components, ask.queries.shape
    problem, state = _problem(ask), _state(ask)
    block = max(1, min(8, -(-count // numba.get_num_threads())))
    if ask.listed is not None:
        sweep(problem, whole_tile(components), NOTHING, state, block)
        return _moments(state, ask)
    pilot = None if ask.index is None else Pilot(problem, ask.index, state.best)
    near = max(16, min(TILE_MOST, TILE_BYTES // (dim * components.centres.dtype.itemsize)))
    whole, stop = whole_tile(components), 0
    while stop < components.count:
        # A sketch leaves so few points over that they need not stay near.
        start, step = stop, TILE_MOST if pilot is not None and pilot.sketched else near
        stop = min(start + step, components.count)
        tile = whole.part(start, stop)
        sweep(problem, tile, NOTHING if pilot is None else pilot.bounds(tile, start, stop), state, block)
    return _moments(state, ask)


def _by_matrices(ask: Request) -> Moments:
    """Return products with many probes from matrices: one for each query, and not one product for each component."""
    found = _swept(replace(ask, want=(ask.want - {"product"}) | {"dense"}, probes=None))
    sides = {}
    for name in ("within", "between"):
        side: Any = getattr(found, name)
        sides[name] = replace(side.only(ask.want), product=side.dense @ ask.probes)
    return replace(found, **sides)


def _problem(ask: Request) -> Problem:
    return Problem(
        queries=ask.queries,
        alpha=ask.alpha,
        sigma=ask.sigma,
        cut=ask.cut,
        probes=ask.rows,
        score=ask.space == "score",
        vectors=bool(ask.want),
        limit=ask.limit,
        buffer=max(4, min(256, BUFFER_BYTES // (8 * ask.components.dim))),
        listed=np.empty((len(ask.queries), 0), dtype=np.int64) if ask.listed is None else ask.listed,
    )


def _state(ask: Request) -> State:
    (count, dim), want = ask.queries.shape, ask.want
    return State(
        log_mass=np.full(count, -np.inf),
        log_mass_low=np.zeros(count),
        best=np.full(count, -np.inf),
        omitted=np.zeros(count),
        kept=np.zeros(count),
        within=np.zeros(count),
        rounding=np.zeros(count),
        anchor=np.zeros((count, dim)),
        shift=np.zeros((count, dim)),
        trace=np.zeros((count, int("trace" in want))),
        diagonal=np.zeros((count, dim if "diagonal" in want else 0)),
        product=np.zeros(ask.rows.shape),
        dense=np.zeros((count, dim, dim) if "dense" in want else (count, 0, 0)),
    )


def _moments(state: State, ask: Request) -> Moments:
    mass, none = (state.log_mass, state.log_mass_low), np.zeros_like(state.omitted)
    certified = (state.omitted, none, state.rounding, state.kept)
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
