"""Moments over a few listed components of each query, from differences, in fused kernels.

With one variance for all components u_k - u_a is a multiple of y_k - y_a, so sums of w (y - a) and of its products are
all that is needed; a is the heaviest component. Centring afterwards is safe there: |E[v]|^2 <= (1 - w_a) E|v|^2 along
every direction, so that no more than a factor of w_a, at least 1/L, is lost of L components.
"""

from __future__ import annotations

import math

from dfmath.backends import cuda, cuda_passes, double
from dfmath.backends._compat import Array
from dfmath.backends.array_api import softmax
from dfmath.backends.components import LOG_2PI
from dfmath.backends.device_request import Ask
from dfmath.backends.moments import Moments, Second


def among_few(ask: Ask, listed: Array) -> Moments:
    """Return moments over listed components (B, L), -1 where there is none; ``dense`` is not among the forms."""
    xp, listed, points = ask.xp, cuda.contiguous(listed), cuda.contiguous(ask.index.points)
    logits, low = _logits(ask, points, listed)
    heaviest = xp.argmax(logits, axis=1)[:, None]
    log_mass, log_mass_low, weights = softmax(logits, low, heaviest)
    still = xp.zeros_like(log_mass)
    certified = (still, still, still, xp.astype(xp.sum(xp.astype(listed >= 0, xp.int64), axis=1), still.dtype))
    if not ask.want:
        return Moments(log_mass, log_mass_low, None, None, Second(), Second(), *certified)
    chosen = cuda.contiguous(xp.take_along_axis(listed, heaviest, axis=1)[:, 0])
    few = (points, listed, chosen)
    first, second = cuda_passes.sums_of_offsets(*few, weights)
    anchor, anchor_low = _anchor(ask, points, chosen)
    shift = ask.slope[:, None] * first + anchor_low
    between = _between(ask, first, second, few, weights)
    return Moments(log_mass, log_mass_low, anchor, shift, ask.within(), between, *certified)


def _logits(ask: Ask, points: Array, listed: Array) -> tuple[Array, Array]:
    """Logits (B, L) in two terms, -inf where the list holds none."""
    xp, dtype = ask.xp, ask.index.dtype
    queries, alpha = cuda.contiguous(xp.astype(ask.queries, dtype)), cuda.contiguous(ask.alpha)
    square, square_low = cuda_passes.squared_distances(queries, alpha, points, listed)
    half, half_low = double.scale(square, square_low, (-0.5 / ask.spread)[:, None])
    logs = ask.index.log_weights[xp.where(listed >= 0, listed, xp.zeros_like(listed))]
    constant = 0.5 * ask.components.dim * (xp.log(ask.spread) + LOG_2PI)[:, None]
    return double.logit(xp.where(listed >= 0, logs, xp.full_like(logs, -math.inf)), constant, half, half_low)


def _anchor(ask: Ask, points: Array, chosen: Array) -> tuple[Array, Array]:
    """The vector u of chosen components (B,) in two terms, (B, d) each."""
    xp, y = ask.xp, ask.xp.astype(points[chosen], ask.index.dtype)
    residual = double.residual(ask.queries, ask.alpha[:, None], y)[0]
    if ask.space == "score":
        found = -residual / ask.spread[:, None]
        return found, xp.zeros_like(found)
    return double.posterior_mean(
        ask.queries, ask.alpha[:, None], ask.sigma[:, None], ask.components.variances[0, 0, 0], y, residual
    )


def _between(ask: Ask, first: Array, second: Array, few: tuple[Array, Array, Array], weights: Array) -> Second:
    """Cov[u] in the wanted forms, from the sums of w (y - a) and w (y - a)^2."""
    xp, factor = ask.xp, ask.slope**2
    diagonal = factor[:, None] * xp.maximum(second - first**2, xp.zeros_like(first))
    product = None
    if "product" in ask.want:
        along = cuda_passes.along_probes(*few, cuda.contiguous(xp.astype(ask.probes, weights.dtype)))
        centred = along - xp.matmul(weights[:, None, :], along)
        product = factor[:, None, None] * cuda_passes.sums_of_products(*few, weights[:, :, None] * centred)
    return Second(
        trace=xp.sum(diagonal, axis=1) if "trace" in ask.want else None,
        diagonal=diagonal if "diagonal" in ask.want else None,
        product=product,
    )
