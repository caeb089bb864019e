"""Bounds on the logits of all components from a float32 product, or from a cheaper one.

Cheaper are products along principal directions, and bfloat16 ones where the CPU has units for them.

The bounds are rigorous: |fl(a . b) - a . b| <= gamma_n |a| |b| holds for every order of summation, with or without
fused multiply-adds; norms and N are float64, and their errors are counted too. See `index` for the inequality.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from dfmath.backends import bfloat16
from dfmath.backends.components import LOG_2PI
from dfmath.backends.index import SKETCH_WIDEST, Index
from dfmath.backends.precision import ROUND_32, ROUND_64, gamma
from dfmath.backends.request import Request
from dfmath.backends.sweep import Problem, Tile, logit_floor, look_up, place_of_largest
from dfmath.backends.threaded import all_pairs, chunked
from numba import njit, prange

ROUND_UP = 2.0**-22  # more than float32 and the arithmetic before it round
LARGEST = 3e38  # in float32
WORTH = 0.08  # taking up this share of the components from differences costs as much as a product with all of them

TELLING = 64  # dimensions up to which float64 products cost little more than a screen, if they were not needed
AIM_TILE = 4096  # points looked at in one go for a good one: the first of them, or all where that is cheap

NOTHING = np.empty((0, 0, 0), dtype=np.float32)  # bounds where there is no screen


def crowded(ask: Request) -> Any:
    """Whether more components matter than differences are worth, by a sample of them, (B,).

    In many dimensions the nearest of a sample says little of the nearest of all, and a mistake costs much.
    """
    index = ask.about_index
    if ask.components.dim > TELLING:
        return np.zeros(len(ask.queries), dtype=bool)
    points, log_weights = index.few
    along = (ask.alpha / ask.spread)[:, None] * (ask.p @ points.T)
    curvature = 0.5 * (ask.alpha**2 / ask.spread)[:, None] * np.sum(points**2, axis=1)
    logits = log_weights + along - curvature
    near = logits >= logits.max(axis=1, keepdims=True) - ask.cut[:, None]
    return near.mean(axis=1) > WORTH


Kind = Literal["sketch", "bfloat16", "float32"]


class Screen:
    """Bounds for a block of queries, tile by tile, by one kind of product."""

    def __init__(self, problem: Problem, index: Index, kind: Kind) -> None:
        self.problem, self.index, self.kind = problem, index, kind
        self.sketch = index.sketch if kind == "sketch" else None
        p = index.offsets(problem.queries, problem.alpha)
        self.length = np.linalg.norm(p, axis=1)
        along = p if self.sketch is None else p @ self.sketch.directions.T
        self.rest = self._rest(along)
        self.unit = np.ldexp(1.0, np.frexp(self.length)[1])  # so that float32 neither over- nor underflows
        self.along = np.ascontiguousarray((along / self.unit[:, None]).astype(np.float32))
        dim, width = p.shape[1], along.shape[1]
        self.slip = 1e-37 * dim * problem.alpha * max(index.radius, 1.0)  # underflow
        rounding = 0.5 * gamma(width + 8, ROUND_32) + gamma(2 * dim + 32, ROUND_64)
        # N is the root of a difference, known to the root of its error.
        self.kappa = rounding if self.sketch is None else rounding + np.sqrt(gamma(8 * (dim + width), ROUND_64))

    def _rest(self, along: Any) -> Any:
        """What p . v may be more than the product says, divided by the rest of v, (B,)."""
        if self.sketch is not None:
            return np.sqrt(np.maximum(self.length**2 - np.linalg.norm(along, axis=1) ** 2, 0.0))
        return (bfloat16.error(along.shape[1]) if self.kind == "bfloat16" else 0.0) * self.length

    def _factors(self, start: int, stop: int) -> tuple[Any, float, Any]:
        """Return what the queries are multiplied with, its unit, and the rest of v, (N,)."""
        if self.sketch is not None:
            return self.sketch.coordinates[start:stop], self.index.unit, self.sketch.rest[start:stop]
        points, unit = self.index.centred(start, stop, np.float32), self.index.unit_of(np.float32)
        return points, unit, self.index.norms[start:stop]

    def bounds(self, tile: Tile, start: int, stop: int, best: Any) -> tuple[Any, Any]:
        """Upper bounds on the logits of a tile's components, and how many of them reach what `best` leaves (B,)."""
        points, unit, rests = self._factors(start, stop)
        upper, reaching = chunked(len(self.along), stop - start, np.float32), np.zeros(len(self.along), dtype=np.int64)
        (bfloat16.all_pairs if self.kind == "bfloat16" else all_pairs)(self.along, points, upper)
        sides = self.unit * unit, self.length, self.rest, self.slip
        _bound(self.problem, tile, upper, *sides, self.index.norms[start:stop], rests, self.kappa, best, reaching)
        return upper, reaching


class Pilot:
    """Chooses for each tile the cheapest bounds that leave few enough components."""

    def __init__(self, problem: Problem, index: Index, best: Any) -> None:
        self.problem, self.index, self.best = problem, index, best
        index.queries += len(problem.queries)
        pays: dict[Kind, bool] = {
            "sketch": index.queries >= 2 * SKETCH_WIDEST and index.sketch is not None,
            "bfloat16": bfloat16.pays(problem.queries.shape[1]),
            "float32": True,
        }
        self.kinds = [kind for kind in pays if pays[kind]]
        self._screens: dict[Kind, Screen] = {}
        if len(self.kinds) > 1:
            self._aim(len(index.norms) if self.sketched else AIM_TILE)

    @property
    def sketched(self) -> bool:
        """Whether the sketch is what is asked."""
        return self.kinds[0] == "sketch"

    def bounds(self, tile: Tile, start: int, stop: int) -> Any:
        """Bounds for one tile; a screen that left too many over is not asked again."""
        upper, reaching = self._screen().bounds(tile, start, stop, self.best)
        if len(self.kinds) == 1 or reaching.sum() <= WORTH * len(reaching) * (stop - start):
            return upper
        self.kinds.pop(0)
        return self.bounds(tile, start, stop)

    def _screen(self) -> Screen:
        """The cheapest screen still asked, made when it is needed."""
        kind = self.kinds[0]
        if kind not in self._screens:
            self._screens[kind] = Screen(self.problem, self.index, kind)
        return self._screens[kind]

    def _aim(self, count: int) -> None:
        """Find a good component for each query, so that from the first tile on little is left over."""
        count, screen = min(count, len(self.index.norms)), self._screen()
        promising, hopes = np.zeros(len(self.best), dtype=np.int64), np.full(len(self.best), -np.inf)
        for start in range(0, count, AIM_TILE):
            stop = min(start + AIM_TILE, count)
            upper, _ = screen.bounds(self.index.whole.part(start, stop), start, stop, self.best)
            _keep_largest(upper, start, stop, promising, hopes)
        look_up(self.problem, self.index.whole, promising, self.best)


@njit(cache=True, parallel=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy", nogil=True)
def _bound(
    problem: Any,
    tile: Any,
    products: Any,
    scale: Any,
    lengths: Any,
    rest: Any,
    slips: Any,
    norms: Any,
    rests: Any,
    kappa: float,
    best: Any,
    reaching: Any,
) -> None:  # pragma: no cover - compiled
    """Turn products into upper bounds on logits, rounded up; count those that reach the floor."""
    width, size = products.shape[2], norms.shape[0]
    for b in prange(products.shape[1]):
        alpha, length, slip = problem.alpha[b], lengths[b], 2.0 * slips[b]
        spread = alpha * alpha * tile.variances[0] + problem.sigma[b] * problem.sigma[b]
        constant = 0.5 * problem.queries.shape[1] * (math.log(spread) + LOG_2PI)
        turn, aside, steep = 2.0 * alpha * scale[b], 2.0 * alpha * rest[b], -0.5 / spread
        floor, count = logit_floor(best[b], problem.cut[b]), 0
        for c in range(products.shape[0]):
            row, first = products[c, b], c * width
            m = min(width, size - first)
            norm, other, log_weight = norms[first:], rests[first:], tile.log_weights[first:]
            for n in range(m):
                far = alpha * norm[n]
                reach = length + far
                square = length * length + far * far - turn * row[n] - aside * other[n] - reach * (kappa * reach + slip)
                upper = log_weight[n] + steep * max(square, 0.0) - constant
                row[n] = max(upper + ROUND_UP * abs(upper), -LARGEST)  # nan for a component of no weight
            for n in range(m):
                count += row[n] >= floor
        reaching[b] = count


@njit(cache=True, parallel=True, nogil=True)
def _keep_largest(upper: Any, start: int, stop: int, promising: Any, hopes: Any) -> None:  # pragma: no cover - compiled
    for b in prange(hopes.shape[0]):
        place, most = place_of_largest(upper, b, stop - start)
        if most > hopes[b]:
            promising[b], hopes[b] = start + place, most
