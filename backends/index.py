"""What is kept about points between calls, so that products can bound distances: norms about a centre, and a sketch.

For any matrix A of norm at most 1, N(u) = sqrt(|u|^2 - |A u|^2) is a seminorm, and so with p = x - alpha c and
v = y - c, both in units of the data,

    |x - alpha y|^2 = |A (p - alpha v)|^2 + N(p - alpha v)^2
                   >= |p|^2 + alpha^2 |v|^2 - 2 alpha (A p . A v + N(p) N(v)).

With A the identity this is an equality, and N is zero: the plain product. With A the leading principal directions
of the points it is a bound that costs a small part of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from dfmath.backends.clusters import Clusters
from dfmath.backends.diagonal import Diagonal
from dfmath.backends.matrices import coordinate_products, triangle
from dfmath.backends.numba_arithmetic import residual
from dfmath.backends.sweep import whole_tile
from numba import njit, prange

SKETCH_SHARE = 24  # a sketch has one direction for so many coordinates: its product costs that much less
SKETCH_WIDEST = 128
SKETCH_LEAST = 8  # fewer directions bound nothing
FEW_POINTS = 128  # that tell whether many matter
SAMPLE = 1024  # points that centre and principal directions are taken from
FEW, KEPT = 2048, 2**26  # products of coordinates are kept between calls for so few points, in so many bytes
COPIED = 2**20  # coordinates that are converted at a time, and kept: they stay in cache for the product that needs them
SAFE = 1e15  # sizes between its inverse and itself have squares and products well inside float32's range

_known: WeakKeyDictionary[Diagonal, Index] = WeakKeyDictionary()


def index_of(components: Diagonal) -> Index:
    """Return the index of these components, made at their first use and kept as long as they are."""
    if components not in _known:
        _known[components] = Index(components)
    return _known[components]


@dataclass(frozen=True)
class Sketch:
    """Coordinates of the points along the rows of A, and N of each."""

    directions: Any  # A, (k, d) float64, of norm at most 1
    coordinates: Any  # (N, k) float32, in units of the data's radius
    rest: Any  # (N,) N(v)


class Index:
    """Centre, norms |y - c|, and on demand a sketch of the points of components with one variance for all."""

    def __init__(self, components: Diagonal) -> None:
        self.whole = whole_tile(components)
        self.points = self.whole.points
        self._coordinate_products: dict[Any, Any] = {}
        self._copies: dict[Any, Any] = {}
        self.clusters: Clusters | None = None  # where they were asked for
        self.queries = 0  # seen so far, for those who decide whether a sketch would pay
        count, dim = self.points.shape
        sample = self._sample()
        middle = sample.mean(axis=0)
        spread = np.sqrt(((sample - middle) ** 2).sum(axis=1).mean())
        self.centre = middle if np.linalg.norm(middle) > spread else np.zeros(dim)
        self.norms = np.empty(count)
        _norms_about(self.points, self.centre, self.norms)
        self.radius = float(self.norms.max(initial=0.0))
        self.typical = float(np.linalg.norm(self.norms)) / math.sqrt(count)
        self.offset = float(np.linalg.norm(self.centre))

    @cached_property
    def weightless(self) -> bool:
        """Whether no point has any weight, as may be in a part of the data."""
        return bool(self.whole.log_weights.max() == -np.inf)

    @cached_property
    def unit(self) -> float:
        """A power of two near the radius: coordinates are divided by it where they are copied anyway."""
        return 2.0 ** math.frexp(self.radius)[1] if self.radius > 0 else 1.0

    @cached_property
    def sketch(self) -> Sketch | None:
        """Principal directions of a sample, and all points seen along them; None where that is not much smaller."""
        width = min(SKETCH_WIDEST, self.points.shape[1] // SKETCH_SHARE)
        if width < SKETCH_LEAST or self.points.shape[0] < 4 * SAMPLE or self.radius == 0.0:
            return None
        directions = _principal_directions((self._sample() - self.centre) / self.unit, width)
        coordinates = np.empty((self.points.shape[0], len(directions)), dtype=np.float32)
        rest = np.empty(self.points.shape[0])
        step = max(1, 2**21 // self.points.shape[1])
        for start in range(0, len(rest), step):
            rows = slice(start, start + step)
            along = (self.points[rows] - self.centre) @ directions.T
            coordinates[rows] = along / self.unit
            rest[rows] = np.sqrt(np.maximum(self.norms[rows] ** 2 - (along**2).sum(axis=1), 0.0))
        return Sketch(directions, coordinates, rest)

    def offsets(self, queries: Any, alpha: Any) -> Any:
        """Return p = x - alpha c, rounded once, (B, d)."""
        if self.offset == 0.0:
            return queries
        p = np.empty(queries.shape)
        _residuals(queries, np.ascontiguousarray(np.broadcast_to(alpha, len(queries))), self.centre, p)
        return p

    def unit_of(self, dtype: Any) -> float:
        """Return the unit u that coordinates have in products of this dtype."""
        fits = dtype == np.float64 or 1 / SAFE < self.radius < SAFE
        return 1.0 if self.points.dtype == dtype and self.offset == 0.0 and fits else self.unit

    def centred(self, start: int, stop: int, dtype: Any) -> Any:
        """Return (y - c)/u for a range of points in this dtype: the points themselves where they will do."""
        if not self.copies(dtype):
            return np.ascontiguousarray(self.points[start:stop])
        if self.points.size > COPIED:
            return self._copied(self.points[start:stop], dtype)
        if dtype not in self._copies:
            self._copies[dtype] = self._copied(self.points, dtype)
        return self._copies[dtype][start:stop]

    def _copied(self, points: Any, dtype: Any) -> Any:
        return _centred(points, self.centre, 1.0 / self.unit_of(dtype), np.empty(points.shape, dtype))

    def copies(self, dtype: Any) -> bool:
        """Whether `centred` makes new arrays."""
        return bool(self.points.dtype != dtype or self.offset != 0.0 or self.unit_of(dtype) != 1.0)

    def keeps_coordinate_products(self, dtype: Any) -> bool:
        """Whether the products of all points' coordinates are few enough to be kept."""
        count, dim = self.points.shape
        return count <= FEW and count * triangle(dim) * np.dtype(dtype).itemsize <= KEPT

    def coordinate_products(self, start: int, stop: int, dtype: Any) -> Any:
        """Products of two coordinates of `centred` points, each pair once, (stop - start, d (d + 1)/2)."""
        count, width = len(self.norms), triangle(self.points.shape[1])
        if not self.keeps_coordinate_products(dtype):
            return coordinate_products(self.centred(start, stop, dtype), width)
        if dtype not in self._coordinate_products:
            self._coordinate_products[dtype] = coordinate_products(self.centred(0, count, dtype), width)
        return self._coordinate_products[dtype][start:stop]

    @cached_property
    def few(self) -> tuple[Any, Any]:
        """A few points less the centre, and their log weights."""
        some = slice(None, None, max(1, self.points.shape[0] // FEW_POINTS))
        return self.points[some] - self.centre, self.whole.log_weights[some]

    def _sample(self) -> Any:
        """Some points, evenly spread over the rows, in float64."""
        step = max(1, self.points.shape[0] // SAMPLE)
        return self.points[::step][:SAMPLE].astype(np.float64)


def _principal_directions(centred: Any, width: int) -> Any:
    """Return the leading right singular vectors as rows, from the sample's Gram matrix, with norm at most 1."""
    values, vectors = np.linalg.eigh(centred @ centred.T)
    lead = values > 1e-10 * max(values[-1], 1e-300)
    basis = centred.T @ vectors[:, lead][:, ::-1][:, :width]
    directions = np.linalg.qr(basis)[0].T
    excess = np.linalg.norm(directions @ directions.T - np.eye(len(directions)))
    return np.ascontiguousarray(directions / math.sqrt(1.0 + excess + 1e-14))


@njit(cache=True, parallel=True, fastmath={"contract", "reassoc", "nsz"})
def _norms_about(points: Any, centre: Any, norms: Any) -> None:  # pragma: no cover - compiled
    for n in prange(points.shape[0]):
        square = 0.0
        for j in range(points.shape[1]):
            difference = points[n, j] - centre[j]
            square += difference * difference
        norms[n] = math.sqrt(square)


@njit(cache=True, error_model="numpy", nogil=True)
def _residuals(queries: Any, alpha: Any, centre: Any, out: Any) -> None:  # pragma: no cover - compiled
    """X - alpha c, rounded once."""
    for b in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[b, j] = residual(queries[b, j], alpha[b], centre[j])[0]


@njit(cache=True, parallel=True)
def _centred(points: Any, centre: Any, factor: float, out: Any) -> Any:  # pragma: no cover - compiled
    for n in prange(points.shape[0]):
        for j in range(points.shape[1]):
            out[n, j] = (points[n, j] - centre[j]) * factor
    return out
