"""What components of every form share: slices of them, vectors as departures from their means, and small algebra."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Self

from dfmath.backends import double
from dfmath.backends._compat import Array, array_namespace, to_numpy
from dfmath.backends.components import Form
from dfmath.backends.moments import Space


class Tiled:
    """Slicing and gathering, the same for every form: axis 1 of each field is the component."""

    form: ClassVar[Form]
    centres: Array
    log_weights: Array

    @property
    def common(self) -> bool:
        return False

    @property
    def count(self) -> int:
        return int(self.centres.shape[1])

    @property
    def dim(self) -> int:
        return int(self.centres.shape[2])

    @property
    def rank(self) -> int:
        return 0

    def width(self, columns: int) -> int:
        return max(1, columns)

    def each(self, work: Callable[..., Any], *shared: Any) -> list[Any]:
        return [work(self, *shared)]

    def tile(self, start: int, stop: int, dtype: Any) -> Self:
        return self._map(lambda a: a[:, start:stop, ...] if a.shape[1] > 1 else a, dtype)

    def pairs(self, index: Array, dtype: Any) -> Self:
        xp = array_namespace(self.centres)

        def gather(a: Array) -> Array:
            return xp.take(a[0, ...], index, axis=0)[:, None, ...] if a.shape[1] > 1 or self.count == 1 else a

        return self._map(gather, dtype)

    def _map(self, change: Any, dtype: Any) -> Self:
        xp = array_namespace(self.centres)
        changed = {name: xp.astype(change(a), dtype, copy=False) for name, a in vars(self).items()}
        return replace(self, **changed)  # type: ignore[type-var]


class Departing(ABC):
    """Vectors u_k as mu_k plus a departure in posterior space, and as the departure alone in score space."""

    c: Any

    @property
    def common(self) -> bool:
        return bool(self.c.common)

    @abstractmethod
    def _departures(self, space: Space) -> Array:
        """Return u_k less mu_k in posterior space, u_k in score space; (b, k, d)."""

    def vectors(self, space: Space) -> Array:
        departures = self._departures(space)
        return departures if space == "score" else self.c.centres + departures

    def anchored(self, space: Space, index: Array) -> tuple[Array, Array, Array]:
        """Centres are subtracted from centres: far from the origin, their sums with departures lose digits."""
        departures = self._departures(space)
        anchor = picked(departures, index)
        offsets = departures - anchor
        if space == "score":
            return anchor, array_namespace(anchor).zeros_like(anchor), offsets
        centre = picked(array_namespace(index).broadcast_to(self.c.centres, departures.shape), index)
        return *double.two_sum(centre, anchor), (self.c.centres - centre) + offsets


def picked(vectors: Array, index: Array) -> Array:
    """Return one vector for each query: vectors (b, k, d), index (b, 1)."""
    xp = array_namespace(index)
    where = xp.broadcast_to(index[:, :, None], (vectors.shape[0], 1, vectors.shape[2]))
    return xp.take_along_axis(vectors, where, axis=1)


def residual_of(x: Array, alpha: Array, centres: Array) -> Array:
    """Return x - alpha mu as if alpha mu were exact: near a component, its rounding would be most of the residual."""
    product, product_low = double.two_product(alpha, centres)
    return (x - product) - product_low


def apply(matrices: Array, vectors: Array) -> Array:
    """Return M v for matrices (b | 1, k, i, j) and vectors (b | 1, k, j)."""
    xp = array_namespace(matrices)
    return apply_transposed(xp.matrix_transpose(matrices), vectors)


def apply_transposed(matrices: Array, vectors: Array) -> Array:
    """Return M^T v for matrices (b | 1, k, i, j) and vectors (b | 1, k, i)."""
    xp = array_namespace(matrices)
    if matrices.shape[0] == 1:  # one matrix product per component instead of one matrix-vector product per pair
        rows = xp.permute_dims(vectors, (1, 0, 2))
        return xp.permute_dims(xp.matmul(rows, matrices[0, ...]), (1, 0, 2))
    return xp.matmul(vectors[:, :, None, :], matrices)[:, :, 0, :]


def sandwich(basis: Array, weighted: Array, probes: Array | None) -> Array:
    """sum_k U_k diag(g_k) U_k^T V: basis (b | 1, k, d, r), weighted (b, k, r), probes (b, d, p)."""
    xp = array_namespace(basis)
    inner = xp.matmul(xp.matrix_transpose(basis), probes[:, None, :, :])  # type: ignore[index]
    return xp.sum(xp.matmul(basis, weighted[..., None] * inner), axis=1)


def spectral_sum(basis: Array, weighted: Array) -> Array:
    """sum_k U_k diag(g_k) U_k^T, (b, d, d), as one matrix product per query."""
    xp = array_namespace(basis)
    b, k, r = weighted.shape
    d = basis.shape[2]
    columns = xp.reshape(xp.permute_dims(basis, (0, 2, 1, 3)), (basis.shape[0], d, k * r))
    return xp.matmul(columns * xp.reshape(weighted, (b, 1, k * r)), xp.matrix_transpose(columns))


def diagonal_matrix(diagonal: Array) -> Array:
    """Return diag(v) for v (b, d), (b, d, d)."""
    xp = array_namespace(diagonal)
    eye = xp.eye(diagonal.shape[1], dtype=diagonal.dtype, device=diagonal.device)
    return diagonal[:, :, None] * eye[None, :, :]


def range_of(values: Array) -> tuple[float, float]:
    """Return the smallest and the largest value."""
    xp = array_namespace(values)
    return float(to_numpy(xp.min(values))), float(to_numpy(xp.max(values)))
