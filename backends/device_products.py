"""Posterior moments from two dense matrix products per tile, in any array library that indexes with arrays.

With p = x - alpha c, v = y - c and S the one variance of all components as seen at x, logits are (alpha/S) p . v up to
terms of |v|^2, and sums weighted by them are products too. They are kept about c, in float64 between tiles. Whether
rounding can show in what is centred afterwards is estimated as the backend for NumPy arrays does it (`products`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dfmath.backends import double
from dfmath.backends._compat import Array
from dfmath.backends.components import LOG_2PI
from dfmath.backends.device_memory import room
from dfmath.backends.device_precision import factor_rounding
from dfmath.backends.device_request import PRODUCT, Ask
from dfmath.backends.device_tiles import Law, Tile, largest_logit, weights_and_sums
from dfmath.backends.moments import Moments, Second
from dfmath.backends.precision import ROUND_64, gamma

TRY = 50.0  # products are tried where their logits may be off by this many times what results may be
CERTAIN = 2e-9  # worst relative error of what comes from products in float64
SINGLE = 1e30  # well inside float32's range


def by_products(ask: Ask) -> tuple[Moments | None, Array]:
    """Return moments by products, and for which queries they are right, (B,)."""
    xp, ways = ask.xp, [(ask.index.dtype, ROUND_64)]
    if ask.precision >= 2.0**-23 and factor_rounding(ask.queries) == 0.0:
        ways.insert(0, (xp.float32, 2.0**-24))
    for dtype, unit in ways:
        if bool(xp.any(_logit_error(ask, unit) <= TRY * ask.limit)):
            products = DeviceProducts(ask, dtype, unit)
            products.run()
            found = products.moments()
            right = products.error(found) <= ask.limit
            if unit == ROUND_64:
                right = right & (products.certified(found) <= max(CERTAIN, ask.limit))
            if bool(xp.all(right)) or unit == ROUND_64:
                return found, right
    return None, xp.zeros(ask.alpha.shape, dtype=xp.bool, device=ask.alpha.device)


def _logit_error(ask: Ask, unit: float) -> Array:
    """Estimate the error of logits from products, (B,): the usual one, not the worst."""
    xp, index, steep = ask.xp, ask.index, ask.alpha / ask.spread
    growth = 0.25 + 4.0 / math.sqrt(ask.components.dim)  # a sum of many random roundings, and a few of the whole
    error = growth * unit * steep * index.typical * (ask.length + ask.alpha * index.typical)
    fits = steep * ask.length * max(index.radius, 1.0) < SINGLE
    return xp.where(fits, error, xp.full_like(error, math.inf))


@dataclass
class _Sums:
    """Sums over components, weighted by exp(logit - top), about the centre."""

    top: Array  # (B,)
    mass: Array  # (B,)
    crowd: Array  # (B,) of the weights themselves
    square: Array  # (B,) of |v|^2
    vector: Array  # (B, d) of v
    diagonal: Array  # (B, d | 0) of v_j^2
    product: Array  # (B, p, d) of (v . probe) v
    dense: Array  # (B, d | 0, d) of v v^T


class DeviceProducts:
    """Moments of a block of queries by products in one dtype."""

    def __init__(self, ask: Ask, dtype: Any, unit: float) -> None:
        self.ask, self.xp, self.index, self.dtype, self.unit = ask, ask.xp, ask.index, dtype, unit
        xp, (count, dim) = ask.xp, ask.queries.shape
        probes = 0 if ask.probes is None else ask.probes.shape[2]
        wanted = {"diagonal": dim if "diagonal" in ask.want else 0, "dense": dim if "dense" in ask.want else 0}

        def zeros(*shape: int) -> Array:
            return xp.zeros((count, *shape), dtype=ask.index.dtype, device=ask.queries.device)

        self.steep = xp.astype((ask.alpha / ask.spread)[:, None] * ask.p, dtype)
        still = xp.zeros_like(ask.alpha)
        self.law = Law(xp.ones_like(still), 0.5 * ask.alpha**2 / ask.spread, still, still)  # errors are estimated below
        self.rows = zeros(0, dim) if ask.probes is None else xp.matrix_transpose(ask.probes)  # (B, p, d)
        # Weights that single precision could not hold as normal numbers are left out, too.
        most = 80.0 if unit > ROUND_64 else 690.0
        self.cut = xp.minimum(ask.cut, xp.full_like(ask.cut, most))
        self.omitted = ask.components.count * xp.exp(-self.cut)
        top = xp.full_like(ask.alpha, -math.inf)
        sums = (zeros(), zeros(), zeros(), zeros(dim), zeros(wanted["diagonal"]), zeros(probes, dim))
        self.sums = _Sums(top, *sums, zeros(wanted["dense"], dim))
        columns = max(1, probes, wanted["dense"])
        self.tile = max(16, room(PRODUCT) // (count * columns))

    def run(self) -> None:
        """Sum over all components."""
        for start in range(0, self.ask.components.count, self.tile):
            self._add(start, min(start + self.tile, self.ask.components.count))

    def _add(self, start: int, stop: int) -> None:
        xp, index = self.xp, self.index
        points, norms = index.centred(start, stop, self.dtype), index.norms[start:stop]
        products = xp.matmul(self.steep, points.T)
        tile = Tile(start, products, norms, index.log_weights[start:stop], self.law)
        top = xp.maximum(self.sums.top, largest_logit(tile))
        safe = xp.where(top == -math.inf, xp.zeros_like(top), top)
        weights, *sums = weights_and_sums(tile, safe, self.cut)
        self._scale(xp.exp(xp.where(self.sums.top == -math.inf, xp.zeros_like(top), self.sums.top - safe)))
        self.sums.top = top
        self._accumulate(weights, sums, points)

    def _scale(self, factor: Array) -> None:
        """Measure what was summed beside the new largest weight."""
        sums = self.sums
        sums.mass, sums.crowd, sums.square = sums.mass * factor, sums.crowd * factor**2, sums.square * factor
        sums.vector, sums.diagonal = sums.vector * factor[:, None], sums.diagonal * factor[:, None]
        sums.product, sums.dense = sums.product * factor[:, None, None], sums.dense * factor[:, None, None]

    def _accumulate(self, weights: Array, scalars: list[Array], points: Array) -> None:
        xp, sums, dtype = self.xp, self.sums, self.index.dtype
        sums.mass, sums.crowd, sums.square = (
            total + part for total, part in zip((sums.mass, sums.crowd, sums.square), scalars, strict=True)
        )
        if not self.ask.want:
            return
        sums.vector = sums.vector + xp.astype(xp.matmul(weights, points), dtype)
        if "diagonal" in self.ask.want:
            sums.diagonal = sums.diagonal + xp.astype(xp.matmul(weights, points**2), dtype)
        if "product" in self.ask.want:
            along = xp.matmul(xp.astype(self.rows, self.dtype), points.T) * weights[:, None, :]
            sums.product = sums.product + xp.astype(xp.matmul(along, points), dtype)
        if "dense" in self.ask.want:
            spread = points.T[None, :, :] * weights[:, None, :]
            sums.dense = sums.dense + xp.astype(xp.matmul(spread, points), dtype)

    def moments(self) -> Moments:
        """Return the moments; `between` is centred here, which `error` watches."""
        xp, ask, sums = self.xp, self.ask, self.sums
        constant = 0.5 * (ask.length**2 / ask.spread + ask.components.dim * (xp.log(ask.spread) + LOG_2PI))
        log_mass, still = sums.top + xp.log(sums.mass) - constant, xp.zeros_like(sums.mass)
        logit_error = self._worst_logit_error()
        if not ask.want:
            return Moments(log_mass, still, None, None, Second(), Second(), self.omitted, logit_error, still, still)
        slope = ask.slope
        between, worst = self._between(slope**2), self._worst_sum_error(slope**2)
        shift = slope[:, None] * self.mean + self._origin_low
        rounding = (self.omitted, logit_error, worst, still)
        return Moments(log_mass, still, self._origin, shift, ask.within(), between, *rounding)

    @cached_property
    def mean(self) -> Array:
        """E[v], (B, d)."""
        return self.sums.vector / self.sums.mass[:, None]

    @cached_property
    def variance(self) -> Array:
        """Total variance of v under the weights, (B,)."""
        found = self.sums.square / self.sums.mass - self.xp.sum(self.mean**2, axis=1)
        return self.xp.where(found > 0.0, found, self.xp.zeros_like(found))

    @cached_property
    def _origin(self) -> Array:
        ask = self.ask
        if ask.space == "score":
            return -ask.p / ask.spread[:, None]
        return self._origin_in_two_terms[0]

    @cached_property
    def _origin_low(self) -> Any:
        """What rounding took from it: far from the origin, the means of two parts of the data differ by less."""
        return 0.0 if self.ask.space == "score" else self._origin_in_two_terms[1]

    @cached_property
    def _origin_in_two_terms(self) -> tuple[Array, Array]:
        ask, variance = self.ask, self.ask.components.variances[0, 0, 0]
        levels = (ask.alpha[:, None], ask.sigma[:, None])
        return double.posterior_mean(ask.queries, *levels, variance, self.index.centre[None, :], ask.p)

    def _between(self, factor: Array) -> Second:
        xp, sums, want, mean = self.xp, self.sums, self.ask.want, self.mean
        unit = factor / sums.mass
        product = dense = None
        if "product" in want:
            along = xp.matmul(mean[:, None, :], self.ask.probes)
            product = xp.matrix_transpose(sums.product) * unit[:, None, None]
            product = product - factor[:, None, None] * mean[:, :, None] * along
        if "dense" in want:
            dense = unit[:, None, None] * sums.dense - factor[:, None, None] * mean[:, :, None] * mean[:, None, :]
            dense = 0.5 * (dense + xp.matrix_transpose(dense))
        return Second(
            trace=factor * self.variance if "trace" in want else None,
            diagonal=unit[:, None] * sums.diagonal - factor[:, None] * mean**2 if "diagonal" in want else None,
            product=product,
            dense=dense,
        )

    def error(self, moments: Moments) -> Array:
        """Estimate the relative error of the results, (B,); see `dfmath.backends.products.Products.error`."""
        xp, ask, unit, mass = self.xp, self.ask, self.unit, self.sums.mass
        logit = _logit_error(ask, unit)
        if not ask.want:
            return logit / xp.maximum(xp.abs(moments.log_mass), xp.ones_like(mass))
        square, tiny = self.sums.square / mass, xp.full_like(mass, 1e-300)
        logit = logit * xp.sqrt(self.sums.crowd) / mass
        logit = logit + unit * ask.length * ask.alpha / ask.spread * xp.sqrt(self.variance)
        first = (logit * xp.sqrt(self.variance) + unit * xp.sqrt(square)) * ask.slope
        first = first + ROUND_64 * xp.linalg.vector_norm(self._origin, axis=1)
        first = first / xp.maximum(xp.linalg.vector_norm(moments.mean, axis=1), tiny)
        if ask.want <= {"mean"}:
            return first
        counted = xp.full_like(mass, float(ask.covariance)) + xp.astype(self.cut < ask.cut, mass.dtype)
        lost = xp.where(counted > 0.0, self.omitted, xp.zeros_like(mass)) * (2.0 * self.index.radius) ** 2
        return xp.maximum(first, self._second_error(logit, square, lost))

    def _second_error(self, logit: Array, square: Array, lost: Array) -> Array:
        """Relative errors of the forms of F or P: of its value along each probe, its trace, or any entry."""
        xp, ask, dim, variance, unit = self.xp, self.ask, self.ask.components.dim, self.variance, self.unit
        scale, tiny, found = ask.spread / ask.alpha**2, xp.full_like(logit, 1e-300), xp.zeros_like(logit)
        score = ask.space == "score"
        whole = logit * variance + 2.0 * unit * square + lost
        size = xp.abs(dim * scale - variance) if score else variance
        if "trace" in ask.want:
            found = whole / xp.maximum(size, tiny)
        if ask.want & {"diagonal", "dense"}:  # where single entries may be far below the trace
            found = xp.maximum(found, whole / xp.maximum(size / (dim if score else 10.0), tiny))
        if "product" in ask.want:
            raw, centred = self._along()
            error = logit[:, None] * xp.sqrt(variance[:, None] * centred) + unit * xp.sqrt(square[:, None] * raw)
            beside = xp.abs(scale[:, None] - centred) if score else centred
            worst = xp.max((error + lost[:, None]) / xp.maximum(beside, xp.full_like(beside, 1e-300)), axis=1)
            found = xp.maximum(found, worst)
        return found

    def _along(self) -> tuple[Array, Array]:
        """E[(v . u)^2] and its centred value along each probe's direction u, (B, p)."""
        xp, rows = self.xp, self.rows
        length = xp.sum(rows**2, axis=2)
        length = xp.maximum(length, xp.full_like(length, 1e-300))
        raw = xp.sum(rows * self.sums.product, axis=2) / self.sums.mass[:, None]
        mean = xp.sum(rows * self.mean[:, None, :], axis=2)
        nothing = xp.zeros_like(raw)
        return xp.maximum(raw, nothing) / length, xp.maximum(raw - mean**2, nothing) / length

    def certified(self, moments: Moments) -> Array:
        """Bound the relative error of any form of Cov beside I/S or, in posterior space, beside tr Cov, (B,)."""
        if not self.ask.want:
            return moments.logit_error
        xp, slope = self.xp, self.ask.slope
        size = 1.0 / self.ask.spread if self.ask.space == "score" else slope**2 * self.variance
        return xp.maximum(moments.logit_error, moments.sum_error / xp.maximum(size, xp.full_like(size, 1e-300)))

    def _worst_logit_error(self) -> Array:
        """Bound the errors of all logits, (B,)."""
        ask, index, dim, unit = self.ask, self.index, self.ask.components.dim, self.unit
        reach = ask.length + ask.alpha * index.radius
        product = ask.alpha * ask.length * index.radius * gamma(dim + 8, unit)
        last = 8.0 * ROUND_64 * (abs(math.log(ask.components.count)) + 700.0)
        return (product + gamma(dim + 32, ROUND_64) * reach**2) / ask.spread + last

    def _worst_sum_error(self, factor: Array) -> Array:
        """Bound what rounding in the sums over components did to the centred second moments, (B,)."""
        length = gamma(self.ask.components.dim, self.unit) + 3.0 * gamma(self.tile, self.unit) + 32.0 * self.unit
        return length * factor * self.sums.square / self.sums.mass
