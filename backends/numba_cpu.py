"""The backend for NumPy arrays: posterior moments of spherical components in compiled, threaded loops.

Spherical means a variance per component or one for all: point masses, isotropic mixtures, kernel density estimates —
the priors with many components. Other covariance forms spend their time in matrix products, which the array-API
reference already does in BLAS; they are handed to it.

Points are read once per block of queries in their own dtype and all arithmetic is float64. Each query is worked on by
one thread from start to end, so results do not depend on the number of threads. Within a tile the vectors of components
that carry weight are centred at the heaviest one, then at the tile's mean, and tiles merge as in `moments.merge`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numba
import numpy as np
from dfmath.backends import array_api
from dfmath.backends.components import LOG_2PI, Components, Diagonal
from dfmath.backends.double import LIMIT, MATTERS
from dfmath.backends.moments import Moments, Second, Space, Want
from numba import njit, prange

name = "numba"

TILE_BYTES = 2**18  # one thread's centred vectors: half of a 512 KiB second-level cache
THREAD_WORK = 2**17  # coordinates that are worth a thread: waking one up costs some tens of microseconds
QUERY_BLOCK = 8  # queries that share one read of a tile of points

_DEPTH = 746.0  # exp(-746) is zero: a component this far (in log) below another carries no weight at all
_STRIDE = 64  # coordinates between two looks at whether a component can still carry weight

_LOGIT_ERROR = 1e-14  # more than any relative error of a plain logit

_FINE_CUT = 700.0  # weights this far (in log) below the largest underflow: no need to refine their logits

_options = {"cache": True, "error_model": "numpy", "nogil": True}
_exactly = njit(**_options)  # every operation as written: two-term arithmetic
_fused = njit(fastmath={"contract"}, **_options)  # multiply-adds fused, order kept
_summing = njit(
    fastmath={"contract", "reassoc", "nsz"}, **_options
)  # sums in vector lanes: only for plain dot products


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Use this many threads, of those the caller allows: small problems would only wait for them on a busy machine."""
    before = numba.get_num_threads()
    numba.set_num_threads(number)
    try:
        yield
    finally:
        numba.set_num_threads(before)


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
) -> Moments:
    """Return the posterior moments of `queries`; see `dfmath.backends.posterior_moments`.

    Components whose joint posterior mass is certified to be at most `tolerance` are left out of the moments.
    """
    if not supports(components):
        return array_api.posterior_moments(
            queries, components, alpha, sigma, want=want, space=space, probes=probes, tolerance=tolerance
        )
    spherical = cast(Diagonal, components)
    count, dim = queries.shape
    width = 0 if probes is None else probes.shape[2]
    trace = np.zeros((count, int("trace" in want)))
    diagonal = np.zeros((count, dim if "diagonal" in want else 0))
    product = np.zeros((count, width, dim))
    dense = np.zeros((count, dim, dim) if "dense" in want else (count, 0, 0))
    log_mass, low, omitted, within = np.full(count, -np.inf), *np.zeros((3, count))
    anchor, shift = np.zeros((count, dim)), np.zeros((count, dim))
    rows = np.zeros((count, 0, dim)) if probes is None else np.ascontiguousarray(np.swapaxes(probes, 1, 2))
    tile = max(16, min(1024, TILE_BYTES // (8 * dim)))
    threads = max(1, min(numba.get_num_threads(), count * components.count * dim // THREAD_WORK))
    block = max(1, min(QUERY_BLOCK, -(-count // threads)))
    cut = math.inf if tolerance <= 0 else math.log(components.count / tolerance)
    with _threads(threads):
        _sweep(
            *(np.ascontiguousarray(queries), spherical.centres[0], spherical.log_weights[0].astype(np.float64)),
            *(spherical.variances[0, :, 0].astype(np.float64), alpha, sigma, space == "score", bool(want)),
            *(cut, tile, block, rows, log_mass, low, omitted, within, anchor, shift, trace, diagonal, product, dense),
        )
    if not want:
        return Moments(log_mass, low, None, None, Second(), Second(), omitted)
    between = Second(
        trace=trace[:, 0] if "trace" in want else None,
        diagonal=diagonal if "diagonal" in want else None,
        product=np.swapaxes(product, 1, 2) if "product" in want else None,
        dense=_symmetric(dense) if "dense" in want else None,
    )
    return Moments(log_mass, low, anchor, shift, _multiples_of_identity(within, dim, want, probes), between, omitted)


def _multiples_of_identity(scale: Any, dim: int, want: frozenset[Want], probes: Any | None) -> Second:
    return Second(
        trace=dim * scale if "trace" in want else None,
        diagonal=np.repeat(scale[:, None], dim, axis=1) if "diagonal" in want else None,
        product=scale[:, None, None] * probes if "product" in want else None,
        dense=scale[:, None, None] * np.eye(dim) if "dense" in want else None,
    )


def _symmetric(lower: Any) -> Any:
    """Mirror the lower triangles in place."""
    rows, columns = np.triu_indices(lower.shape[1], 1)
    lower[:, rows, columns] = lower[:, columns, rows]
    return lower


@njit(cache=True, parallel=True, error_model="numpy")
def _sweep(  # pragma: no cover - compiled
    queries: Any,
    points: Any,
    log_weights: Any,
    variances: Any,
    alpha: Any,
    sigma: Any,
    score: bool,
    vectors_wanted: bool,
    cut: float,
    tile: int,
    block: int,
    probes: Any,
    log_mass: Any,
    log_mass_low: Any,
    omitted: Any,
    within: Any,
    anchor: Any,
    shift: Any,
    trace: Any,
    diagonal: Any,
    product: Any,
    dense: Any,
) -> None:
    count, dim = queries.shape
    for part in prange((count + block - 1) // block):
        logits, lows = np.empty(tile), np.zeros(tile)
        centred = np.empty((tile, dim))
        mean = np.empty(dim)
        guess = np.full(block, -np.inf)
        if dim > 4 * _STRIDE:
            for b in range(part * block, min((part + 1) * block, count)):
                a = alpha[b if alpha.shape[0] > 1 else 0]
                s = sigma[b if sigma.shape[0] > 1 else 0]
                guess[b - part * block] = _logit_of_a_near_one(queries[b], points, log_weights, variances, a, s)
        for start in range(0, points.shape[0], tile):
            stop = min(start + tile, points.shape[0])
            for b in range(part * block, min((part + 1) * block, count)):
                x = queries[b]
                a = alpha[b if alpha.shape[0] > 1 else 0]
                s = sigma[b if sigma.shape[0] > 1 else 0]
                known = max(log_mass[b], guess[b - part * block])
                best = _fill_logits(x, points, log_weights, variances, a, s, start, stop, known, logits, lows)
                top = logits[best]
                if top == -np.inf:
                    continue
                floor = max(log_mass[b], top) - cut
                omitted[b] += _count_below(logits, stop - start, floor) * math.exp(-cut)
                if top < floor:
                    continue
                mass = _exponentiate(logits, lows, stop - start, best, floor)
                share, rest = _merge_mass(log_mass, log_mass_low, b, top, lows[best], mass)
                if vectors_wanted:
                    kept, spread = _centre(
                        x, points, variances, a, s, score, start, stop, best, logits, mass, mean, centred
                    )
                    variance = variances[(start + best) if variances.shape[0] > 1 else 0]
                    _merge_mean(anchor[b], shift[b], share, rest, mean, x, points[start + best], variance, a, s, score)
                    within[b] = rest * within[b] + share * spread
                    _merge_trace(trace[b], centred, logits, kept, share, rest, mean)
                    _merge_diagonal(diagonal[b], centred, logits, kept, share, rest, mean)
                    _merge_product(product[b], probes[b], centred, logits, kept, share, rest, mean)
                    _merge_dense(dense[b], centred, logits, kept, share, rest, mean)


@_summing
def _squared_distance(x, alpha, y, first, last):  # type: ignore[no-untyped-def]
    square = 0.0
    for j in range(first, last):
        difference = x[j] - alpha * y[j]
        square += difference * difference
    return square


@_exactly
def _squared_distance_up_to(x, alpha, y, limit):  # type: ignore[no-untyped-def]
    """|x - alpha y|^2, or infinity as soon as it is known to be beyond the limit."""
    dim, square = x.shape[0], 0.0
    for first in range(0, dim, _STRIDE):
        square += _squared_distance(x, alpha, y, first, min(first + _STRIDE, dim))
        if square > limit:
            return np.inf
    return square


@_exactly
def _logit_of_a_near_one(x, points, log_weights, variances, alpha, sigma):  # type: ignore[no-untyped-def]
    """Logit of the component that is nearest in four strips of the coordinates: at most the largest of all logits.

    It costs a small part of a sweep and lets the sweep leave most distances unfinished where noise is low.
    """
    dim, near, least, strip = x.shape[0], 0, np.inf, _STRIDE // 4
    for n in range(points.shape[0]):
        square = 0.0
        for k in range(4):
            first = k * (dim // 4)
            square += _squared_distance(x, alpha, points[n], first, first + strip)
        if square < least and log_weights[n] > -np.inf:
            least, near = square, n
    spread = alpha * alpha * variances[near if variances.shape[0] > 1 else 0] + sigma * sigma
    square = _squared_distance(x, alpha, points[near], 0, dim) / spread
    return log_weights[near] - 0.5 * (square + dim * (math.log(spread) + LOG_2PI))


@_summing
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = 0.0
    for j in range(a.shape[0]):
        total += a[j] * b[j]
    return total


@_fused
def _fill_logits(x, points, log_weights, variances, alpha, sigma, start, stop, known, logits, lows):  # type: ignore[no-untyped-def]
    """Logits of the tile's components from plain differences, refined where that shows; returns the largest's place.

    `known` is at most the largest logit of all components: those whose weight beside it is zero in float64 become -inf
    as soon as enough of their distance is summed to know.
    """
    best, dim = 0, x.shape[0]
    spread = alpha * alpha * variances[0] + sigma * sigma
    constant = dim * (math.log(spread) + LOG_2PI)
    nearest = math.inf
    for n in range(start, stop):
        if variances.shape[0] > 1:
            spread = alpha * alpha * variances[n] + sigma * sigma
            constant = dim * (math.log(spread) + LOG_2PI)
        top = max(known, logits[best] if n > start else -math.inf)
        floor = top - _DEPTH - _LOGIT_ERROR * abs(top) if top > -math.inf else top
        limit = spread * (2.0 * (log_weights[n] - floor) - constant)
        square = _squared_distance_up_to(x, alpha, points[n], limit) / spread
        nearest = min(nearest, square)
        logits[n - start] = log_weights[n] - 0.5 * (square + constant)
        if logits[n - start] > logits[best]:
            best = n - start
    lows[: stop - start] = 0.0
    if variances.shape[0] > 1 or _plain_error(nearest, math.sqrt(_dot(x, x) / spread), dim) <= LIMIT:
        return best
    return _refine_logits(x, points, log_weights, alpha, spread, constant, start, stop, best, logits, lows)


@_exactly
def _plain_error(nearest, reach, dim):  # type: ignore[no-untyped-def]
    """`double.plain_logit_error`."""
    square = nearest + MATTERS
    root = math.sqrt(square)
    return 2.2e-16 * (root * (2.0 * reach + root) + square * (0.25 * math.sqrt(dim) + 4.0))


@_exactly
def _refine_logits(x, points, log_weights, alpha, spread, constant, start, stop, best, logits, lows):  # type: ignore[no-untyped-def]
    """Recompute the logits that do not underflow in two terms, as `double` does; returns the largest's place."""
    floor = logits[best] - _FINE_CUT - _LOGIT_ERROR * abs(logits[best])
    for n in range(start, stop):
        if logits[n - start] >= floor and logits[n - start] > -math.inf:
            square, low = _two_term_squared_distance(x, alpha, points[n])
            factor = -0.5 / spread
            half, half_low = _two_product(square, factor)
            half, half_low = _two_sum(half, half_low + low * factor)
            logits[n - start], error = _two_sum(log_weights[n] - 0.5 * constant, half)
            lows[n - start] = half_low + error
    for n in range(stop - start):
        if logits[n] > logits[best] or (logits[n] == logits[best] and lows[n] > lows[best]):
            best = n
    return best


@_exactly
def _two_term_squared_distance(x, alpha, y):  # type: ignore[no-untyped-def]
    high, low = 0.0, 0.0
    for j in range(x.shape[0]):
        r, r_low = _residual(x[j], alpha, np.float64(y[j]))
        square, square_low = _two_product(r, r)
        high, error = _two_sum(high, square)
        low += error + square_low + 2.0 * r * r_low
    return high, low


@_exactly
def _residual(x, alpha, y):  # type: ignore[no-untyped-def]
    """X - alpha y in two terms."""
    p, p_low = _two_product(alpha, y)
    r, r_low = _two_sum(x, -p)
    return _two_sum(r, r_low - p_low)


@_exactly
def _two_sum(a, b):  # type: ignore[no-untyped-def]
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@_exactly
def _two_product(a, b):  # type: ignore[no-untyped-def]
    p = a * b
    c, d = 134217729.0 * a, 134217729.0 * b
    a_high, b_high = c - (c - a), d - (d - b)
    a_low, b_low = a - a_high, b - b_high
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


@_exactly
def _count_below(logits, count, floor):  # type: ignore[no-untyped-def]
    """How many components that carry weight fall below the floor."""
    below = 0
    for n in range(count):
        below += -np.inf < logits[n] < floor
    return below


@_exactly
def _exponentiate(logits, lows, count, best, floor):  # type: ignore[no-untyped-def]
    """Turn logits into weights relative to the largest, zero below the floor; returns their sum."""
    mass, top, top_low = 0.0, logits[best], lows[best]
    for n in range(count):
        logits[n] = math.exp((logits[n] - top) + (lows[n] - top_low)) if logits[n] >= floor else 0.0
        mass += logits[n]
    return mass


@_exactly
def _merge_mass(log_mass, log_mass_low, b, top, top_low, mass):  # type: ignore[no-untyped-def]
    """Add the tile's mass, exp(top + top_low) mass, to query b's; returns the tile's share of the sum, and the rest.

    The lighter of the two may be any small number: it is never formed as 1 minus the other.
    """
    tile, error = _two_sum(top, math.log(mass))
    tile_low = top_low + error
    excess = (tile - log_mass[b]) + (tile_low - log_mass_low[b])
    light = math.exp(-abs(excess))
    if excess > 0:
        log_mass[b], log_mass_low[b] = tile, tile_low
    log_mass[b], error = _two_sum(log_mass[b], math.log1p(light))
    log_mass_low[b] += error
    heavy, light = 1.0 / (1.0 + light), light / (1.0 + light)
    return (heavy, light) if excess > 0 else (light, heavy)


@_fused
def _coefficients(variance, alpha, sigma, score):  # type: ignore[no-untyped-def]
    """Return (S, p, q, g) of a spherical component, with r = x - alpha mu and S = alpha^2 c + sigma^2.

    The score s = -r/S and the posterior mean m = mu + (alpha c/S) r are both q r plus a multiple of mu, and their
    matrices are g I. Differences are u_k - u_a = p (mu_k - mu_a) + (q_k - q_a) r with p of one and r of the other of
    k and a: with p of the wider, neither term is larger than the two vectors are.
    """
    spread = alpha * alpha * variance + sigma * sigma
    if score:
        return spread, alpha / spread, -1.0 / spread, 1.0 / spread
    return spread, sigma * sigma / spread, alpha * variance / spread, sigma * sigma * variance / spread


@_fused
def _depart(row, mean, w, p, y, anchor):  # type: ignore[no-untyped-def]
    for j in range(row.shape[0]):
        u = p * (np.float64(y[j]) - np.float64(anchor[j]))
        row[j] = u
        mean[j] += w * u


@_fused
def _turn(row, mean, w, turn, x, alpha, y):  # type: ignore[no-untyped-def]
    for j in range(row.shape[0]):
        u = turn * (x[j] - alpha * y[j])
        row[j] += u
        mean[j] += w * u


@_fused
def _centre(x, points, variances, alpha, sigma, score, start, stop, best, weights, mass, mean, centred):  # type: ignore[no-untyped-def]
    """Gather the weighted components' vectors, centred at their mean.

    Overwrites the first `kept` weights by normalised ones and the first `kept` rows of `centred` by u_k - E[u];
    `mean` becomes E[u] - u_anchor. Returns `kept` and E[g].
    """
    dim, kept, spread = x.shape[0], 0, 0.0
    mean[:] = 0.0
    a = start + best
    variance = variances[a if variances.shape[0] > 1 else 0]
    s_a, p_a, _, g = _coefficients(variance, alpha, sigma, score)
    lever = alpha * alpha if score else alpha * sigma * sigma
    for n in range(start, stop):
        w = weights[n - start] / mass
        if w > 0.0:
            p, turn, narrow = p_a, 0.0, n
            if variances.shape[0] > 1:
                s, p_n, _, g = _coefficients(variances[n], alpha, sigma, score)
                turn = lever * (variances[n] - variance) / (s * s_a)  # q_n - q_a
                if s > s_a:
                    p, narrow = p_n, a
            spread += w * g
            _depart(centred[kept], mean, w, p, points[n], points[a])
            if turn != 0.0:
                _turn(centred[kept], mean, w, turn, x, alpha, points[narrow])
            weights[kept] = w
            kept += 1
    for n in range(kept):
        for j in range(dim):
            centred[n, j] -= mean[j]
    return kept, spread


@_exactly
def _merge_mean(anchor, shift, share, rest, mean, x, centre, variance, alpha, sigma, score):  # type: ignore[no-untyped-def]
    """Fold the tile's mean into the running one; `mean` becomes the tile's mean less the old one.

    The anchor moves to the heavier side.
    """
    _, _, q, _ = _coefficients(variance, alpha, sigma, score)
    for j in range(x.shape[0]):
        # In two terms: the mean of components far from the origin is known no better than eps, its changes are.
        u, low = _two_sum(np.float64(0.0 if score else centre[j]), q * _residual(x[j], alpha, np.float64(centre[j]))[0])
        delta = (u - anchor[j]) + (low + mean[j] - shift[j])
        if share > 0.5:
            shift[j] = low + mean[j] - rest * delta
            anchor[j] = u
        else:
            shift[j] += share * delta
        mean[j] = delta


@_fused
def _merge_trace(total, centred, weights, kept, share, rest, delta):  # type: ignore[no-untyped-def]
    if total.shape[0] > 0:
        value = 0.0
        for n in range(kept):
            value += weights[n] * _dot(centred[n], centred[n])
        total[0] = rest * total[0] + share * value + share * rest * _dot(delta, delta)


@_fused
def _merge_diagonal(total, centred, weights, kept, share, rest, delta):  # type: ignore[no-untyped-def]
    for j in range(total.shape[0]):
        total[j] = rest * total[j] + share * rest * delta[j] * delta[j]
    if total.shape[0] > 0:
        for n in range(kept):
            for j in range(total.shape[0]):
                total[j] += share * weights[n] * centred[n, j] * centred[n, j]


@_fused
def _merge_product(total, probes, centred, weights, kept, share, rest, delta):  # type: ignore[no-untyped-def]
    """Fold sum_n w_n c_n (c_n . v) and share (1 - share) delta (delta . v) into the products, probe by probe."""
    for p in range(total.shape[0]):
        along = share * rest * _dot(delta, probes[p])
        for j in range(total.shape[1]):
            total[p, j] = rest * total[p, j] + along * delta[j]
        for n in range(kept):
            along = share * weights[n] * _dot(centred[n], probes[p])
            for j in range(total.shape[1]):
                total[p, j] += along * centred[n, j]


@_fused
def _merge_dense(total, centred, weights, kept, share, rest, delta):  # type: ignore[no-untyped-def]
    """Fold sum_n w_n c_n c_n^T into the lower triangle, four rows at a time so that each load serves four sums."""
    dim = total.shape[0]
    for i in range(dim):
        for j in range(i + 1):
            total[i, j] = rest * total[i, j] + share * rest * delta[i] * delta[j]
    for n in range(0, kept - kept % 4 if dim > 0 else 0, 4):
        a, b, c, d = centred[n], centred[n + 1], centred[n + 2], centred[n + 3]
        for i in range(dim):
            ai, bi = share * weights[n] * a[i], share * weights[n + 1] * b[i]
            ci, di = share * weights[n + 2] * c[i], share * weights[n + 3] * d[i]
            row = total[i]
            for j in range(i + 1):
                row[j] += ai * a[j] + bi * b[j] + ci * c[j] + di * d[j]
    for n in range(kept - kept % 4, kept if dim > 0 else 0):
        for i in range(dim):
            ai = share * weights[n] * centred[n, i]
            for j in range(i + 1):
                total[i, j] += ai * centred[n, j]
