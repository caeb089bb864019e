"""Posterior moments from two dense matrix products: right wherever rounding in the logits cannot show.

With p = x - alpha c, v_k = y_k - c and S the one variance of all components as seen at x,

    logit_k = log pi_k + (alpha/S) p . v_k - alpha^2 |v_k|^2/(2 S) + (the same for all k),

so logits are a product, and so are their weighted sums of v, of its squares and of v (v . probe). They are kept about
c, in float64 between tiles; the products themselves are in float32 where the caller's result is, else in float64.
Tiles, running maxima and merges are those of a streaming softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from dfmath.backends.components import LOG_2PI
from dfmath.backends.double import posterior_mean
from dfmath.backends.index import COPIED
from dfmath.backends.matrices import add_span, add_times, centred_products, triangle, unpacked
from dfmath.backends.moments import Moments, Second, multiples_of_identity
from dfmath.backends.numba_arithmetic import exp_in_place, largest_of, summing
from dfmath.backends.precision import ROUND_64, gamma, rounding
from dfmath.backends.request import Request
from dfmath.backends.sweep import DEPTH
from dfmath.backends.threaded import all_pairs, chunked, weighted_sums
from numba import njit, prange

TILE = 2048  # components whose weights are formed at a time
PAIRS = 2**21  # products of two coordinates that are formed at a time
ALONG = 2**23  # products with probes that are formed at a time

MOST, MOST_32 = 700.0, 85.0  # exp of less is not a normal number for certain, in float64 and in float32
LARGEST = 1e30  # well inside float32's range
SPARSE = 0.12  # a smaller share of the weights is cheaper taken one by one than as a matrix product
APART = 150  # coordinates that could be worked on while one weight is looked up
GATHERED = 0.4  # the same where vectors are gathered for products of their own
_ROUNDED = 1.0  # one rounding is off by at most this many u


def logit_error(ask: Request) -> Any:
    """Estimate the error of logits from products, (B,): the usual one, not the worst.

    Infinite where the dtype could not hold the factors.
    """
    index, steep = ask.about_index, ask.alpha / ask.spread
    growth = 0.25 + 4.0 / math.sqrt(ask.components.dim)  # a sum of many random roundings, and a few of the whole
    error = growth * rounding(ask.dtype) * steep * index.typical * (ask.length + ask.alpha * index.typical)
    return np.where(steep * ask.length * index.unit_of(ask.dtype) < LARGEST, error, np.inf)


@dataclass
class _Sums:
    """Sums over components, weighted by exp(logit - top), about the centre and in units u of the data."""

    top: Any  # (B,)
    mass: Any  # (B,)
    crowd: Any  # (B,) of the weights themselves
    square: Any  # (B,) of |v|^2, in the data's own units
    vector: Any  # (B, d) of v
    diagonal: Any  # (B, d | 0) of v_j^2
    product: Any  # (B, p, d) of (v . probe) v, for few probes
    span: Any  # (B, d, p) of the same, for many
    pairs: Any  # (B, d (d + 1)/2 | 0) of v_i v_j, i >= j

    def scale(self, factor: Any) -> None:
        """Multiply by a factor for each query, where it is not 1 for all and there is anything to multiply."""
        if (factor != 1.0).any() and self.mass.any():
            for field in fields(self)[1:]:
                part = getattr(self, field.name)
                part *= (factor**2 if part is self.crowd else factor).reshape(-1, *(1,) * (part.ndim - 1))


class Products:
    """Moments of a block of queries by products."""

    def __init__(self, ask: Request) -> None:
        self.ask, self.index = ask, ask.about_index
        self.alpha, self.want, self.dtype, self.spread, self.p = ask.alpha, ask.want, ask.dtype, ask.spread, ask.p
        # Weights that single precision could not hold as normal numbers are left out, too.
        self.cut = np.minimum(ask.cut, 80.0 if ask.dtype == np.float32 else DEPTH)
        self.omitted = len(self.index.norms) * np.exp(-self.cut)
        self.unit = self.index.unit_of(ask.dtype)
        self.steep = np.ascontiguousarray((self.unit * ask.alpha / ask.spread)[:, None] * ask.p, dtype=ask.dtype)
        (count, dim), want = ask.queries.shape, ask.want
        self._lay_out_probes()
        pairs = triangle(dim) if "dense" in want or ask.wide else 0
        most = TILE if self.index.keeps_coordinate_products(ask.dtype) else PAIRS // max(1, pairs)
        copied = COPIED // dim if self.index.copies(ask.dtype) and not pairs else TILE
        self.tile = max(16, min(TILE, most, copied, ALONG // max(1, len(self.flat))))
        self.crowded = np.zeros(count, dtype=bool)  # queries of which some sums were products
        self.sums = _Sums(
            top=np.full(count, -np.inf),
            mass=np.zeros(count),
            crowd=np.zeros(count),
            square=np.zeros(count),
            vector=np.zeros((count, dim if want else 0)),
            diagonal=np.zeros((count, dim if "diagonal" in want else 0)),
            product=np.zeros(self.rows.shape),
            span=np.zeros(self.columns.shape),
            pairs=np.zeros((count, pairs)),
        )

    def _lay_out_probes(self) -> None:
        """Probes in the products' dtype and range: rows (B, p, d) if they are few, else columns (B, d, p)."""
        ask, (count, dim) = self.ask, self.ask.queries.shape
        probes = np.zeros((count, dim, 0)) if ask.probes is None else ask.probes
        self.probe_unit = np.ones((count, 1, 1))
        if self.dtype == np.float32:
            largest = np.max(np.abs(probes), axis=(1, 2), keepdims=True, initial=0.0)
            self.probe_unit = np.ldexp(1.0, np.frexp(largest)[1])
            probes = probes / self.probe_unit
        none = np.zeros((count, 0, dim))
        self.rows = none if ask.wide else np.ascontiguousarray(np.swapaxes(probes, 1, 2))
        self.flat = np.ascontiguousarray(self.rows.reshape(-1, dim), dtype=self.dtype)
        self.columns = np.ascontiguousarray(probes if ask.wide else np.swapaxes(none, 1, 2), dtype=self.dtype)

    def run(self) -> None:
        """Sum over all components."""
        count = len(self.index.norms)
        for start in range(0, count, self.tile):
            self._add(start, min(start + self.tile, count))

    def _add(self, start: int, stop: int) -> None:
        index, sums = self.index, self.sums
        points = index.centred(start, stop, self.dtype)
        weights = chunked(len(self.steep), stop - start, self.dtype)
        all_pairs(self.steep, points, weights)
        top, curvature = np.array(sums.top), 0.5 * self.alpha**2 / self.spread
        mass, crowd, square, carrying = np.zeros((4, len(top)))
        part = index.whole.log_weights[start:stop], index.norms[start:stop]
        _to_weights(weights, *part, curvature, self.cut, sums.top, mass, crowd, square, carrying)
        with np.errstate(invalid="ignore"):
            sums.scale(np.where(sums.top == -np.inf, 1.0, np.exp(top - sums.top)))
        sums.mass += mass
        sums.crowd += crowd
        sums.square += square
        if not self.want:
            return
        few = self._few(carrying, len(points))
        if few.any():
            self._add_few(weights, points, np.flatnonzero(few))
        if not few.all():
            self._add_products(weights, points, start, np.flatnonzero(~few))

    def _few(self, carrying: Any, count: int) -> Any:
        """Whether a query's weights that are not zero are so few that they are cheaper one by one, (B,)."""
        if not self.want <= {"mean", "trace", "product"}:
            return np.zeros(len(carrying), dtype=bool)
        dim = self.p.shape[1]
        return carrying < (GATHERED if self.ask.wide else SPARSE * dim / (dim + APART)) * count

    def _add_few(self, weights: Any, points: Any, places: Any) -> None:
        if self.ask.wide:
            add_span(weights, points, places, self.columns, self.sums.vector, self.sums.span)
        else:
            _add_each(weights, points, places, self.rows, self.sums.vector, self.sums.product)

    def _add_products(self, weights: Any, points: Any, start: int, places: Any) -> None:
        """Add the sums that are matrix products, for some of the queries."""
        sums, everyone = self.sums, len(places) == weights.shape[1]
        self.crowded[places] = True
        weights = weights if everyone else np.ascontiguousarray(weights[:, places])

        def add(weights: Any, values: Any, total: Any) -> None:
            part = total if everyone else np.zeros((len(places), *total.shape[1:]))
            weighted_sums(weights, values, part.reshape(-1, values.shape[1]))
            if not everyone:
                total[places] += part

        add(weights, points, sums.vector)
        if "diagonal" in self.want:
            add(weights, points * points, sums.diagonal)
        if sums.product.shape[1]:
            rows = self.flat.reshape(sums.product.shape)[places].reshape(-1, points.shape[1])
            along = chunked(len(rows), len(points), self.dtype)
            all_pairs(rows, points, along)
            _weigh(along, weights)
            add(along, points, sums.product)
        if sums.pairs.shape[1]:
            add(weights, self.index.coordinate_products(start, start + len(points), self.dtype), sums.pairs)

    def moments(self) -> Moments:
        """Return the moments; `between` is centred here, which `error` watches."""
        sums, want, slope = self.sums, self.want, self._slope()
        mass = sums.mass
        constant = 0.5 * (self.ask.length**2 / self.spread + self.p.shape[1] * (np.log(self.spread) + LOG_2PI))
        log_mass = sums.top + np.log(mass) - constant
        still, logit_error = np.zeros_like(mass), self.worst_logit_error()
        if not want:
            return Moments(log_mass, still, None, None, Second(), Second(), self.omitted, logit_error, still, still)
        self.mean = sums.vector * (self.unit / mass)[:, None]
        within = (1.0 if self._score() else self.ask.sigma**2 * self.ask.components.variances[0, 0, 0]) / self.spread
        return Moments(
            log_mass,
            still,
            self._origin,
            slope[:, None] * self.mean + self._origin_low,
            multiples_of_identity(within, self.p.shape[1], want, self.ask.probes),
            self._between(slope**2),
            self.omitted,
            logit_error,
            self.worst_sum_error(slope**2),
            still,
        )

    def _score(self) -> bool:
        return self.ask.space == "score"

    def _slope(self) -> Any:
        """u_k = origin + slope v_k."""
        return (self.alpha if self._score() else self.ask.sigma**2) / self.spread

    @cached_property
    def _origin(self) -> Any:
        if self._score():
            return -self.p / self.spread[:, None]
        return self._origin_in_two_terms[0]

    @cached_property
    def _origin_low(self) -> Any:
        """What rounding took from it: far from the origin, the means of two parts of the data differ by less."""
        return 0.0 if self._score() else self._origin_in_two_terms[1]

    @cached_property
    def _origin_in_two_terms(self) -> tuple[Any, Any]:
        variance, alpha, sigma = self.ask.components.variances[0, 0, 0], self.alpha[:, None], self.ask.sigma[:, None]
        return posterior_mean(self.ask.queries, alpha, sigma, variance, self.index.centre, self.p)

    def _between(self, factor: Any) -> Second:
        sums, want, mean = self.sums, self.want, self.mean
        unit = factor * self.unit**2 / sums.mass
        return Second(
            trace=factor * self.variance if "trace" in want else None,
            diagonal=unit[:, None] * sums.diagonal - factor[:, None] * mean**2 if "diagonal" in want else None,
            product=self._product(unit, factor) if "product" in want else None,
            dense=self._dense(unit, factor) if "dense" in want else None,
        )

    def _product(self, unit: Any, factor: Any) -> Any:
        if self.ask.wide:
            return self._wide_product(unit, factor)
        along = (self.mean[:, None, :] @ self.ask.probes)[:, 0, :]  # (B, p)
        raw = unit[:, None, None] * np.swapaxes(self.sums.product * self.probe_unit, 1, 2)
        return raw - factor[:, None, None] * self.mean[:, :, None] * along[:, None, :]

    def _wide_product(self, unit: Any, factor: Any) -> Any:
        """What was summed as vectors, and what was summed as matrices times the probes; centred with either."""
        crowds, probes = np.flatnonzero(self.crowded), self.ask.probes
        span, less = unit * self.probe_unit[:, 0, 0], np.where(self.crowded, 0.0, factor)
        found = centred_products(self.sums.span, span, less, self.mean, probes)
        parts = (part[crowds] for part in (self.sums.pairs, unit, factor, self.mean))
        add_times(unpacked(*parts), probes, crowds, found)
        return found

    def _dense(self, unit: Any, factor: Any) -> Any:
        return unpacked(self.sums.pairs, unit, factor, self.mean)

    @cached_property
    def variance(self) -> Any:
        """Total variance of v under the weights, (B,)."""
        return np.maximum(self.sums.square / self.sums.mass - np.sum(self.mean**2, axis=1), 0.0)

    def error(self, moments: Moments) -> Any:
        """Estimate the relative error of the results, (B,), now that the spread of the weights is known.

        Errors e of the logits, were they independent, would move the mean by about e sqrt(tr Cov sum w^2) and Cov by
        e tr Cov sqrt(sum w^2); rounding of p moves all together, by at most its own size times |v - m| alpha/S. In
        score space they are measured beside |s|, and beside S for each vector and d S for the trace. Centring here
        and not at the mean adds what rounding makes of the centre's distance.
        """
        unit, mass = rounding(self.dtype), self.sums.mass
        logit = logit_error(self.ask)
        if not self.want:
            return logit / np.maximum(np.abs(moments.log_mass), 1.0)
        square, variance = self.sums.square / mass, self.variance
        moved = _ROUNDED * unit * self.ask.length * self.alpha / self.spread * np.sqrt(variance)
        logit = logit * np.sqrt(self.sums.crowd) / mass + moved
        slope, size = self._slope(), np.linalg.norm(moments.mean, axis=1)
        first = (logit * np.sqrt(variance) + _ROUNDED * unit * np.sqrt(square)) * slope
        first = (first + ROUND_64 * np.linalg.norm(self._origin, axis=1)) / np.maximum(size, 1e-300)
        if self.want <= {"mean"}:
            return first
        # What the caller's tolerance leaves out is not an error, but where a covariance is measured beside itself.
        counted = self.ask.covariance | (self.cut < self.ask.cut)
        lost = np.where(counted, self.omitted, 0.0) * (2.0 * self.index.radius) ** 2
        return np.maximum(first, self._second_error(logit, unit, variance, square, lost))

    def _second_error(self, logit: Any, unit: float, variance: Any, square: Any, lost: Any) -> Any:
        """Relative errors of the forms of F or P: of its value along each probe, its trace, or any entry."""
        dim, found = self.p.shape[1], np.zeros_like(variance)
        with np.errstate(over="ignore"):  # infinitely far above Cov
            scale = self.spread / self.alpha**2  # of I/S, in the units of Cov
        whole = logit * variance + 2.0 * unit * square + lost
        size = np.abs(dim * scale - variance) if self._score() else variance
        if "trace" in self.want:
            found = whole / np.maximum(size, 1e-300)
        if self.want & {"diagonal", "dense"} or self.ask.wide:  # where single entries may be far below the trace
            found = np.maximum(found, whole / np.maximum(size / (dim if self._score() else 10.0), 1e-300))
        elif "product" in self.want:
            raw, centred = self._along()
            error = logit[:, None] * np.sqrt(variance[:, None] * centred) + unit * np.sqrt(square[:, None] * raw)
            beside = np.abs(scale[:, None] - centred) if self._score() else centred
            found = np.maximum(found, np.max((error + lost[:, None]) / np.maximum(beside, 1e-300), axis=1, initial=0.0))
        return found

    def _along(self) -> tuple[Any, Any]:
        """E[(v . u)^2] and its centred value along each probe's direction u, (B, p)."""
        length = np.maximum(np.sum(self.rows**2, axis=2), 1e-300)
        raw = np.sum(self.rows * self.sums.product, axis=2) * (self.unit**2 / self.sums.mass)[:, None]
        mean = np.sum(self.rows * self.mean[:, None, :], axis=2)
        return np.maximum(raw, 0.0) / length, np.maximum(raw - mean**2, 0.0) / length

    def worst_logit_error(self) -> Any:
        """Bound the errors of all logits, (B,)."""
        unit = rounding(self.dtype)
        dim, reach = self.p.shape[1], self.ask.length + self.alpha * self.index.radius
        product = self.alpha * self.ask.length * self.index.radius * gamma(dim + 8, unit)
        # The sum itself, its largest term, and the exponential are rounded in the products' dtype.
        last = 8.0 * unit * (np.abs(math.log(len(self.index.norms))) + 100.0)
        return (product + gamma(dim + 32, ROUND_64) * reach**2) / self.spread + last

    def certified(self, moments: Moments) -> Any:
        """Bound the relative error of any form of Cov beside I/S or, in posterior space, beside tr Cov, (B,)."""
        if not self.want:
            return moments.logit_error
        size = 1.0 / self.spread if self._score() else self._slope() ** 2 * self.variance
        return np.maximum(moments.logit_error, moments.sum_error / np.maximum(size, 1e-300))

    def worst_sum_error(self, factor: Any) -> Any:
        """Bound what rounding in the sums over components did to the centred second moments, (B,)."""
        unit = rounding(self.dtype)
        length = gamma(self.p.shape[1], unit) + 3.0 * gamma(self.tile, unit) + 32.0 * unit
        return length * factor * self.sums.square / self.sums.mass


@njit(cache=True, parallel=True, error_model="numpy", nogil=True)
def _to_weights(
    products: Any,
    log_weights: Any,
    norms: Any,
    curvature: Any,
    cut: Any,
    top: Any,
    mass: Any,
    crowd: Any,
    square: Any,
    carrying: Any,
) -> None:  # pragma: no cover - compiled
    """Turn products into weights beside the largest of all, zero below the cut; `top` becomes the largest logit.

    Adds up weights, their squares, weights times |v|^2, and how many are not zero.
    """
    width, count = products.shape[2], norms.shape[0]
    lowest = MOST if products.itemsize == 8 else MOST_32
    for b in prange(products.shape[1]):
        logits, powers, largest = np.empty(count), np.empty(width, dtype=np.int32), top[b]
        for c in range(products.shape[0]):
            first, row = c * width, products[c, b]
            bias, norm, here = log_weights[first:], norms[first:], logits[first:]
            for n in range(min(width, count - first)):
                here[n] = row[n] + bias[n] - curvature[b] * norm[n] * norm[n]
        largest = max(largest, largest_of(logits))
        least = math.exp(-min(cut[b], lowest)) * (1.0 + 1e-12) if largest > -np.inf else np.inf
        for c in range(products.shape[0]):
            here, norm = logits[c * width : (c + 1) * width], norms[c * width : (c + 1) * width]
            row = products[c, b, : here.shape[0]]
            for n in range(here.shape[0]):
                row[n] = max(here[n] - largest, -lowest)
            exp_in_place(row, powers)
            sums = _tally(row, norm, least)
            mass[b] += sums[0]
            crowd[b] += sums[1]
            square[b] += sums[2]
            carrying[b] += sums[3]
        top[b] = largest


@summing
def _tally(weights, norms, least):  # type: ignore[no-untyped-def]
    """Set weights that are not above the least to zero; sums of the others, as `_to_weights` wants them."""
    mass, crowd, square, carrying = 0.0, 0.0, 0.0, 0.0
    for n in range(weights.shape[0]):
        w = weights[n] if weights[n] > least else 0.0
        weights[n] = w
        mass += w
        crowd += w * w
        square += w * norms[n] * norms[n]
        carrying += 1.0 if w > 0.0 else 0.0
    return mass, crowd, square, carrying


@njit(cache=True, parallel=True, fastmath={"contract", "reassoc", "nsz"}, nogil=True)
def _add_each(
    weights: Any, points: Any, places: Any, probes: Any, vector: Any, product: Any
) -> None:  # pragma: no cover - compiled
    """Add w v and w (v . probe) v for the few weights of some queries that are not zero."""
    width = weights.shape[2]
    for i in prange(places.shape[0]):
        b = places[i]
        total = vector[b]
        for c in range(weights.shape[0]):
            row = weights[c, b]
            for n in range(min(width, points.shape[0] - c * width)):
                w, v = np.float64(row[n]), points[c * width + n]
                if w > 0.0:
                    for j in range(v.shape[0]):
                        total[j] += w * v[j]
                    for k in range(probes.shape[1]):
                        along, probe, part = 0.0, probes[b, k], product[b, k]
                        for j in range(v.shape[0]):
                            along += probe[j] * v[j]
                        along *= w
                        for j in range(v.shape[0]):
                            part[j] += along * v[j]


@njit(cache=True, parallel=True, nogil=True)
def _weigh(along: Any, weights: Any) -> None:  # pragma: no cover - compiled
    """Multiply the products with p probes for every query by its weights."""
    probes = along.shape[1] // weights.shape[1]
    for r in prange(along.shape[1]):
        for c in range(along.shape[0]):
            for n in range(along.shape[2]):
                along[c, r, n] *= weights[c, r // probes, n]
