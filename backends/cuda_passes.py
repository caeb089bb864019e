"""The fused kernels with the shapes of what they take and return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfmath.backends import cuda
from dfmath.backends._compat import Array, array_namespace

if TYPE_CHECKING:
    from dfmath.backends.device_tiles import Tile


def largest_lower_bound(tile: Tile) -> Array:
    """Return the largest lower bound of any logit, (B,)."""
    grid, (products, *columns) = _grid(tile), _contents(tile)
    tops = _new(tile.norms, grid[1], grid[0])
    limits = (tile.law.last, tile.law.least)
    cuda.launch(_name("largest_lower_bounds", products), grid, products, *columns, *limits, tops)
    return array_namespace(tops).max(tops, axis=1)


def take_candidates(tile: Tile, threshold: Array, kept: Array, listed: Array) -> Array:
    """Write what can matter into the list, in order, and return how many there are now, (B,)."""
    xp, grid, contents = array_namespace(tile.norms), _grid(tile), _contents(tile)[:-1]
    counts = xp.empty((grid[1], grid[0]), dtype=xp.int64, device=tile.norms.device)
    about = (cuda.contiguous(threshold), tile.products.shape[1], tile.law.last, tile.law.least)
    cuda.launch("count_candidates", grid, *contents, *about, counts)
    places = cuda.contiguous(kept[:, None] + xp.cumulative_sum(counts, axis=1) - counts)
    cuda.launch("list_candidates", grid, *contents, *about, counts, places, tile.start, listed.shape[1], listed)
    return kept + xp.sum(counts, axis=1)


def weights_and_sums(tile: Tile, top: Array, cut: Array) -> tuple[Array, Array, Array, Array]:
    """Return weights in the memory of the products, and their sums, sums of squares and with |v|^2, (B,)."""
    grid, (products, *columns, count) = _grid(tile), _contents(tile)
    sums = _new(tile.norms, grid[1], grid[0], cuda.SQUARES)
    levels = (cuda.contiguous(top), cuda.contiguous(cut))
    cuda.launch(_name("weights_and_sums", products), grid, products, *columns, *levels, count, sums)
    found = array_namespace(sums).sum(sums, axis=1)
    return products, *(found[:, i] for i in range(cuda.SQUARES))


def squared_distances(x: Array, alpha: Array, points: Array, listed: Array) -> tuple[Array, Array]:
    """Return |x - alpha y|^2 of listed points (B, L) in two terms; zeros where the list holds -1."""
    count, width = listed.shape
    high, low = _zeros(alpha, count, width), _zeros(alpha, count, width)
    cuda.launch(_name("squared_distances", points), (width, count), x, alpha, points, listed, x.shape[1], high, low)
    return high, low


def sums_of_offsets(points: Array, listed: Array, anchors: Array, weights: Array) -> tuple[Array, Array]:
    """Return the sums of w (y - a) and w (y - a)^2 over listed points, (B, d) each; `anchors` (B,) are places of a."""
    (count, width), dim = listed.shape, points.shape[1]
    first, second = _new(weights, count, dim), _new(weights, count, dim)
    cuda.launch(
        _name("sums_of_offsets", points),
        (-(-dim // cuda.THREADS), count),
        *(points, listed, anchors, weights, dim, width, first, second),
    )
    return first, second


def along_probes(points: Array, listed: Array, anchors: Array, probes: Array) -> Array:
    """Return (y - a) . probe for listed points and every probe of (B, d, p), (B, L, p); zeros where the list is -1."""
    (count, width), (_, dim, columns) = listed.shape, probes.shape
    found = _zeros(probes, count, width, columns)
    cuda.launch(_name("along_probes", points), (width, count), points, listed, anchors, probes, dim, columns, found)
    return found


def sums_of_products(points: Array, listed: Array, anchors: Array, factors: Array) -> Array:
    """Return the sums of factor (y - a) over listed points, (B, d, p), for factors (B, L, p)."""
    (count, width, columns), dim = factors.shape, points.shape[1]
    found = _new(factors, count, dim, columns)
    grid = (-(-dim // cuda.THREADS), count, columns)
    cuda.launch(_name("sums_of_products", points), grid, points, listed, anchors, factors, dim, width, found)
    return found


def _contents(tile: Tile) -> tuple[Any, ...]:
    """Products, laws, norms, log-weights and the number of components."""
    arrays = (tile.products, tile.law.rows, tile.norms, tile.log_weights)
    return *map(cuda.contiguous, arrays), tile.products.shape[1]


def _grid(tile: Tile) -> tuple[int, int]:
    return -(-tile.products.shape[1] // cuda.SPAN), tile.products.shape[0]


def _name(kernel: str, numbers: Array) -> str:
    """The kernel for these numbers."""
    return f"{kernel}_{'float' if numbers.dtype == array_namespace(numbers).float32 else 'double'}"


def _new(like: Array, *shape: int) -> Array:
    return array_namespace(like).empty(shape, dtype=like.dtype, device=like.device)


def _zeros(like: Array, *shape: int) -> Array:
    return array_namespace(like).zeros(shape, dtype=like.dtype, device=like.device)
