"""The reference backend: posterior moments in any array-API namespace, streamed over tiles.

It is the specification of every other backend, and what torch, CuPy, JAX and strict arrays run on. All sums are kept in
float64 where the device has it. A tile holds (b, k, d) numbers, never (B, N).
"""

from __future__ import annotations

from collections.abc import Iterator

from dfmath.backends._compat import Array, accumulation_dtype, array_namespace
from dfmath.backends.components import Components, Local, Whole
from dfmath.backends.double import two_sum
from dfmath.backends.moments import SECOND_ORDER, Moments, Second, Space, Want, concatenate, merge

name = "array-api"

TILE_ELEMENTS = 2**19  # 4 MiB of float64: small enough to stay in a shared cache, large enough to hide call overhead
QUERY_TILE = 64


def posterior_moments(
    queries: Array,
    components: Components,
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
    """Return the posterior moments of `queries`; see `dfmath.backends.posterior_moments`.

    Every component is summed from differences, so nothing is left out whatever `tolerance` and `precision` allow, and
    nothing is remembered.
    """
    parts = [
        _over_components(queries[rows, ...], components, _rows(alpha, rows), _rows(sigma, rows), want, space, v)
        for rows, v in _query_tiles(queries, probes)
    ]
    return parts[0] if len(parts) == 1 else concatenate(parts)


def component_tiles(components: Components, queries: int, width: int = 1) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) such that a tile's (b, k, d, width) array stays within the budget."""
    step = max(1, TILE_ELEMENTS // max(1, queries * components.dim * width))
    for start in range(0, components.count, step):
        yield start, min(start + step, components.count)


def local(x: Array, components: Whole, alpha: Array, sigma: Array) -> Local:
    """Lay queries (b, d) and noise levels (b | 1,) out against components."""
    return components.at(x[:, None, :], alpha[:, None, None], sigma[:, None, None])


def _over_components(
    x: Array,
    components: Components,
    alpha: Array,
    sigma: Array,
    want: frozenset[Want],
    space: Space,
    probes: Array | None,
) -> Moments:
    dtype = accumulation_dtype(array_namespace(x), x)
    columns = max(probes.shape[2] if probes is not None else 0, components.dim if "dense" in want else 0)
    total: Moments | None = None
    for start, stop in component_tiles(components, x.shape[0], components.width(columns)):
        here = local(x, components.tile(start, stop, dtype), alpha, sigma)
        part = tile_moments(here, want, space, probes)
        total = part if total is None else merge(total, part, want, probes)
    assert total is not None
    return total


def tile_moments(here: Local, want: frozenset[Want], space: Space, probes: Array | None) -> Moments:
    """Return the moments over the components of one tile, centred at its heaviest one and then at its mean."""
    xp = array_namespace(here.logits)
    heaviest = xp.argmax(here.logits, axis=1)[:, None]
    log_mass, low, weights = softmax(here.logits, here.logits_low, heaviest)
    nothing = xp.zeros_like(log_mass)
    exact = xp.full_like(log_mass, float(here.logits.shape[1]))
    if not want:
        return Moments(log_mass, low, None, None, Second(), Second(), nothing, nothing, nothing, exact)
    anchor, anchor_low, offsets = here.anchored(space, heaviest)
    shift = xp.matmul(weights[:, None, :], offsets)
    centred = offsets - shift
    between = _second_moment(centred, weights, want, probes)
    shift = shift + anchor_low
    within = here.within(space, weights, want, probes)
    rounding = nothing
    if "trace" in want:
        rounding = _sum_error(xp.sum(weights[:, :, None] * centred**2, axis=2), centred.shape[2])
        if not here.common:
            rounding = rounding + _sum_error(weights, centred.shape[2]) * within.trace
    return Moments(log_mass, low, anchor[:, 0, :], shift[:, 0, :], within, between, nothing, nothing, rounding, exact)


def _sum_error(terms: Array, dim: int) -> Array:
    """Bound what rounds in sums of n terms beyond (2 d + 20) u of the sum, (B,), from the terms' sizes (B, k).

    Each addition rounds u of the sum S so far, but no more than the term: those below u S/k lose u S together.
    """
    xp, unit = array_namespace(terms), 0.5 * float(array_namespace(terms).finfo(terms.dtype).eps)
    total = xp.sum(terms, axis=1)
    long = xp.sum(xp.astype(terms * terms.shape[1] > unit * total[:, None], terms.dtype), axis=1) - (dim + 20.0)
    return unit * total * xp.where(long > 0, long, xp.zeros_like(long))


def softmax(logits: Array, logits_low: Array | None, heaviest: Array) -> tuple[Array, Array, Array]:
    """Return log sum exp in two terms and normalised weights; -inf and zeros where no component carries weight.

    Logits (B, k) may be in two terms; `heaviest` (B, 1) are the places of the largest.
    """
    xp = array_namespace(logits)
    top = xp.take_along_axis(logits, heaviest, axis=1)
    empty = top == -xp.inf
    top = xp.where(empty, xp.zeros_like(top), top)
    relative, low = logits - top, xp.zeros_like(top)
    if logits_low is not None:
        low = xp.take_along_axis(logits_low, heaviest, axis=1)
        relative = relative + (logits_low - low)
    weights = xp.exp(relative)
    mass = xp.sum(weights, axis=1, keepdims=True)
    mass = xp.where(empty, xp.ones_like(mass), mass)
    high, error = two_sum(top, xp.log(mass))
    log_mass = xp.where(empty, xp.full_like(high, -xp.inf), high)
    return log_mass[:, 0], (low + error)[:, 0], weights / mass


def _second_moment(centred: Array, weights: Array, want: frozenset[Want], probes: Array | None) -> Second:
    """Return sum_k w_k c_k c_k^T for centred (b, k, d), in the wanted forms."""
    if want.isdisjoint(SECOND_ORDER):
        return Second()
    xp = array_namespace(centred)
    weighted = weights[:, :, None] * centred
    rows = xp.matrix_transpose(weighted)
    return Second(
        trace=xp.sum(weighted * centred, axis=(1, 2)) if "trace" in want else None,
        diagonal=xp.sum(weighted * centred, axis=1) if "diagonal" in want else None,
        product=_times(rows, centred, probes) if "product" in want else None,
        dense=xp.matmul(rows, centred) if "dense" in want else None,
    )


def _times(rows: Array, centred: Array, probes: Array | None) -> Array:
    """Return (rows centred) probes for (b, d, k), (b, k, d) and (b, d, p), in the cheaper order."""
    assert probes is not None
    xp, (_, count, dim), width = array_namespace(centred), centred.shape, probes.shape[2]
    if 2 * count * width <= dim * (count + width):
        return xp.matmul(rows, xp.matmul(centred, probes))
    return xp.matmul(xp.matmul(rows, centred), probes)


def _query_tiles(queries: Array, probes: Array | None) -> Iterator[tuple[slice, Array | None]]:
    for start in range(0, max(1, queries.shape[0]), QUERY_TILE):
        rows = slice(start, min(start + QUERY_TILE, queries.shape[0]))
        yield rows, None if probes is None else probes[rows, ...]


def _rows(noise: Array, rows: slice) -> Array:
    return noise if noise.shape[0] == 1 else noise[rows]
