"""Components that can matter near a query seen before: along a trajectory, most evaluations look at no others.

Let a be some component, z = x/alpha, s = S/alpha^2 and q_n(z) = |z - y_n|^2. Between z and y_a the difference of two
squares is linear,

    q_n - q_a  at  z + tau (y_a - z) + delta   =   (1 - tau) (q_n - q_a)(z) + tau |y_n - y_a|^2 - 2 delta . (y_n - y_a),

so a component n lighter than a by exp(-cut) stays so at all places within

    c_n = (min((q_n - q_a)(z), |y_n - y_a|^2) - 2 s (cut + log(pi_n/pi_a)_+)) / (2 |y_n - y_a|)

of the segment from z to y_a, as long as s and s cut do not grow [MATH 4.8]. Trajectories run along such segments at low
noise. This is sharper than |z' - y| >= |z - y| - |z' - z|, which in d dimensions is spent by the noise that all
distances share. The components of least c_n are listed, and the next c_n is how far off the segment z may move. Of
those listed, only the ones are looked at whose own c_n, at the noise that there is now, z has moved beyond.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from dfmath.backends.index import COPIED
from dfmath.backends.numba_arithmetic import summing
from dfmath.backends.precision import ROUND_64, gamma
from dfmath.backends.threaded import all_pairs, chunked
from numba import njit, prange

if TYPE_CHECKING:
    from dfmath.backends.request import Request

LEAST = 4096  # components below which looking at all of them costs little more than looking for the right ones
FEWEST, SHARE, LONGEST = 64, 16, 4096  # a list has one in so many components, within limits
MOST = 256  # lists that are kept
AT_ONCE = 2**22  # pairs of a query and a component that are compared at a time
PATIENCE, IMPATIENCE = 0.1, 0.4  # change of log s until a list is made again nearby, after success and after failure
MARGIN = 1e-9  # far above the rounding of plain float64 arithmetic


class Comparisons(NamedTuple):
    """Pairs of a query or place and a component n, each beside a component a: all of an array's shape, (B, N)."""

    gaps: Any  # lower bounds on min(q_n - q_a, |y_n - y_a|^2)
    lengths: Any  # upper bounds on |y_n - y_a|
    ahead: Any  # log(pi_n/pi_a)_+

    def movements(self, s: Any, cut: Any) -> Any:
        """Lower bounds on c_n, at noise (B,) and for a cut (B,); negative where n is not that much lighter."""
        free = self.gaps - 2.0 * s[:, None] * (cut[:, None] + self.ahead)
        return 0.5 * free / np.maximum(self.lengths, 1e-300) * (1.0 - MARGIN * np.sign(free))

    def at(self, columns: Any) -> Comparisons:
        """The same for chosen components of each row, (B, L)."""
        return Comparisons(*(np.take_along_axis(part, columns, axis=1) for part in self))


@dataclass(frozen=True)
class Lists:
    """Places and the components that can matter near them."""

    places: Any  # (m, d) z, the latest last, and
    anchors: Any  # (m, d) y_a
    within: Any  # (m,) how far off the segment z may move; negative where too many components matter
    spread: Any  # (m,) s up to which the list holds, and
    reach: Any  # (m,) s cut
    listed: Any  # (m, L)
    comparisons: Comparisons  # (m, L)

    def and_then(self, new: Lists) -> Lists:
        """These and others, no more than are kept."""

        def join(old: Any, more: Any) -> Any:
            if isinstance(old, Comparisons):
                return Comparisons(*map(join, old, more))
            return np.concatenate([old, more])[-MOST:]

        return Lists(**{f.name: join(getattr(self, f.name), getattr(new, f.name)) for f in fields(self)})

    @cached_property
    def segments(self) -> tuple[Any, Any, Any, Any]:
        """From places to anchors (m, d), their squared lengths, and the places' products with them and themselves."""
        along = self.anchors - self.places
        return along, np.maximum(_squares(along), 1e-300), np.sum(self.places * along, axis=1), _squares(self.places)

    def distances(self, z: Any) -> Any:
        """Distances of places z from the segments, (B, m), not to the last digit."""
        along, length, start, size = self.segments
        squares = _squares(z)[:, None] + size - 2.0 * (z @ self.places.T)
        inner = z @ along.T - start
        part = np.clip(inner / length, 0.0, 1.0)
        return np.sqrt(np.maximum(squares - part * (2.0 * inner - part * length), 0.0))


class Candidates:
    """What one trajectory's evaluations, or those of many, remember of each other.

    `growth` is the factor by which s may grow before a list is of no use: 1 where noise falls, more where it rises.
    """

    def __init__(self, growth: float = 1.0) -> None:
        self.growth = growth
        self.lists: Lists | None = None

    def covering(self, ask: Request) -> tuple[Any, Any]:
        """Return which queries a list covers, (B,), and the components that can matter there, (B, L), else -1."""
        if self.lists is None:
            return np.zeros(len(ask.queries), dtype=bool), np.empty((len(ask.queries), 0), dtype=np.int64)
        lists, (z, s) = self.lists, _canonical(ask)
        allowed = (s[:, None] <= lists.spread) & ((s * ask.cut)[:, None] <= lists.reach)
        slack = np.where(allowed, lists.within - lists.distances(z), -np.inf)
        best = np.argmax(slack, axis=1)
        moved = _off_segment(z, lists.places[best], lists.anchors[best])
        covered = (moved <= lists.within[best]) & (slack.max(axis=1) > -np.inf)
        near = Comparisons(*(part[best] for part in lists.comparisons))
        return covered, np.where(near.movements(s, ask.cut) <= moved[:, None], lists.listed[best], -1)

    def learn(self, ask: Request) -> None:
        """Make lists for these queries, unless that was done or tried at much the same noise."""
        due = self._due(ask)
        if not np.isfinite(ask.cut).all() or not due.any():
            return
        ask = ask.take(due)
        step = max(1, AT_ONCE // ask.components.count)
        for start in range(0, len(ask.queries), step):
            new = _lists(ask.take(slice(start, start + step)), self.growth)
            self.lists = new if self.lists is None else self.lists.and_then(new)

    def _due(self, ask: Request) -> Any:
        """Whether noise has changed enough since the nearest place where a list was made or tried, (B,)."""
        if self.lists is None:
            return np.ones(len(ask.queries), dtype=bool)
        z, s = _canonical(ask)
        nearest = np.argmin(self.lists.distances(z), axis=1)
        wait = np.where(self.lists.within[nearest] > 0.0, PATIENCE, IMPATIENCE)
        return np.abs(np.log(self.growth * s / self.lists.spread[nearest])) >= wait


def _lists(ask: Request, growth: float) -> Lists:
    """List, for each query, the components of least c_n."""
    z, s = _canonical(ask)
    count = min(max(FEWEST, ask.components.count // SHARE), LONGEST, ask.components.count - 1)
    compared, anchors = compare(ask)
    moves = compared.movements(growth * s, ask.cut)
    order = np.argpartition(moves, count, axis=1)
    listed, next_one = order[:, :count], order[:, count : count + 1]
    return Lists(
        places=z,
        anchors=ask.about_index.whole.points[anchors].astype(np.float64),
        within=np.take_along_axis(moves, next_one, axis=1)[:, 0],
        spread=growth * s,
        reach=growth * s * ask.cut,
        listed=listed,
        comparisons=compared.at(listed),
    )


def compare(ask: Request) -> tuple[Comparisons, Any]:
    """Compare all components, at every query, with the best one there; return which that is, (B,), too."""
    index, centred = ask.about_index, ask.p / ask.alpha[:, None]
    gaps, lengths = np.empty((2, len(centred), ask.components.count))
    for start, stop, products in _products(ask, centred):
        gaps[:, start:stop] = products
    logs, s = index.whole.log_weights, _canonical(ask)[1]
    anchors = np.argmax((gaps - 0.5 * index.norms**2) / s[:, None] + logs, axis=1)
    offsets = index.whole.points[anchors].astype(np.float64) - index.centre
    sides = (np.sqrt(_squares(centred)), _squares(centred - offsets), np.sqrt(_squares(offsets)))
    kappa = gamma(2 * ask.components.dim + 32, ROUND_64)
    for start, stop, products in _products(ask, offsets):
        here = slice(start, stop)
        _compare(products, *sides, index.norms[here], kappa, gaps[:, here], lengths[:, here])
    return Comparisons(gaps, lengths, np.maximum(logs - logs[anchors][:, None], 0.0)), anchors


def _products(ask: Request, rows: Any) -> Iterator[tuple[int, int, Any]]:
    """Yield products of these rows with tiles of the points, (start, stop, products)."""
    index, step = ask.about_index, max(16, COPIED // ask.components.dim)
    scaled = np.ascontiguousarray(rows * index.unit_of(np.float64))
    for start in range(0, ask.components.count, step):
        stop = min(start + step, ask.components.count)
        out = chunked(len(rows), stop - start, np.float64)
        all_pairs(scaled, index.centred(start, stop, np.float64), out)
        yield start, stop, np.concatenate(list(out), axis=1)[:, : stop - start]


def _canonical(ask: Request) -> tuple[Any, Any]:
    """Return z = x/alpha and s = S/alpha^2."""
    return ask.queries / ask.alpha[:, None], ask.spread / ask.alpha**2


def _squares(rows: Any) -> Any:
    return np.sum(rows * rows, axis=1)


def _off_segment(z: Any, start: Any, end: Any) -> Any:
    """Return upper bounds on the distances of z from segments, (B,); any point of a segment gives one."""
    along = end - start
    part = np.clip(np.sum((z - start) * along, axis=1) / np.maximum(_squares(along), 1e-300), 0.0, 1.0)[:, None]
    size = np.sqrt(_squares(z)) + np.sqrt(_squares(start)) + np.sqrt(_squares(end))
    return np.sqrt(_squares(z - start - part * along)) * (1.0 + MARGIN) + 8.0 * ROUND_64 * size


@njit(cache=True, parallel=True, error_model="numpy", nogil=True)
def _compare(
    products: Any, lengths: Any, squares: Any, anchor_lengths: Any, norms: Any, kappa: float, gaps: Any, between: Any
) -> None:  # pragma: no cover - compiled
    """Turn products with the queries into gaps; `products` are those with the anchors, `squares` |z - y_a|^2."""
    for b in prange(gaps.shape[0]):
        nearest = squares[b] + kappa * (lengths[b] + anchor_lengths[b]) ** 2
        for n in range(gaps.shape[1]):
            square = _square(lengths[b], norms[n], gaps[b, n], -kappa)
            gaps[b, n] = min(square - nearest, _square(anchor_lengths[b], norms[n], products[b, n], -kappa))
            between[b, n] = math.sqrt(_square(anchor_lengths[b], norms[n], products[b, n], kappa))


@summing
def _square(a, b, product, kappa):  # type: ignore[no-untyped-def]
    """|u - v|^2 from norms and product, moved by its possible error in the direction of kappa."""
    return a * a + b * b - 2.0 * product + kappa * (a + b) * (a + b)
