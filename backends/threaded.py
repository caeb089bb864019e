"""Matrix products in the threads of compiled loops, each by single-threaded BLAS.

BLAS keeps threads of its own, which go on waiting busily for some milliseconds after a product; a parallel loop that
follows then shares the cores with them and takes many times as long. So BLAS is held to one thread here, and the
product is split over the points: the layout (chunk, query, point of the chunk) keeps every part contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import numba
import numpy as np
import scipy.linalg  # noqa: F401 - brings the BLAS that compiled loops call, which must be there to be held
from numba import njit, prange
from threadpoolctl import ThreadpoolController

MOST_CHUNKS = 16


@cache
def _blas() -> tuple[Any, ...]:
    """The BLAS libraries of this process; finding them takes longer than most calls."""
    return tuple(ThreadpoolController().select(user_api="blas").lib_controllers)


class _Held:
    """BLAS at one thread: a setting of the whole process, which callers in several Python threads share.

    The first to enter notes what each library had, the last to leave gives it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._before: list[tuple[Any, int]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before = [(blas, held) for blas in _blas() if (held := blas.get_num_threads()) not in (None, 1)]
                for blas, _ in self._before:
                    blas.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for blas, held in self._before:
                    blas.set_num_threads(held)


_one_thread_in_blas = _Held()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Use this many threads in compiled loops, of those the caller allows, and one in BLAS."""
    before = numba.get_num_threads()  # of this Python thread alone
    try:
        numba.set_num_threads(number)
        with _one_thread_in_blas:
            yield
    finally:
        numba.set_num_threads(before)


def chunked(queries: int, points: int, dtype: Any) -> Any:
    """Return an empty array (chunk, query, point of the chunk); its shape does not depend on the threads in use."""
    chunks = min(points, numba.config.NUMBA_NUM_THREADS, MOST_CHUNKS)
    return np.empty((chunks, queries, -(-points // chunks)), dtype=dtype)


@njit(cache=True, parallel=True, nogil=True)
def all_pairs(x: Any, points: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Fill in x . y for all pairs of rows; what lies beyond the last point stays as it is."""
    width = out.shape[2]
    for c in prange(out.shape[0]):
        part = points[c * width : (c + 1) * width]
        if part.shape[0] == width:
            np.dot(x, part.T, out[c])
        elif part.shape[0] > 0:
            out[c, :, : part.shape[0]] = np.dot(x, part.T)


@njit(cache=True, parallel=True, nogil=True)
def weighted_sums(weights: Any, points: Any, total: Any) -> None:  # pragma: no cover - compiled
    """Add sum_n w_bn y_n to `total` (query, coordinate); weights beyond the last point are not read."""
    width = weights.shape[2]
    parts = np.empty((weights.shape[0], *total.shape), dtype=weights.dtype)
    for c in prange(weights.shape[0]):
        part = points[c * width : (c + 1) * width]
        if part.shape[0] == width:
            np.dot(weights[c], part, parts[c])
        elif part.shape[0] > 0:
            parts[c] = np.dot(np.ascontiguousarray(weights[c, :, : part.shape[0]]), part)
        else:
            parts[c] = 0.0
    for b in prange(total.shape[0]):
        for c in range(parts.shape[0]):
            for j in range(total.shape[1]):
                total[b, j] += parts[c, b, j]
