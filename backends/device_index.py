"""What is kept about points on a device between calls: where their middle is, and how far each is from it."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

from dfmath.backends._compat import Array, accumulation_dtype, array_namespace
from dfmath.backends.diagonal import Diagonal

TILE = 2**24  # numbers that are converted at a time

_known: WeakKeyDictionary[Diagonal, DeviceIndex] = WeakKeyDictionary()


def index_of(components: Diagonal) -> DeviceIndex:
    """Return the index of these components, made at their first use and kept as long as they are."""
    if components not in _known:
        _known[components] = DeviceIndex(components)
    return _known[components]


class DeviceIndex:
    """Centre c, norms |y - c|, and the largest log-weight of components with one variance for all."""

    def __init__(self, components: Diagonal) -> None:
        points = components.centres[0, ...]
        xp = self.xp = array_namespace(points)
        self.points, self.log_weights = points, components.log_weights[0, :]
        self.dtype = accumulation_dtype(xp, points)
        count, dim = points.shape
        tiles = [(start, min(start + max(1, TILE // dim), count)) for start in range(0, count, max(1, TILE // dim))]
        middle = sum(xp.sum(xp.astype(points[a:b, :], self.dtype), axis=0) for a, b in tiles) / count
        spread = math.sqrt(sum(float(xp.sum((points[a:b, :] - middle) ** 2)) for a, b in tiles) / count)
        far = float(xp.linalg.vector_norm(middle)) > spread
        self.centre = middle if far else xp.zeros_like(middle)  # points about the origin stay as they are
        self.offset = float(xp.linalg.vector_norm(self.centre))
        norms = [xp.linalg.vector_norm(xp.astype(points[a:b, :], self.dtype) - self.centre, axis=1) for a, b in tiles]
        self.norms = xp.concat(norms, axis=0)
        self.radius = float(xp.max(self.norms))
        self.typical = math.sqrt(float(xp.sum(self.norms**2)) / count)
        self.weightless = float(xp.max(self.log_weights)) == -math.inf

    def centred(self, start: int, stop: int, dtype: Any) -> Array:
        """Return y - c for a range of points in this dtype, rounded once."""
        part = self.points[start:stop, :]
        if self.offset == 0.0:
            return self.xp.astype(part, dtype, copy=False)
        return self.xp.astype(self.xp.astype(part, self.dtype) - self.centre, dtype)
