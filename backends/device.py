"""The backend for arrays on accelerators, and for torch: what can be had from matrix products is taken from them.

CUDA devices multiply matrices a hundred times as fast as they do anything else, and loops over components are not to be
had from array libraries. So with one variance for all components there are three ways, and every query takes the first
that its accuracy allows:

- two dense products, in the results' precision or in float64, where an estimate says that rounding cannot show
  (`device_products`);
- where few components matter, one product in single precision with a certified bound of its rounding chooses them, and
  they are taken up again from differences (`candidates` below);
- the reference elsewhere, which is right everywhere.

The same lines run on CuPy arrays and on torch tensors of any device. On CUDA devices, where CuPy is installed, passes
over products and sums over few components are fused kernels (`cuda`). Other namespaces and covariance forms, and
tensors that autograd is recording, go to the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from dfmath.backends import array_api, cuda
from dfmath.backends._compat import Array, array_namespace, has_no_values, is_cupy_array, is_torch_array
from dfmath.backends.components import Components
from dfmath.backends.device_few import among_few
from dfmath.backends.device_index import index_of
from dfmath.backends.device_memory import room, with_room
from dfmath.backends.device_precision import tensor_cores
from dfmath.backends.device_products import by_products
from dfmath.backends.device_request import PRODUCT, Ask
from dfmath.backends.device_tiles import Law, Tile, largest_lower_bound, take_candidates
from dfmath.backends.diagonal import Diagonal
from dfmath.backends.moments import Moments, Space, Want, concatenate, field_by_field, merge
from dfmath.backends.precision import ROUND_64, gamma

name = "device"

QUERY_BLOCK = 1024  # queries that share one product
LEAST = 512  # components from which on products are worth their launches
SHARE, MOST = 0.1, 4096  # of components that may be taken up again, and their number
GATHERED = 2**24  # coordinates of candidates that are held at a time
HELD = 2**30  # products that are kept between two passes where kernels make these short


def supports(queries: Array, components: Components) -> bool:
    """Whether these are point masses or components of one variance, on a device that this is made for."""
    if not (is_cupy_array(queries) or is_torch_array(queries)) or not components.common:
        return False
    parts = cast(Diagonal, components)
    return parts.count >= LEAST and not _recorded(queries, parts.centres, parts.log_weights, parts.variances)


def _recorded(*arrays: Array) -> bool:
    """Whether autograd would have to see inside, or there are no values to look at."""
    if not is_torch_array(arrays[0]):
        return False
    from dfmath.backends.torch_device import tracks_gradients

    return tracks_gradients(*arrays) or any(has_no_values(array) for array in arrays)


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
    """Return the posterior moments of `queries`; see `dfmath.backends.posterior_moments`. Nothing is remembered."""
    if not supports(queries, components) or queries.shape[0] == 0 or _recorded(alpha, sigma):
        return array_api.posterior_moments(
            queries, components, alpha, sigma, want=want, space=space, probes=probes, tolerance=tolerance
        )
    xp, parts, count = array_namespace(queries), cast(Diagonal, components), queries.shape[0]
    alpha, sigma = (xp.broadcast_to(level, (count,)) for level in (alpha, sigma))
    ask = Ask(queries, parts, index_of(parts), alpha, sigma, want, space, probes, tolerance, precision)
    return with_room(lambda: _in_blocks(ask), queries)


def _in_blocks(ask: Ask) -> Moments:
    """Moments of a block of queries at a time."""
    rows = ask.xp.arange(ask.queries.shape[0], device=ask.queries.device)
    blocks = [_by_what_suits(ask.take(rows[a : a + QUERY_BLOCK])) for a in range(0, rows.shape[0], QUERY_BLOCK)]
    return blocks[0] if len(blocks) == 1 else concatenate(blocks)


def _by_what_suits(ask: Ask) -> Moments:
    """Take each query's moments from products, from candidates, or from the reference."""
    xp = ask.xp
    if ask.index.weightless:
        return _by_reference(ask)
    found, right = by_products(ask)
    rest = xp.nonzero(~right)[0]
    if found is None or rest.shape[0] == right.shape[0]:
        return _otherwise(ask)
    return found if rest.shape[0] == 0 else _placed(found, _otherwise(ask.take(rest)), rest)


def _placed(found: Moments, others: Moments, rows: Array) -> Moments:
    """Put the others in their rows."""

    def put(values: list[Array]) -> Array:
        whole, part = values
        whole = array_namespace(whole).asarray(whole, copy=True)
        whole[rows] = part
        return whole

    return field_by_field([found, others], put)


def _otherwise(ask: Ask) -> Moments:
    """Choose candidates by a product; where they are too many, sum all from differences."""
    xp = ask.xp
    listed, few, omitted = candidates(ask)
    if not bool(xp.any(few)):
        return _by_reference(ask)
    rows, rest = xp.nonzero(few)[0], xp.nonzero(~few)[0]
    width = max(1, int(xp.max(xp.sum(xp.astype(listed[rows] >= 0, xp.int64), axis=1))))
    found = _among_few(ask.take(rows), listed[rows][:, :width])
    found = replace(found, omitted=omitted[rows])
    if rest.shape[0] == 0:
        return found
    whole = field_by_field([found], lambda values: _empty(values[0], few.shape[0]))
    return _placed(_placed(whole, found, rows), _by_reference(ask.take(rest)), rest)


def _empty(part: Array, count: int) -> Array:
    return array_namespace(part).empty((count, *part.shape[1:]), dtype=part.dtype, device=part.device)


def _by_reference(ask: Ask) -> Moments:
    return array_api.posterior_moments(
        ask.queries, ask.components, ask.alpha, ask.sigma, want=ask.want, space=ask.space, probes=ask.probes
    )


# Candidates: the components that can matter, by a bound


def candidates(ask: Ask) -> tuple[Array, Array, Array]:
    """Return the components that can matter (B, L), -1 beyond them; for which queries they are few; what is left out.

    With p = x - alpha c and v = y - c, a logit is (alpha/S) p . v - alpha^2 |v|^2/(2 S) + log pi up to what all share.
    A product in float32 has it within (alpha/S) gamma |p| |v|, whatever the order of its sum (Higham 2002, section
    3.1), and on tensor cores that round the factors first within as much as that makes; so a component whose upper
    bound is below the largest lower bound by more than the cut can be left out.
    """
    xp, count = ask.xp, ask.components.count
    most = max(1, min(MOST, int(SHARE * count)))
    listed = xp.full((ask.queries.shape[0], most), -1, dtype=xp.int64, device=ask.queries.device)
    kept = xp.zeros(ask.alpha.shape, dtype=xp.int64, device=ask.queries.device)
    held = list(_tiles(ask)) if ask.queries.shape[0] * count <= room(_held(ask)) else None
    tops = [largest_lower_bound(tile) for tile in held or _tiles(ask)]
    threshold = xp.max(xp.stack(tops, axis=0), axis=0) - ask.cut
    for tile in held or _tiles(ask):
        kept = take_candidates(tile, threshold, kept, listed)
    left = xp.astype(count - kept, ask.index.dtype)
    omitted = left * xp.exp(-xp.where(xp.isfinite(ask.cut), ask.cut, xp.full_like(ask.cut, 1e3)))
    return listed, kept <= most, omitted


def _held(ask: Ask) -> int:
    """How many products may be kept between the two passes over them."""
    return HELD if cuda.usable(ask.queries) else PRODUCT


def _tiles(ask: Ask) -> Iterator[Tile]:
    """Products of queries with a range of components in float32, and how far logits from them may be off."""
    xp, index = ask.xp, ask.index
    step = max(1, room(PRODUCT) // ask.queries.shape[0])
    unit = xp.where(ask.length > 0, ask.length, xp.ones_like(ask.length))  # so that float32 holds the factors
    size = max(index.radius, 1e-300)
    rows = xp.astype(ask.p / unit[:, None], xp.float32)
    for start in range(0, ask.components.count, step):
        stop = min(start + step, ask.components.count)
        points = xp.astype(index.centred(start, stop, index.dtype) / size, xp.float32)
        with tensor_cores(rows) as rounding:
            products = xp.matmul(rows, points.T)
        law = _law(ask, unit, size, rounding)
        yield Tile(start, products, index.norms[start:stop], index.log_weights[start:stop], law)


def _law(ask: Ask, unit: Array, size: float, rounding: float) -> Law:
    """Factors are rounded once each before the product, and the last sums are in float64."""
    dim, steep = ask.components.dim, ask.alpha / ask.spread * unit
    single, last = gamma(dim + 8, 2.0**-24), gamma(dim + 32, ROUND_64)
    product = (1.0 + rounding) ** 2 * (1.0 + single) - 1.0
    curvature = 0.5 * ask.alpha**2 / ask.spread
    return Law(steep * size, curvature, product * steep, ask.length / ask.alpha, last, 1e-35 * size)


# Few components, from differences


def _among_few(ask: Ask, listed: Array) -> Moments:
    """Moments over listed components (B, L): by fused kernels, or by the reference on points gathered for each query.

    Matrices (d, d) are sums of matrix products either way, which kernels do no better.
    """
    return among_few(ask, listed) if cuda.usable(ask.queries) and "dense" not in ask.want else _gathered(ask, listed)


def _gathered(ask: Ask, listed: Array) -> Moments:
    """Moments over listed components (B, L) from differences: the reference, on points gathered for each query."""
    dim, width = ask.components.dim, listed.shape[1]
    columns = max(1, ask.components.width(ask.probes.shape[2] if ask.probes is not None else 0))
    step = max(1, room(GATHERED) // (dim * columns * width))
    rows = ask.xp.arange(listed.shape[0], device=listed.device)
    parts = []
    for start in range(0, listed.shape[0], step):
        some = rows[start : start + step]
        parts.append(_among(ask.take(some), listed[some]))
    return parts[0] if len(parts) == 1 else concatenate(parts)


def _among(ask: Ask, listed: Array) -> Moments:
    """Moments of a few queries over their own components, some of them at a time."""
    total: Moments | None = None
    step = max(1, room(GATHERED) // (ask.components.dim * listed.shape[0]))
    for start in range(0, listed.shape[1], step):
        here = _layout(ask, listed[:, start : start + step])
        part = array_api.tile_moments(
            here.at(ask.queries[:, None, :], ask.alpha[:, None, None], ask.sigma[:, None, None]),
            ask.want,
            ask.space,
            ask.probes,
        )
        total = part if total is None else merge(total, part, ask.want, ask.probes)
    assert total is not None
    return total


def _layout(ask: Ask, listed: Array) -> Diagonal:
    """Listed components of each query as (b, k, d); the weight of what is no component is zero."""
    xp, index = ask.xp, ask.index
    places = xp.where(listed >= 0, listed, xp.zeros_like(listed))
    logs = index.log_weights[places]
    centres = xp.astype(index.points[places], index.dtype)
    variances = xp.astype(ask.components.variances, index.dtype)
    return Diagonal(centres, xp.where(listed >= 0, logs, xp.full_like(logs, -math.inf)), variances)
