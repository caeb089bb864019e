"""Priors whose data are not here as one array: Dask arrays, and files that memory does not hold.

Each part is checked where it is, by the same doors as an array; errors count rows from the beginning of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from dfmath import _checks
from dfmath.backends._compat import Array, accumulation_dtype, array_namespace, beside, from_numpy, to_numpy
from dfmath.backends.components import Components
from dfmath.backends.diagonal import Diagonal
from dfmath.backends.host_copies import sent
from dfmath.backends.out_of_core import StreamedParts
from dfmath.backends.parts import Outline, Parts
from dfmath.parameters import (
    LowRank,
    heaviest,
    log_weights_of,
    mixture_components,
    normalised,
    point_components,
    uniform,
)
from dfmath.row_files import RowFile

PART_BYTES = 2**26  # of a file that are read at a time: long enough to be read at the disk's rate


def streamed_parts(
    rows: RowFile, weights: Any | None, log_weights: Any | None, like: Array | None = None
) -> StreamedParts:
    """Points in a file as components that are read when they are needed; weights are here as a whole.

    Parts are in the namespace and on the device of `like`, NumPy's if not given.
    """
    home = np.empty((0, rows.shape[1]), rows.dtype)
    home = home if like is None else beside(home, like)
    sums = accumulation_dtype(array_namespace(home), home)
    stand_in = np.broadcast_to(np.zeros((), rows.dtype), (len(rows), 1))
    logs = None if weights is None and log_weights is None else normalised(stand_in, weights, log_weights)
    step = max(1, PART_BYTES // (rows.shape[1] * rows.dtype.itemsize))
    starts = range(0, len(rows), step)
    counts = tuple(min(start + step, len(rows)) - start for start in starts)

    def load(i: int) -> Diagonal:
        here = slice(starts[i], starts[i] + counts[i])
        points = rows[here]
        with _checks.on_behalf_of(f"file {str(rows.path)!r}"), _checks.rows_from(here.start):
            _checks.points("points", points)
        points = sent(points, home)
        return point_components(
            points, uniform(points, len(rows)) if logs is None else from_numpy(logs[here], home, sums)
        )

    return StreamedParts(Outline(counts, home), load)


def point_parts(points: Any, weights: Any | None, log_weights: Any | None) -> Parts:
    """Point masses from a Dask array (N, d), chunked along its rows."""
    _check_chunks("points", points, "(N, d)", 2)
    arrays = {"points": points, "weights": weights, "log_weights": log_weights}
    return _parts(_point_chunk, "points", arrays)


def mixture_parts(means: Any, covariances: Any, weights: Any | None, log_weights: Any | None) -> Parts:
    """Gaussian mixtures from Dask arrays, chunked along their components."""
    _check_chunks("means", means, "(K, d)", 2)
    arrays = {"means": means, "weights": weights, "log_weights": log_weights}
    if isinstance(covariances, LowRank):
        arrays |= {"diagonal": covariances.diagonal, "factors": covariances.factors}
    elif getattr(covariances, "ndim", 0) == 0:
        return _parts(
            partial(_mixture_chunk, covariances=_checks.real_number("covariances", covariances)), "means", arrays
        )
    else:
        arrays["covariances"] = covariances
    return _parts(_mixture_chunk, "means", arrays)


def _point_chunk(points: Array, weights: Array | None = None, log_weights: Array | None = None) -> Diagonal:
    _checks.points("points", points)
    return point_components(points, _logs(points, weights, log_weights))


def _mixture_chunk(
    means: Array,
    weights: Array | None = None,
    log_weights: Array | None = None,
    covariances: Any = None,
    diagonal: Array | None = None,
    factors: Array | None = None,
) -> Components:
    _checks.points("means", means, "(K, d)")
    given = covariances if diagonal is None else LowRank(diagonal, factors)
    return mixture_components(means, _logs(means, weights, log_weights), given)


def _logs(points: Array, weights: Array | None, log_weights: Array | None) -> Array:
    """Log-weights that are yet to be normalised: the sum is over all chunks."""
    return (
        uniform(points, 1) if weights is None and log_weights is None else log_weights_of(points, weights, log_weights)
    )


def _parts(build: Callable[..., Components], first: str, arrays: dict[str, Any]) -> Parts:
    """Have a part made of each chunk, beside it, and all weights normalised."""
    from dask.delayed import delayed

    from dfmath.backends.dask_cluster import Cluster, ClusterParts

    lead, make, cluster = arrays[first], delayed(_made, pure=False), Cluster()
    columns = {name: _chunks(name, value, first, lead) for name, value in arrays.items() if value is not None}
    starts = np.cumsum((0, *lead.chunks[0]))
    filled = [i for i, count in enumerate(lead.chunks[0]) if count]
    counts = tuple(lead.chunks[0][i] for i in filled)
    each = ((i, int(starts[i]), {name: chunks[i] for name, chunks in columns.items()}) for i in filled)
    made = cluster.persisted([make(build, *chunk) for chunk in each])
    seen = cluster.computed([delayed(_seen, pure=False)(part) for part in made])
    tops = np.array([top for top, *_ in seen])
    heaviest("weights" if arrays.get("log_weights") is None else "log_weights", tops)
    total = tops.max() + math.log(math.fsum(mass * math.exp(top - tops.max()) for top, mass, *_ in seen))
    parts = cluster.persisted([delayed(_weighted, pure=False)(part, total) for part in made])
    return ClusterParts(_outline(counts, seen), parts, cluster)


def _made(build: Callable[..., Components], number: int, start: int, arrays: dict[str, Array]) -> Components:
    with _checks.on_behalf_of(f"chunk {number}"), _checks.rows_from(start):
        return build(**arrays)


def _seen(part: Any) -> tuple[Any, ...]:
    """Largest log-weight, sum of the weights beside it, form, variances, and an array that is like the part's."""
    xp, top = (
        array_namespace(part.log_weights),
        float(to_numpy(array_namespace(part.log_weights).max(part.log_weights))),
    )
    mass = 0.0 if top == -math.inf else float(to_numpy(xp.sum(xp.exp(part.log_weights - top))))
    return top, mass, part.form, part.common, part.rank, part.variance_range(), part.centres[0, :0, :]


def _weighted(part: Any, total: float) -> Any:
    return replace(part, log_weights=part.log_weights - total)


def _outline(counts: tuple[int, ...], seen: list[tuple[Any, ...]]) -> Outline:
    _, _, forms, common, ranks, ranges, homes = zip(*seen, strict=True)
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    # One variance for each component may be one for all of a part.
    one = all(common) and (low == high or len(counts) == 1)
    return Outline(tuple(int(n) for n in counts), homes[0], forms[0], one, ranks[0], (low, high))


def _check_chunks(name: str, array: Any, shape: str, ndim: int) -> None:
    """Raise unless a Dask array is chunked along its first axis alone, in known sizes."""
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must have dtype float32 or float64, got {_checks.describe(array)}")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have shape {shape}, got {_checks.describe(array)}")
    if any(math.isnan(size) for size in array.shape):
        raise ValueError(
            f"{name} must have known chunk sizes, got unknown ones; {name}.compute_chunk_sizes() finds them"
        )
    if 0 in array.shape:
        raise ValueError(
            f"{name} must hold at least one point of at least one dimension, got {_checks.describe(array)}"
        )
    if any(len(sizes) > 1 for sizes in array.chunks[1:]):
        split = next(axis for axis, sizes in enumerate(array.chunks) if axis and len(sizes) > 1)
        raise ValueError(
            f"{name} must be in one chunk along axis {split}, got {len(array.chunks[split])}; "
            f"{name}.rechunk({{{split}: -1}}) makes it one"
        )


def _chunks(name: str, value: Any, first: str, lead: Any) -> list[Any]:
    """The chunks of an array beside those of the points or means, as tasks."""
    import dask.array

    if not isinstance(value, dask.array.Array):
        _checks.namespace(name, value)
        _check_length(name, value, first, lead)
        value = dask.array.from_array(value, chunks=(lead.chunks[0], *(-1,) * (value.ndim - 1)))
    _check_chunks(name, value, "(K, ...)", value.ndim)
    _check_length(name, value, first, lead)
    if value.chunks[0] != lead.chunks[0]:
        value = value.rechunk({0: lead.chunks[0]})
    return list(value.to_delayed().ravel())


def _check_length(name: str, value: Any, first: str, lead: Any) -> None:
    if value.ndim == 0 or value.shape[0] != lead.shape[0]:
        raise ValueError(
            f"{name} must have {lead.shape[0]} rows, one for each row of {first}, got {_checks.describe(value)}"
        )
