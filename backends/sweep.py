"""One tile of spherical components, swept by a block of queries: choose, weigh, and fold into the running moments.

Bounds from a product leave few components to choose where noise is low; without them all are looked at. Logits come
from differences, in two terms where an a-priori estimate says that rounding could show. Vectors are centred at their
mean where they are few enough to be held together, else at the tile's heaviest component a: with weights w of sum 1,
sum w u^2 = Var + (E u)^2 and (E u)^2 <= Var (1 - w_a)/w_a, so the one-pass form loses at most a factor 1/w_a, the
number of components in a tile. What was lost, and what sums of many terms round, is counted: see `_note_rounding`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from dfmath.backends.components import LOG_2PI
from dfmath.backends.diagonal import Diagonal
from dfmath.backends.numba_arithmetic import (
    dot,
    exactly,
    fused,
    residual,
    squared_distance,
    two_product,
    two_sum,
    two_term_squared_distance,
)
from dfmath.backends.precision import MATTERS
from numba import njit, prange

DEPTH = 746.0  # exp(-746) is zero: a component this far (in log) below another carries no weight at all
EPS = 2.0**-52
LOGIT_ERROR = 1e-14  # more than any relative error of a plain logit


class State(NamedTuple):
    """Running moments of a block of queries, updated in place tile by tile; see `moments.Moments`."""

    log_mass: Any  # (B,)
    log_mass_low: Any  # (B,)
    best: Any  # (B,) the largest logit seen
    omitted: Any  # (B,)
    kept: Any  # (B,) components taken up from differences
    within: Any  # (B,)
    rounding: Any  # (B,) bound on what sums over components rounded, where traces are wanted
    anchor: Any  # (B, d)
    shift: Any  # (B, d)
    trace: Any  # (B, 0 | 1)
    diagonal: Any  # (B, 0 | d)
    product: Any  # (B, p, d)
    dense: Any  # (B, 0 | d, 0 | d), lower triangles


class Problem(NamedTuple):
    """A block of queries and how they ask."""

    queries: Any  # (B, d)
    alpha: Any  # (B,)
    sigma: Any  # (B,)
    cut: Any  # (B,) leave out components this far, in log, below the largest
    probes: Any  # (B, p, d)
    score: bool  # which space
    vectors: bool  # whether anything beside the log mass is wanted
    limit: float  # the largest error that plain logits may have
    buffer: int  # vectors that one thread holds at a time
    listed: Any  # (B, L) the only components to look at, or -1; (B, 0) where bounds decide


class Tile(NamedTuple):
    """A range of components."""

    points: Any  # (T, d)
    log_weights: Any  # (T,)
    variances: Any  # (T,) or (1,)

    def part(self, start: int, stop: int) -> Tile:
        """A range of these components."""
        variances = self.variances[start:stop] if len(self.variances) > 1 else self.variances
        return Tile(self.points[start:stop], self.log_weights[start:stop], variances)


def whole_tile(components: Diagonal) -> Tile:
    """All spherical components, weights and variances in float64."""
    logs, variances = components.log_weights[0], components.variances[0, :, 0]
    return Tile(components.centres[0], *(np.asarray(a, dtype=np.float64) for a in (logs, variances)))


@njit(cache=True, parallel=True, error_model="numpy", nogil=True)
def sweep(problem: Any, tile: Any, upper: Any, state: Any, block: int) -> None:  # pragma: no cover - compiled
    """Fold a tile of components into the state of every query; threads take `block` queries at a time.

    `upper` are bounds on the logits (chunk, B, component of the chunk), see `threaded`; none if it is empty.
    """
    count, size = problem.queries.shape[0], problem.listed.shape[1]
    size = size if size > 0 else tile.points.shape[0]
    for part in prange((count + block - 1) // block):
        logits, lows, chosen = np.empty(size), np.zeros(size), np.empty(size, dtype=np.int64)
        rows, weights = np.empty((problem.buffer, problem.queries.shape[1])), np.empty(problem.buffer)
        mean = np.empty(problem.queries.shape[1])
        for b in range(part * block, min((part + 1) * block, count)):
            kept = _choose(problem, tile, upper, state, b, chosen)
            if kept > 0:
                best = _fill_logits(problem, tile, state, b, chosen, kept, logits, lows)
                _fold(problem, tile, state, b, chosen, kept, best, logits, lows, rows, weights, mean)


@njit(cache=True, parallel=True, error_model="numpy", nogil=True)
def look_up(problem: Any, everything: Any, promising: Any, best: Any) -> None:  # pragma: no cover - compiled
    """Raise `best` to the logit of one component for each query."""
    for b in prange(problem.queries.shape[0]):
        best[b] = max(best[b], logit(problem, everything, b, promising[b], -np.inf))


@exactly
def _choose(problem, tile, upper, state, b, chosen):  # type: ignore[no-untyped-def]
    """List the tile's components that may carry weight; returns their number."""
    size, width, kept = tile.points.shape[0], upper.shape[2], 0
    if problem.listed.shape[1] > 0:
        return _choose_listed(problem, state, b, size, chosen)
    if upper.shape[0] == 0:
        for n in range(size):
            chosen[n] = n
        return size
    promising, most = place_of_largest(upper, b, size)
    if most > state.best[b]:
        state.best[b] = max(state.best[b], logit(problem, tile, b, promising, logit_floor(state.best[b], 0.0)))
    floor = logit_floor(state.best[b], problem.cut[b])
    for c in range(upper.shape[0]):
        row = upper[c, b]
        for n in range(min(width, size - c * width)):
            if row[n] >= floor:
                chosen[kept] = c * width + n
                kept += 1
    state.omitted[b] += (size - kept) * math.exp(-problem.cut[b])
    return kept


@exactly
def _choose_listed(problem, state, b, size, chosen):  # type: ignore[no-untyped-def]
    kept = 0
    for n in problem.listed[b]:
        if n >= 0:
            chosen[kept] = n
            kept += 1
    state.omitted[b] += (size - kept) * math.exp(-problem.cut[b])
    return kept


@exactly
def place_of_largest(upper, b, size):  # type: ignore[no-untyped-def]
    """Return the component with the largest bound, and the bound."""
    width, best, most = upper.shape[2], 0, -np.inf
    for c in range(upper.shape[0]):
        row = upper[c, b]
        for n in range(min(width, size - c * width)):
            if row[n] > most:
                best, most = c * width + n, row[n]
    return best, most


@exactly
def logit_floor(best, cut):  # type: ignore[no-untyped-def]
    """Logit below which a component is left out; rounding of the logits themselves keeps what it could decide."""
    return best - min(cut, DEPTH) - LOGIT_ERROR * abs(best) if best > -np.inf else best


@exactly
def logit(problem, tile, b, n, floor):  # type: ignore[no-untyped-def]
    """A plain logit, or -inf as soon as it is known to be below the floor."""
    alpha, sigma = problem.alpha[b], problem.sigma[b]
    variance = tile.variances[n if tile.variances.shape[0] > 1 else 0]
    spread = alpha * alpha * variance + sigma * sigma
    constant = problem.queries.shape[1] * (math.log(spread) + LOG_2PI)
    limit = spread * (2.0 * (tile.log_weights[n] - floor) - constant)
    square = squared_distance(problem.queries[b], alpha, tile.points[n], limit)
    return tile.log_weights[n] - 0.5 * (square / spread + constant)


@exactly
def _fill_logits(problem, tile, state, b, chosen, kept, logits, lows):  # type: ignore[no-untyped-def]
    """Logits of the chosen components, refined where rounding shows; returns the place of the largest.

    Those far enough below the best one to be left out become -inf.
    """
    best = 0
    for i in range(kept):
        logits[i] = logit(problem, tile, b, chosen[i], logit_floor(state.best[b], problem.cut[b]))
        lows[i] = 0.0
        if logits[i] > logits[best]:
            best = i
        state.best[b] = max(state.best[b], logits[best])
    state.kept[b] += kept
    if tile.variances.shape[0] > 1 or _plain_error(problem, tile, b, logits[best], chosen[best]) <= problem.limit:
        return best
    return _refine_logits(problem, tile, b, chosen, kept, best, logits, lows)


@exactly
def _plain_error(problem, tile, b, logit, n):  # type: ignore[no-untyped-def]
    """`precision.plain_logit_error` with the distance of the nearest component taken from its logit."""
    x, dim = problem.queries[b], problem.queries.shape[1]
    spread = problem.alpha[b] * problem.alpha[b] * tile.variances[0] + problem.sigma[b] * problem.sigma[b]
    square = 2.0 * (tile.log_weights[n] - logit) - dim * (math.log(spread) + LOG_2PI) + MATTERS
    root, reach = math.sqrt(max(square, MATTERS)), math.sqrt(dot(x, x) / spread)
    return EPS * (root * (2.0 * reach + root) + root * root * (0.25 * math.sqrt(dim) + 4.0))


@exactly
def _refine_logits(problem, tile, b, chosen, kept, best, logits, lows):  # type: ignore[no-untyped-def]
    """Recompute in two terms, as `double` does, the logits that do not underflow; returns the largest's place."""
    alpha, sigma = problem.alpha[b], problem.sigma[b]
    spread = alpha * alpha * tile.variances[0] + sigma * sigma
    half_constant = 0.5 * problem.queries.shape[1] * (math.log(spread) + LOG_2PI)
    floor = logit_floor(logits[best], problem.cut[b])
    for i in range(kept):
        if logits[i] >= floor and logits[i] > -np.inf:
            n = chosen[i]
            square, low = two_term_squared_distance(problem.queries[b], alpha, tile.points[n])
            half, half_low = two_product(square, -0.5 / spread)
            half, half_low = two_sum(half, half_low - 0.5 / spread * low)
            constant, constant_low = two_sum(tile.log_weights[n], -half_constant)
            logits[i], error = two_sum(constant, half)
            lows[i] = half_low + (error + constant_low)
    for i in range(kept):
        if logits[i] > logits[best] or (logits[i] == logits[best] and lows[i] > lows[best]):
            best = i
    return best


@exactly
def _fold(problem, tile, state, b, chosen, kept, best, logits, lows, rows, weights, mean):  # type: ignore[no-untyped-def]
    """Weigh the chosen components and add them to query b's moments."""
    top = logits[best]
    floor = max(state.log_mass[b], top) - problem.cut[b]
    if top == -np.inf or top < floor:
        state.omitted[b] += kept * math.exp(-problem.cut[b]) if top > -np.inf else 0.0
        return
    mass = _exponentiate(problem, state, b, logits, lows, kept, best, floor)
    share, rest = _merge_mass(state.log_mass, state.log_mass_low, b, top, lows[best], mass)
    if problem.vectors:
        _scale_forms(state, b, rest)
        old = state.trace[b].sum()
        spread = _add_vectors(problem, tile, state, b, chosen, kept, best, logits, mass, share, rows, weights, mean)
        wide = tile.variances.shape[0] > 1
        state.within[b] = rest * state.within[b] + share * spread if wide else spread
        apart = 0.0 if wide or kept <= rows.shape[0] else share
        if apart > 0.0:
            _add_outer(problem, state, b, mean, -apart)
        _note_rounding(state, b, kept, old, share * spread if wide else 0.0, apart * dot(mean, mean), rest)
        _merge_mean(problem, tile, state, b, chosen[best], share, rest, mean)
        _add_outer(problem, state, b, mean, share * rest)


@exactly
def _note_rounding(state, b, kept, old, spread, apart, rest):  # type: ignore[no-untyped-def]
    """Add to the bound on what rounded in a tile's sums, beyond the (2 d + 20) u tr Cov that any such sum may lose.

    Sums of n terms lose at most n u times the sum of their sizes: of w |c|^2 for the forms, about the mean, and of w g.
    About another vector these are Cov + |m|^2, with `apart` the tile's |m|^2, m itself is off by n u of its terms, and
    both |m|^2 that cancel lose as much as a form does. Merging rounds shares, means and sums: 8 u of what there is.
    """
    if state.trace.shape[1] == 0:
        return
    dim, own = state.anchor.shape[1], max(state.trace[b, 0] - old, 0.0)
    found = (kept - dim - 20) * (own + spread) + (2 * dim + 3 * kept + 20) * apart
    steps = 0.0 if rest == 0.0 else 8.0 if min(rest, 1.0 - rest) > EPS else 1.0  # nothing is scaled by a share of 1
    merged = steps * (old + own + state.within[b])
    state.rounding[b] = rest * state.rounding[b] + 0.5 * EPS * (max(found, 0.0) + merged)


@exactly
def _exponentiate(problem, state, b, logits, lows, kept, best, floor):  # type: ignore[no-untyped-def]
    """Turn logits into weights relative to the largest, zero below the floor; returns their sum."""
    mass, low, top, top_low, below = 0.0, 0.0, logits[best], lows[best], 0
    for i in range(kept):
        below += logits[i] < floor
        logits[i] = math.exp((logits[i] - top) + (lows[i] - top_low)) if logits[i] >= floor else 0.0
        mass, error = two_sum(mass, logits[i])  # weights of thousands of equal components are to sum to 1
        low += error
    state.omitted[b] += below * math.exp(-problem.cut[b])
    return mass + low


@exactly
def _merge_mass(log_mass, log_mass_low, b, top, top_low, mass):  # type: ignore[no-untyped-def]
    """Add the tile's mass, exp(top + top_low) mass, to query b's; returns the tile's share of the sum, and the rest.

    The lighter of the two may be any small number: it is never formed as 1 minus the other.
    """
    tile, error = two_sum(top, math.log(mass))
    tile_low = top_low + error
    excess = (tile - log_mass[b]) + (tile_low - log_mass_low[b])
    light = math.exp(-abs(excess))
    if excess > 0:
        log_mass[b], log_mass_low[b] = tile, tile_low
    log_mass[b], error = two_sum(log_mass[b], math.log1p(light))
    log_mass[b], log_mass_low[b] = two_sum(log_mass[b], log_mass_low[b] + error)
    heavy, light = 1.0 / (1.0 + light), light / (1.0 + light)
    return (heavy, light) if excess > 0 else (light, heavy)


@fused
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


@fused
def _add_vectors(problem, tile, state, b, chosen, kept, best, logits, mass, share, rows, weights, mean):  # type: ignore[no-untyped-def]
    """Add sum_k w_k c_k c_k^T to the forms, a bufferful of vectors at a time.

    c_k is u_k - E[u], but u_k - u_a for one common variance and more vectors than a buffer holds; where variances
    differ the matrices E[G] that Cov[u] is subtracted from may cancel it. `mean` becomes E[u] - u_a; returns E[g].
    """
    a, held, spread, wide = chosen[best], 0, 0.0, tile.variances.shape[0] > 1
    mean[:] = 0.0
    if wide:
        for i in range(kept):
            w = logits[i] / mass
            if w > 0.0:
                _offset(problem, tile, b, chosen[i], a, rows[0])
                _add_multiple(mean, w, rows[0])
    for i in range(kept):
        w, n = logits[i] / mass, chosen[i]
        if w > 0.0:
            g = _offset(problem, tile, b, n, a, rows[held])
            spread = spread + w * g if wide else g
            _add_multiple(rows[held] if wide else mean, -1.0 if wide else w, mean if wide else rows[held])
            weights[held] = share * w
            held += 1
        if held == rows.shape[0] or (i == kept - 1 and held > 0):
            if not wide and kept <= rows.shape[0]:
                for h in range(held):
                    _add_multiple(rows[h], -1.0, mean)
            _add_rows(problem, state, b, rows, weights, held)
            held = 0
    return spread


@fused
def _offset(problem, tile, b, n, a, row):  # type: ignore[no-untyped-def]
    """Fill in u_n - u_a; returns g_n."""
    alpha, sigma, score = problem.alpha[b], problem.sigma[b], problem.score
    wide, narrow = tile.variances.shape[0] > 1, n
    variance = tile.variances[a if wide else 0]
    s_a, p, _, g = _coefficients(variance, alpha, sigma, score)
    if not wide:
        _depart(row, p, tile.points[n], tile.points[a])
        return g
    s, p_n, _, g = _coefficients(tile.variances[n], alpha, sigma, score)
    if s > s_a:
        p, narrow = p_n, a
    turn = (alpha * alpha if score else alpha * sigma * sigma) * (tile.variances[n] - variance) / (s * s_a)  # q_n - q_a
    _depart(row, p, tile.points[n], tile.points[a])
    _turn(row, turn, problem.queries[b], alpha, tile.points[narrow])
    return g


@fused
def _depart(row, p, y, anchor):  # type: ignore[no-untyped-def]
    for j in range(row.shape[0]):
        row[j] = p * (np.float64(y[j]) - np.float64(anchor[j]))


@fused
def _turn(row, turn, x, alpha, y):  # type: ignore[no-untyped-def]
    for j in range(row.shape[0]):
        row[j] += turn * (x[j] - alpha * y[j])


@exactly
def _merge_mean(problem, tile, state, b, a, share, rest, mean):  # type: ignore[no-untyped-def]
    """Fold the tile's mean into the running one; `mean` becomes the tile's mean less the old one.

    The anchor moves to the heavier side.
    """
    x, alpha, centre = problem.queries[b], problem.alpha[b], tile.points[a]
    variance = tile.variances[a if tile.variances.shape[0] > 1 else 0]
    spread, _, q, _ = _coefficients(variance, alpha, problem.sigma[b], problem.score)
    anchor, shift = state.anchor[b], state.shift[b]
    square = problem.sigma[b] * problem.sigma[b]
    from_query = not problem.score and square < alpha * alpha * variance  # see `double.posterior_mean`
    for j in range(x.shape[0]):
        # In two terms: the mean of components far from the origin is known no better than eps, its changes are.
        r, y = residual(x[j], alpha, np.float64(centre[j]))[0], x[j] / alpha
        if from_query:
            u, low = two_sum(y, -square / (alpha * spread) * r)
            low += residual(x[j], alpha, y)[0] / alpha
        else:
            u, low = two_sum(0.0 if problem.score else np.float64(centre[j]), q * r)
        delta = (u - anchor[j]) + (low + mean[j] - shift[j])
        if share > 0.5:
            shift[j] = low + mean[j] - rest * delta
            anchor[j] = u
        else:
            shift[j] += share * delta
        mean[j] = delta


@fused
def _scale_forms(state, b, factor):  # type: ignore[no-untyped-def]
    state.trace[b] *= factor
    state.diagonal[b] *= factor
    state.product[b] *= factor
    for i in range(state.dense.shape[1]):
        for j in range(i + 1):
            state.dense[b, i, j] *= factor


@fused
def _add_outer(problem, state, b, u, weight):  # type: ignore[no-untyped-def]
    """Add weight u u^T to the forms."""
    if state.trace.shape[1] > 0:
        state.trace[b, 0] += weight * dot(u, u)
    for j in range(state.diagonal.shape[1]):
        state.diagonal[b, j] += weight * u[j] * u[j]
    for p in range(state.product.shape[1]):
        _add_multiple(state.product[b, p], weight * dot(u, problem.probes[b, p]), u)
    for i in range(state.dense.shape[1]):
        _add_multiple(state.dense[b, i, : i + 1], weight * u[i], u)


@fused
def _add_multiple(total, factor, row):  # type: ignore[no-untyped-def]
    for j in range(total.shape[0]):
        total[j] += factor * row[j]


@fused
def _add_rows(problem, state, b, rows, weights, held):  # type: ignore[no-untyped-def]
    """Add sum_i w_i c_i c_i^T to the forms."""
    for i in range(held):
        if state.trace.shape[1] > 0:
            state.trace[b, 0] += weights[i] * dot(rows[i], rows[i])
        for j in range(state.diagonal.shape[1]):
            state.diagonal[b, j] += weights[i] * rows[i, j] * rows[i, j]
        for p in range(state.product.shape[1]):
            _add_multiple(state.product[b, p], weights[i] * dot(rows[i], problem.probes[b, p]), rows[i])
    if state.dense.shape[1] > 0:
        _add_dense(state.dense[b], rows, weights, held)


@fused
def _add_dense(total, rows, weights, held):  # type: ignore[no-untyped-def]
    """Fill the lower triangle, four rows at a time so that each load serves four sums."""
    dim = total.shape[0]
    for n in range(0, held - held % 4, 4):
        a, b, c, d = rows[n], rows[n + 1], rows[n + 2], rows[n + 3]
        for i in range(dim):
            ai, bi = weights[n] * a[i], weights[n + 1] * b[i]
            ci, di = weights[n + 2] * c[i], weights[n + 3] * d[i]
            row = total[i]
            for j in range(i + 1):
                row[j] += ai * a[j] + bi * b[j] + ci * c[j] + di * d[j]
    for n in range(held - held % 4, held):
        for i in range(dim):
            _add_multiple(total[i, : i + 1], weights[n] * rows[n, i], rows[n])
