"""Components that are held in parts: in a file that memory does not hold, or on the machines of a cluster.

What is asked of all components is asked of each part, and the answers are joined. So nothing but this needs to know
where the parts are: a subclass says how `work(part, ...)` is run beside a part, and how results are joined on the way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from dfmath.backends._compat import Array, array_namespace, from_numpy, index_dtype, to_numpy
from dfmath.backends.components import Form, Whole

Work = Callable[..., Any]


@dataclass(frozen=True)
class Outline:
    """What is known of components without looking at them."""

    counts: tuple[int, ...]  # how many components each part has
    home: Array  # (0, d), for the namespace, the dtype and the device of the parts' centres
    form: Form = "diagonal"
    common: bool = True
    rank: int = 0
    variance_range: tuple[float, float] = (0.0, 0.0)


class Parts(ABC):
    """Components in parts: each part is components of one form, and their order is that of the parts."""

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self.starts = np.concatenate([[0], np.cumsum(outline.counts)])  # of each part, and the end of the last

    @abstractmethod
    def run(self, work: Work, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Return ``work(part, *arguments[i])`` of the parts i that are named."""

    @abstractmethod
    def reduce(self, work: Work, join: Work, *shared: Any) -> Any:
        """Join ``work(part, *shared)`` of all parts by the associative ``join(a, b, *shared)``, neighbours first."""

    def each(self, work: Work, *shared: Any) -> list[Any]:
        """Return ``work(part, *shared)`` of every part."""
        found = self.run(work, dict.fromkeys(range(len(self.outline.counts)), shared))
        return [found[i] for i in range(len(self.outline.counts))]

    @property
    def form(self) -> Form:
        """The covariance form of all parts."""
        return self.outline.form

    @property
    def common(self) -> bool:
        """Whether one multiple of the identity is the covariance of all components."""
        return self.outline.common

    @property
    def count(self) -> int:
        """Number of components in all parts."""
        return int(self.starts[-1])

    @property
    def dim(self) -> int:
        """Dimension d."""
        return int(self.outline.home.shape[1])

    @property
    def rank(self) -> int:
        """How many extra normals a draw needs."""
        return self.outline.rank

    @property
    def log_weights(self) -> Array:
        """Log weights of all components, (1, K)."""
        return array_namespace(self.outline.home).concat(self.each(_log_weights), axis=1)

    @property
    def centres(self) -> Array:
        """Centres of all components, (1, K, d), gathered here."""
        return array_namespace(self.outline.home).concat(self.each(_centres), axis=1)

    def width(self, columns: int) -> int:
        """How many times (b, k, d) numbers a second moment needs at a time; see `Components`."""
        return max(1, columns)

    def variance_range(self) -> tuple[float, float]:
        """Bounds on the smallest and largest eigenvalue over all C_k."""
        return self.outline.variance_range

    def tile(self, start: int, stop: int, dtype: Any) -> Whole:
        """Components start..stop, gathered here."""
        first, last = (int(np.searchsorted(self.starts, place, side="right")) - 1 for place in (start, stop - 1))
        spans = {i: self._within(i, start, stop) for i in range(first, last + 1)}
        found = self.run(_tile, {i: (*span, dtype) for i, span in spans.items()})
        return joined([found[i] for i in spans], [stop - start for start, stop in spans.values()], axis=1)

    def pairs(self, index: Array, dtype: Any) -> Whole:
        """One chosen component for each of m queries, gathered here and laid out as (m, 1, ...)."""
        chosen = to_numpy(index)
        owners = np.searchsorted(self.starts, chosen, side="right") - 1
        order = np.argsort(owners, kind="stable")
        wanted = {int(i): chosen[owners == i] - self.starts[i] for i in np.unique(owners)}
        found = self.run(_pairs, {i: (places, dtype) for i, places in wanted.items()})
        together = joined([found[i] for i in wanted], [len(places) for places in wanted.values()], axis=0)
        return _reordered(together, from_numpy(np.argsort(order), index))

    def _within(self, i: int, start: int, stop: int) -> tuple[int, int]:
        return max(0, start - int(self.starts[i])), min(stop, int(self.starts[i + 1])) - int(self.starts[i])


def joined(pieces: list[Any], counts: list[int], axis: int) -> Any:
    """Join components of one form, so many of each piece, along an axis."""
    xp = array_namespace(pieces[0].centres)

    def join(name: str) -> Array:
        values = [getattr(piece, name) for piece in pieces]
        if name == "variances" and _the_same(values):
            return values[0]
        return xp.concat([_spread(value, axis, count) for value, count in zip(values, counts, strict=True)], axis=axis)

    return pieces[0] if len(pieces) == 1 else _changed(pieces[0], join)


def _the_same(values: list[Array]) -> bool:
    """Whether all are one number, which stays one: components of one variance are faster than those of many."""
    return all(value.shape == (1, 1, 1) and bool(value == values[0]) for value in values)


def _spread(values: Array, axis: int, count: int) -> Array:
    """What a piece's components share, for each of them."""
    return array_namespace(values).broadcast_to(values, (*values.shape[:axis], count, *values.shape[axis + 1 :]))


def _reordered(pairs: Any, order: Array) -> Any:
    def take(name: str) -> Array:
        values = getattr(pairs, name)
        return values if values.shape[0] == 1 else array_namespace(values).take(values, order, axis=0)

    return _changed(pairs, take)


def _changed(components: Any, change: Callable[[str], Array]) -> Any:
    return type(components)(**{field.name: change(field.name) for field in fields(components)})


def _log_weights(part: Whole) -> Array:
    return part.log_weights


def _centres(part: Whole) -> Array:
    return part.centres


def _tile(part: Whole, start: int, stop: int, dtype: Any) -> Whole:
    return part.tile(start, stop, dtype)


def _pairs(part: Whole, places: Any, dtype: Any) -> Whole:
    return part.pairs(from_numpy(places, part.centres, index_dtype(part.centres)), dtype)
