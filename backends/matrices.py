"""Sums of w v v^T as matrices, and what they do to many vectors at a time.

Three orders of one product, V^T W V A for r vectors v of weight w in d dimensions and a matrix A of p columns, cost

    V^T (W V A)          2 r d p            few vectors: F is the identity less a matrix of low rank
    (V^T W V) A          r d^2 + d^2 p      more
    (sum w v v^T) A      N d^2/2 + d^2 p    all N, as one product of weights with coordinates' products for all queries

multiplications and additions, and in all of them BLAS does the work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange


def triangle(dim: int) -> int:
    """How many products v_i v_j, i >= j, a vector has."""
    return dim * (dim + 1) // 2


@njit(cache=True, parallel=True, nogil=True)
def coordinate_products(points: Any, width: int) -> Any:  # pragma: no cover - compiled
    """Products v_i v_j, i >= j, of each point: (N, width)."""
    out = np.empty((points.shape[0], width), points.dtype)
    for n in prange(points.shape[0]):
        at = 0
        for i in range(points.shape[1]):
            for j in range(i + 1):
                out[n, at] = points[n, i] * points[n, j]
                at += 1
    return out


@njit(cache=True, parallel=True, nogil=True)
def unpacked(pairs: Any, scale: Any, less: Any, vectors: Any) -> Any:  # pragma: no cover - compiled
    """Symmetric matrices scale pairs - less u u^T from their lower triangles, (B, d, d)."""
    dim = vectors.shape[1]
    out = np.empty((pairs.shape[0], dim, dim))
    for b in prange(pairs.shape[0]):
        at = 0
        for i in range(dim):
            for j in range(i + 1):
                out[b, i, j] = scale[b] * pairs[b, at] - less[b] * vectors[b, i] * vectors[b, j]
                out[b, j, i] = out[b, i, j]
                at += 1
    return out


@njit(cache=True, parallel=True, nogil=True)
def centred_products(
    span: Any, scale: Any, less: Any, vectors: Any, columns: Any
) -> Any:  # pragma: no cover - compiled
    """(scale V^T W V - less u u^T) A, from V^T W V A."""
    out = np.empty(span.shape)
    for b in prange(span.shape[0]):
        along = np.dot(vectors[b], columns[b])
        for i in range(span.shape[1]):
            for k in range(span.shape[2]):
                out[b, i, k] = scale[b] * span[b, i, k] - less[b] * vectors[b, i] * along[k]
    return out


@njit(cache=True, parallel=True, nogil=True)
def add_times(matrices: Any, columns: Any, places: Any, total: Any) -> None:  # pragma: no cover - compiled
    """Add each matrix times the columns of its query, (d, d) times (d, p), to the query's total."""
    for i in prange(places.shape[0]):
        b = places[i]
        total[b] += np.dot(matrices[i], columns[b])


@njit(cache=True, parallel=True, error_model="numpy", nogil=True)
def add_span(
    weights: Any, points: Any, places: Any, columns: Any, vector: Any, total: Any
) -> None:  # pragma: no cover - compiled
    """Add sum w v and sum w v v^T A over the weights of some queries that are not zero, gathered first.

    Weights are (chunk, query, point of the chunk), see `threaded`; `columns` is A, (B, d, p).
    """
    width = weights.shape[2]
    for i in prange(places.shape[0]):
        b, held = places[i], 0
        for c in range(weights.shape[0]):
            for n in range(min(width, points.shape[0] - c * width)):
                held += weights[c, b, n] > 0.0
        if held == 0:
            continue
        near, weighed = np.empty((held, points.shape[1]), points.dtype), np.empty((held, points.shape[1]), points.dtype)
        held = 0
        for c in range(weights.shape[0]):
            for n in range(min(width, points.shape[0] - c * width)):
                w = weights[c, b, n]
                if w > 0.0:
                    for j in range(points.shape[1]):
                        near[held, j] = points[c * width + n, j]
                        weighed[held, j] = w * near[held, j]
                        vector[b, j] += weighed[held, j]
                    held += 1
        if held < points.shape[1]:
            total[b] += np.dot(weighed.T, np.dot(near, columns[b]))
        else:
            total[b] += np.dot(np.dot(weighed.T, near), columns[b])
