"""Clusters of points with radii: at low noise whole clusters are left out without looking at their points.

A point y of a cluster about c of radius r is no nearer than |x - alpha y| >= |x - alpha c| - alpha r, so none of its
components has a logit above

    log pi_max - (|x - alpha c| - alpha r)_+^2/(2 S) - d/2 log 2 pi S.

Where data come in clusters, or in few dimensions, that leaves a small part of the points for little more than the
products with the centres. How good k-means is decides how many are left, never whether they are the right ones.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from dfmath.backends.components import LOG_2PI
from dfmath.backends.numba_arithmetic import squared_distance
from dfmath.backends.precision import ROUND_64, gamma
from dfmath.backends.sweep import Problem, Tile, logit, logit_floor
from numba import njit, prange

if TYPE_CHECKING:
    from dfmath.backends.index import Index
    from dfmath.backends.request import Request

EACH, ROUNDS = 32, 10  # sample points for each cluster, and rounds of Lloyd's algorithm
SHARE, LONGEST = 16, 2**14  # lists have no more than one in so many points, within a limit
FEWEST = 64
AT_ONCE = 2**22  # pairs of a point and a centre that are compared at a time
ROUND_UP = 2.0**-40  # more than the arithmetic of a bound rounds


class Members(NamedTuple):
    """Which points belong together: order[starts[j]:starts[j + 1]] is cluster j."""

    order: Any  # (N,)
    starts: Any  # (C + 1,)


@dataclass(frozen=True)
class Clusters:
    """Balls that hold all points."""

    centres: Any  # (C, d) float64
    radii: Any  # (C,) rounded up
    log_weights: Any  # (C,) the largest of each
    members: Members

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.radii)

    def worth(self, ask: Request) -> Any:
        """Whether any two squared distances can differ by what leaves one of the points out, for each query, (B,)."""
        reach = ask.alpha * ask.about_index.radius
        return 2.0 * ask.spread * ask.cut < 4.0 * reach * (ask.length + reach)

    def near(self, ask: Request, problem: Problem) -> tuple[Any, Any]:
        """Return for which queries few components can matter, (B,), and which, (B, L), else -1."""
        everything, sizes = ask.about_index.whole, np.diff(self.members.starts)
        slack = 8.0 * ROUND_64 * (np.linalg.norm(ask.queries, axis=1)[:, None] + ask.alpha[:, None] * self._lengths)
        reached = np.empty((len(ask.queries), self.count), dtype=np.bool_)
        kappa = gamma(ask.components.dim + 16, ROUND_64)
        _reach(problem, everything, self.centres, self.radii, self.log_weights, self.members, slack, kappa, reached)
        held = reached @ sizes
        few = held <= min(max(FEWEST, ask.components.count // SHARE), LONGEST)
        listed = np.full((len(held), max(1, int(held[few].max(initial=0)))), -1, dtype=np.int64)
        _list(reached, self.members, few, listed)
        return few, listed

    @cached_property
    def _lengths(self) -> Any:
        return np.linalg.norm(self.centres, axis=1) + self.radii


def default_count(points: int) -> int:
    """Return a number of clusters for which centres and the points of a few of them cost about the same."""
    return max(1, min(points, round(2.0 * math.sqrt(points))))


def make_clusters(index: Index, count: int, seed: int) -> Clusters:
    """Find centres on a sample, give every point to the nearest, and measure radii."""
    points, log_weights = index.whole.points, index.whole.log_weights
    owners = _nearest(points, _centres(points, count, seed))
    order = np.argsort(owners, kind="stable")
    starts = np.flatnonzero(np.diff(owners[order], prepend=-1))
    members = Members(order, np.append(starts, len(order)))
    centres, radii = np.zeros((len(starts), points.shape[1])), np.zeros(len(starts))
    _measure(points, members, centres, radii)
    return Clusters(centres, radii, np.maximum.reduceat(log_weights[order], starts), members)


def _centres(points: Any, count: int, seed: int) -> Any:
    """Lloyd's algorithm on a sample, from points drawn at random."""
    from scipy.cluster.vq import kmeans2

    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(points))[: EACH * count]
    sample = points[np.sort(chosen)].astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a centre that no point is nearest to stays where it is
        return kmeans2(sample, sample[rng.permutation(len(sample))[:count]], iter=ROUNDS, minit="matrix")[0]


def _nearest(points: Any, centres: Any) -> Any:
    """Return the centre nearest to each point, (N,), to the rounding of products about the centres' mean."""
    middle = centres.mean(axis=0)
    about, owners = centres - middle, np.empty(len(points), dtype=np.int64)
    half, step = 0.5 * (about * about).sum(axis=1), max(1, AT_ONCE // len(centres))
    for start in range(0, len(points), step):
        rows = slice(start, start + step)
        owners[rows] = np.argmax((points[rows] - middle) @ about.T - half, axis=1)
    return owners


@njit(cache=True, parallel=True, error_model="numpy", nogil=True)
def _measure(points: Any, members: Any, centres: Any, radii: Any) -> None:  # pragma: no cover - compiled
    """Centres as means of their points, and radii that hold them whatever is rounded."""
    dim = points.shape[1]
    for j in prange(radii.shape[0]):
        centre, most = centres[j], 0.0
        first, last = members.starts[j], members.starts[j + 1]
        for i in range(first, last):
            for k in range(dim):
                centre[k] += points[members.order[i], k] / (last - first)
        for i in range(first, last):
            most = max(most, squared_distance(centre, 1.0, points[members.order[i]], np.inf))
        length = 0.0
        for k in range(dim):
            length += centre[k] * centre[k]
        rounded = math.sqrt(most) * (1.0 + (dim + 16.0) * ROUND_64)
        radii[j] = rounded + 8.0 * ROUND_64 * (math.sqrt(length) + rounded)


@njit(cache=True, parallel=True, error_model="numpy", nogil=True)
def _reach(
    problem: Any,
    everything: Tile,
    centres: Any,
    radii: Any,
    log_weights: Any,
    members: Any,
    slack: Any,
    kappa: float,
    reached: Any,
) -> None:  # pragma: no cover - compiled
    """Mark the clusters whose bound reaches what the best of the most promising cluster's components leaves."""
    count = radii.shape[0]
    for b in prange(reached.shape[0]):
        alpha, upper = problem.alpha[b], np.empty(count)
        spread = alpha * alpha * everything.variances[0] + problem.sigma[b] * problem.sigma[b]
        constant = 0.5 * problem.queries.shape[1] * (math.log(spread) + LOG_2PI)
        for j in range(count):
            far = math.sqrt(squared_distance(problem.queries[b], alpha, centres[j], np.inf))
            gap = max(0.0, far - alpha * radii[j] - kappa * (far + alpha * radii[j]) - slack[b, j])
            upper[j] = log_weights[j] - 0.5 * gap * gap / spread - constant
        first, best = np.argmax(upper), -np.inf
        for i in range(members.starts[first], members.starts[first + 1]):
            best = max(best, logit(problem, everything, b, members.order[i], best))
        floor = logit_floor(best, problem.cut[b])
        for j in range(count):
            reached[b, j] = upper[j] + ROUND_UP * abs(upper[j]) >= floor


@njit(cache=True, parallel=True, nogil=True)
def _list(reached: Any, members: Any, few: Any, listed: Any) -> None:  # pragma: no cover - compiled
    """Write the members of the reached clusters into the rows of the queries that have few."""
    for b in prange(reached.shape[0]):
        at = 0
        if few[b]:
            for j in range(reached.shape[1]):
                if reached[b, j]:
                    for i in range(members.starts[j], members.starts[j + 1]):
                        listed[b, at] = members.order[i]
                        at += 1
