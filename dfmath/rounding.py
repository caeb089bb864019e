"""Certified errors of computed moments: what tolerance left out, and what rounding did [MATH 4.8-4.9]."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dfmath.backends._compat import Array, array_namespace, from_numpy, to_numpy
from dfmath.backends.components import LOG_2PI, Components
from dfmath.backends.moments import Moments, Space
from dfmath.backends.precision import limit, plain_logit_error, two_term_roundings
from dfmath.bounds import dropped_components, weight_factor

if TYPE_CHECKING:
    from dfmath.marginal import Marginal

_CUT = 80.0  # components lighter than exp(-80)/N of the total: their joint mass, 1e-35, is counted as left out


@dataclass(frozen=True)
class Extent:
    """How large the components are: all that the bounds need to know of them."""

    radius: float  # largest |mu_k - centre|
    offset: float  # |centre|
    log_weight: float  # largest log pi_k
    least_log_weight: float  # and smallest of those that are not zero
    low: float  # smallest and
    high: float  # largest eigenvalue of any C_k
    spherical: bool  # no rotation adds rounding
    common: bool  # all C_k are one multiple of I
    turned: float  # how far rounding may have moved any C_k that was decomposed into eigenvectors


def extent(components: Components) -> Extent:
    """Measure the components: two passes over the centres."""
    middle: Any = sum(components.each(_sum_of_centres)) / components.count
    radius, log_weight, less = (max(values) for values in zip(*components.each(_farthest, middle), strict=True))
    low, high = components.variance_range()
    return Extent(
        radius=radius,
        offset=float(np.linalg.norm(middle)),
        log_weight=log_weight,
        least_log_weight=-less,
        low=low,
        high=high,
        spherical=components.form == "diagonal",
        common=components.common,
        turned=4 * components.dim * float(np.finfo(middle.dtype).eps) * high if components.form == "full" else 0.0,
    )


def _centre_tiles(part: Components) -> Iterator[Array]:
    dtype, step = part.log_weights.dtype, max(1, 2**22 // part.dim)
    for start in range(0, part.count, step):
        yield part.tile(start, min(start + step, part.count), dtype).centres[0, ...]


def _sum_of_centres(part: Components) -> Any:
    """Sum of the centres, (d,), on the host."""
    return sum(to_numpy(array_namespace(c).sum(c, axis=0)) for c in _centre_tiles(part))


def _farthest(part: Components, middle: Any) -> tuple[float, float, float]:
    """Largest distance of a centre from the middle, largest log-weight, and largest of minus the finite ones."""
    squares = (array_namespace(c).sum((c - from_numpy(middle, c)) ** 2, axis=1) for c in _centre_tiles(part))
    radius = math.sqrt(max(float(to_numpy(array_namespace(s).max(s))) for s in squares))
    logs, xp = part.log_weights, array_namespace(part.log_weights)
    less = xp.where(logs > -math.inf, -logs, xp.full_like(logs, -math.inf))
    return radius, float(to_numpy(xp.max(logs))), float(to_numpy(xp.max(less)))


def numerical_error(marginal: Marginal, x: Array, moments: Moments, space: Space, dtype: Any) -> Array:
    """Bound the spectral norm of the error of E[G] -+ Cov[u] (B,), given its computed traces.

    With h the worst relative error of a weight, Cov of perturbed weights lies between (1 - h) Cov and (1 + h) Cov in
    the order of symmetric matrices, because E|u - c|^2 is smallest at the mean; so rounding in the logits costs at
    most h (|Cov| + max |G|), with no diameter in it. Vectors that are off by v change a covariance by at most
    2 v sqrt(tr Cov) + v^2 (Minkowski). Left-out mass delta costs delta (D^2 + range of G) [MATH 4.8].
    """
    xp = array_namespace(moments.log_mass)
    size, alpha, sigma = extent(marginal.components), marginal.alpha, marginal.sigma
    largest = _largest_matrix(size, alpha, sigma, space)
    turn = _turn(size, alpha, sigma)
    root = xp.sqrt(_reach(size, marginal, moments.log_mass))
    differences = _logit_error(marginal, size, x, moments, limit(marginal.precision(dtype)))
    by_products = (moments.logit_error > 0) & (moments.exact == 0)
    logit_error = xp.where(by_products, moments.logit_error, xp.maximum(moments.logit_error, differences))
    logit_error = logit_error + 0.5 * turn * (root**2 + marginal.dim)
    factor = weight_factor(logit_error)
    h = factor - 1.0
    delta = (moments.omitted + math.exp(-_CUT)) * factor  # what was light by logits that are off
    delta = xp.where(delta < 1.0, delta, xp.ones_like(delta))
    spread = _vector_diameter(size, marginal, moments, space)
    covariance: Array = moments.between.trace
    _, dropped = dropped_components(delta, spread)
    unit = float(xp.finfo(covariance.dtype).eps)
    sums = unit * (marginal.dim + 2 * math.log2(marginal.components.count + 1) + 16)
    result = float(xp.finfo(dtype).eps) * (largest + covariance)
    off = _vector_error(size, marginal, root, turn, space)
    moved = (2.0 * xp.sqrt(covariance) + off) * off
    if size.turned > 0.0:
        moved = moved + turn * (largest if space == "score" else (sigma / alpha) ** 2)
    spoilt = covariance if size.common else covariance + largest  # one L for all does not depend on weights
    weights = xp.where(spoilt > 0, h, xp.zeros_like(h)) * spoilt
    if size.common:  # no two covariances of vectors within this diameter differ by more than the largest of any
        weights = xp.minimum(weights, dropped_components(xp.ones_like(delta), spread)[1])
    bound = dropped + delta * largest + weights + sums * (covariance + largest) + moved + result + moments.sum_error
    return xp.where(bound <= float(xp.finfo(dtype).max), bound, xp.full_like(bound, math.inf))


def _turn(size: Extent, alpha: Array, sigma: Array) -> Array:
    """Bound the relative change, in the order of symmetric matrices, of L_k = S_k^-1 when C_k moves by `turned`."""
    xp = array_namespace(alpha)
    part = alpha**2 * size.turned / (alpha**2 * size.low + sigma**2)
    return part / xp.where(part < 1, 1.0 - part, xp.full_like(part, 1e-30))  # beyond 1 no digit is sure


def _vector_error(size: Extent, marginal: Marginal, root: Array, turn: Array, space: Space) -> Array:
    """Bound the error of a difference u_k - u_j of components that matter; `root` is the largest |L^1/2 r| of any.

    Differences of data points are right to their own last digit, which the bound on sums covers.
    """
    alpha, sigma = marginal.alpha, marginal.sigma
    xp = array_namespace(root)
    unit = float(xp.finfo(root.dtype).eps)
    low = xp.sqrt(alpha**2 * size.low + sigma**2)
    high = xp.sqrt(alpha**2 * size.high + sigma**2)
    residual = _residual_error(size, marginal, root * high)
    if space == "score":
        return 4.0 * residual / low**2 + 2.0 * turn * root / low
    if size.high == 0.0:
        return xp.zeros_like(root)
    gain = alpha * size.high / (alpha**2 * size.high + sigma**2)
    return 4.0 * (gain * residual + unit * size.radius) + 2.0 * turn * sigma**2 / alpha * root / low


def _residual_error(size: Extent, marginal: Marginal, residual: Array) -> Array:
    """Bound the error of a vector linear in r = x - alpha mu, beside the matrix's norm, for |r| up to `residual`."""
    unit = float(array_namespace(residual).finfo(residual.dtype).eps)
    if size.common:  # the product alpha mu is kept in two terms, or never formed
        return unit * residual
    length = (1 if size.spherical else 2 * marginal.dim) * unit
    return length * (marginal.alpha * (size.offset + size.radius) + residual)


def _largest_matrix(size: Extent, alpha: Array, sigma: Array, space: Space) -> Array:
    """Largest eigenvalue any G_k can have: of L_k in score space, of P_k in posterior space."""
    if space == "score":
        return 1.0 / (alpha**2 * size.low + sigma**2)
    return sigma**2 * size.high / (alpha**2 * size.high + sigma**2)


def _reach(size: Extent, marginal: Marginal, log_mass: Array) -> Array:
    """Bound q = r^T L r of every component with more than exp(-_CUT)/N of the weight, from its logit's definition."""
    low = marginal.alpha**2 * size.low + marginal.sigma**2
    xp = array_namespace(low)
    constant = size.log_weight - 0.5 * marginal.dim * (LOG_2PI + xp.log(low))
    reach = 2.0 * (constant - log_mass + _CUT + math.log(marginal.components.count))
    return xp.where(reach > 0, reach, xp.zeros_like(reach))


def _logit_error(marginal: Marginal, size: Extent, x: Array, moments: Moments, allowed: float) -> Array:
    """Bound the rounding error of the logits that matter.

    By plain differences |dr| <= u (alpha |mu| + |r|), and a sum of d squares is off by at most d u. Where the backends
    find errors above `allowed` they keep two terms; then the last step, exp of a difference, rounds, and what two terms
    leave out.
    """
    log_mass = moments.log_mass
    xp = array_namespace(log_mass)
    unit = float(xp.finfo(log_mass.dtype).eps)
    low = xp.sqrt(marginal.alpha**2 * size.low + marginal.sigma**2)
    high = xp.sqrt(marginal.alpha**2 * size.high + marginal.sigma**2)
    reach = _reach(size, marginal, log_mass)
    root = xp.sqrt(reach)
    length = (1 if size.spherical else 2 * marginal.dim) * unit
    difference = length * (marginal.alpha * (size.offset + size.radius) + root * high) / low
    square = 2.0 * root * difference + difference**2 + (marginal.dim + 8) * unit * reach
    logs = max(abs(size.log_weight), abs(size.least_log_weight))
    plain = 0.5 * square + unit * (xp.abs(log_mass) + logs + marginal.dim * xp.abs(xp.log(low)))
    if not size.common:
        return plain
    distance = _norm(x) / low
    spread = size.log_weight - size.least_log_weight
    nearest = reach - 2.0 * (_CUT + math.log(marginal.components.count) + spread)  # no logit is above log q
    nearest = xp.where(nearest > 0, nearest, xp.zeros_like(reach))
    # The margin is for rounding of the backends' own estimate.
    estimate = plain_logit_error(nearest, distance, unit, marginal.dim)
    refined = _last_step(size, marginal, unit) + _two_term_error(marginal, moments, reach, distance)
    return xp.where(estimate > 1.02 * allowed, xp.minimum(plain, refined), plain)


def _last_step(size: Extent, marginal: Marginal, unit: float) -> float:
    """Bound what exp of a difference of logits rounds, and the logarithms of weights where these differ."""
    spread = size.log_weight - size.least_log_weight
    own = 2.0 * spread + max(abs(size.log_weight), abs(size.least_log_weight)) if spread > 0 else 0.0
    return (_CUT + math.log(marginal.components.count) + 8.0 + own) * unit


def _two_term_error(marginal: Marginal, moments: Moments, reach: Array, distance: Array) -> Array:
    """Bound the error of logits log pi - |r|^2/(2 S) that are kept in two terms [MATH 4.9].

    With u the unit roundoff, Q = |r|^2/S, r = x - alpha mu, and `distance` |x|/sqrt(S):

    - x - p and p = alpha mu are exact in two terms each; adding the second ones rounds u (u |x - p| + u |p|), together
      at most u^2 (2 |r| + |x|), which moves Q/2 by u^2 (2 Q + sqrt(Q) |x|/sqrt(S));
    - the sum of squares is off by `two_term_roundings` u^2 Q/2;
    - two masses are added, and compared, in two terms that are made disjoint: 5 u^2 |log q| each time, and that is not
      more often than there are components looked at.
    """
    xp = array_namespace(reach)
    square = (0.5 * float(xp.finfo(reach.dtype).eps)) ** 2
    residual = 2.0 * reach + xp.sqrt(reach) * distance
    merged = 5.0 * (moments.exact + 1.0) * xp.abs(moments.log_mass)
    return square * (residual + 0.5 * two_term_roundings(marginal.dim) * reach + merged)


def _norm(x: Array) -> Array:
    xp = array_namespace(x)
    return xp.sqrt(xp.sum(x**2, axis=1))


def _vector_diameter(size: Extent, marginal: Marginal, moments: Moments, space: Space) -> Array:
    """Bound |u_i - u_j| over the components; for one common variance the centres' diameter, scaled, else from |r|."""
    alpha, sigma = marginal.alpha, marginal.sigma
    low = alpha**2 * size.low + sigma**2
    if size.common:
        return 2.0 * size.radius * (alpha / low if space == "score" else sigma**2 / low)
    xp = array_namespace(moments.log_mass)
    reach = _reach(size, marginal, moments.log_mass)
    nearest = xp.sqrt(reach * (alpha**2 * size.high + sigma**2))
    residual = nearest + 2.0 * alpha * size.radius  # every |r_k| is within a diameter of the nearest one
    if space == "score":
        return 2.0 * residual / low
    return 2.0 * size.radius + 2.0 * alpha * size.high / (alpha**2 * size.high + sigma**2) * residual
