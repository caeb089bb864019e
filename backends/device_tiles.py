"""Passes over a tile of products of queries with components: largest bound, candidates, weights.

On CUDA devices each is one fused kernel that reads the products once; elsewhere the same in array-API lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dfmath.backends import cuda, cuda_passes
from dfmath.backends._compat import Array, array_namespace


@dataclass(frozen=True)
class Law:
    """What makes logits of products, and how far they may be off.

    A logit is scale p.v - curvature |v|^2 + log w, and it is within slack (|v| + least) + last curvature (|v| + far)^2
    of what exact arithmetic would give; scale, curvature, slack and far are (B,).
    """

    scale: Array
    curvature: Array
    slack: Array
    far: Array
    last: float = 0.0
    least: float = 0.0

    @cached_property
    def rows(self) -> Array:
        """The four numbers of each query side by side, (B, 4)."""
        xp = array_namespace(self.scale)
        return xp.stack([self.scale, self.curvature, self.slack, self.far], axis=1)


@dataclass(frozen=True)
class Tile:
    """Products p.v (B, k) of queries with a range of components that begins at `start`; |v| and log w are (k,)."""

    start: int
    products: Array
    norms: Array
    log_weights: Array
    law: Law

    @cached_property
    def logits(self) -> Array:
        """Logits up to what all components share, (B, k)."""
        found = array_namespace(self.norms).astype(self.products, self.norms.dtype) * self.law.scale[:, None]
        return found - self.law.curvature[:, None] * self.norms**2 + self.log_weights

    def errors(self) -> Array:
        """Bounds of their errors, (B, k)."""
        reach = self.norms + self.law.far[:, None]
        last = self.law.last * self.law.curvature[:, None] * reach**2
        return self.law.slack[:, None] * (self.norms + self.law.least) + last


def largest_lower_bound(tile: Tile) -> Array:
    """Return the largest lower bound of any logit, (B,)."""
    if cuda.usable(tile.products):
        return cuda_passes.largest_lower_bound(tile)
    return array_namespace(tile.norms).max(tile.logits - tile.errors(), axis=1)


def largest_logit(tile: Tile) -> Array:
    """Return the largest logit, (B,), of a tile whose law knows no errors."""
    if cuda.usable(tile.products):
        return cuda_passes.largest_lower_bound(tile)
    return array_namespace(tile.norms).max(tile.logits, axis=1)


def take_candidates(tile: Tile, threshold: Array, kept: Array, listed: Array) -> Array:
    """Write components whose upper bound is not below the threshold behind the `kept` (B,) ones of the list (B, L).

    Returns how many there are now; what has no room in the list is counted alone.
    """
    if cuda.usable(tile.products):
        return cuda_passes.take_candidates(tile, threshold, kept, listed)
    xp = array_namespace(tile.norms)
    inside = tile.logits + tile.errors() >= threshold[:, None]
    places = kept[:, None] + xp.cumulative_sum(xp.astype(inside, xp.int64), axis=1) - 1
    rows, columns = xp.nonzero(inside & (places < listed.shape[1]))
    listed[rows, places[rows, columns]] = columns + tile.start
    return kept + xp.sum(xp.astype(inside, xp.int64), axis=1)


def weights_and_sums(tile: Tile, top: Array, cut: Array) -> tuple[Array, Array, Array, Array]:
    """Return weights exp(logit - top) (B, k), 0 below the cut, and their sums, sums of squares and with |v|^2, (B,).

    Weights are in the dtype of the products, whose memory they may take; sums are taken before they are rounded to it.
    """
    if cuda.usable(tile.products):
        return cuda_passes.weights_and_sums(tile, top, cut)
    xp = array_namespace(tile.norms)
    below = tile.logits - top[:, None]
    weights = xp.where(below >= -cut[:, None], xp.exp(below), xp.zeros_like(below))
    sums = (xp.sum(weights, axis=1), xp.sum(weights**2, axis=1), xp.matmul(weights, tile.norms**2))
    return xp.astype(weights, tile.products.dtype), *sums
