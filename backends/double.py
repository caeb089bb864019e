"""Two-term arithmetic: a number as the unevaluated sum high + low, about twice as precise as its dtype.

At low noise the logits |x - alpha y|^2/(2 S) are huge and only their differences matter: rounding them at eps |x|^2/S
would turn weights into noise [MATH 4.9]. Two-term sums keep those differences, in float64 and, on devices that have
nothing better, in float32. The building blocks are Dekker's and Knuth's; each is exact.
"""

from __future__ import annotations

from dfmath.backends._compat import Array, array_namespace


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return (s, e) with s = fl(a + b) and s + e = a + b exactly."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """Return (p, e) with p = fl(a b) and p + e = a b exactly."""
    p = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def _split(a: Array) -> tuple[Array, Array]:
    """Cut the significand in half, so that products of halves are exact."""
    bits = 27 if array_namespace(a).finfo(a.dtype).eps < 1e-10 else 12
    c = a * float(2**bits + 1)
    high = c - (c - a)
    return high, a - high


def residual(x: Array, alpha: Array, y: Array) -> tuple[Array, Array]:
    """Return x - alpha y as a two-term number."""
    product, product_low = two_product(alpha, y)
    r, r_low = two_sum(x, -product)
    return two_sum(r, r_low - product_low)


def quotient(x: Array, alpha: Array) -> tuple[Array, Array]:
    """Return x / alpha as a two-term number."""
    q = x / alpha
    return q, residual(x, alpha, q)[0] / alpha


def posterior_mean(
    x: Array, alpha: Array, sigma: Array, variance: Array, centre: Array, r: Array
) -> tuple[Array, Array]:
    """Return mu + (alpha c/S) r in two terms, with r = x - alpha mu; all broadcast.

    It is x/alpha - (sigma^2/(alpha S)) r, too. What is added to the first term is rounded, so the one with less to add
    is taken: of a wide component at low noise the mean is all but x/alpha, of a narrow one it is all but mu.
    """
    xp, spread = array_namespace(r), alpha**2 * variance + sigma**2
    near_query = xp.broadcast_to(sigma**2 < alpha**2 * variance, r.shape)
    q, q_low = quotient(x, alpha)
    origin = xp.where(near_query, xp.broadcast_to(q, r.shape), xp.broadcast_to(centre, r.shape))
    slope = xp.where(near_query, -(sigma**2) / (alpha * spread), alpha * variance / spread)
    high, low = two_sum(origin, slope * r)
    return high, low + xp.where(near_query, xp.broadcast_to(q_low, r.shape), xp.zeros_like(r))


def squared_norm(r: Array, r_low: Array) -> tuple[Array, Array]:
    """Return |r + r_low|^2 over the last axis as a two-term number."""
    square, square_low = two_product(r, r)
    return _sum_last(square, square_low + 2.0 * r * r_low)


def _sum_last(high: Array, low: Array) -> tuple[Array, Array]:
    """Sum two-term numbers over the last axis by halving."""
    xp = array_namespace(high)
    while (n := high.shape[-1]) > 1:
        half = n // 2
        total, error = two_sum(high[..., :half], high[..., half : 2 * half])
        error = error + low[..., :half] + low[..., half : 2 * half]
        high = xp.concat([total, high[..., 2 * half :]], axis=-1)
        low = xp.concat([error, low[..., 2 * half :]], axis=-1)
    return two_sum(high[..., 0], low[..., 0])


def scale(high: Array, low: Array, factor: Array) -> tuple[Array, Array]:
    """Return a two-term number times a plain one."""
    product, error = two_product(high, factor)
    return two_sum(product, error + low * factor)


def logit(log_weights: Array, constant: Array, half: Array, half_low: Array) -> tuple[Array, Array]:
    """Return log weight - constant + half in two terms; -inf where the log weight is, which sums are not made for."""
    xp = array_namespace(half)
    log_weights = xp.broadcast_to(log_weights, half.shape)
    weightless = log_weights == -xp.inf
    start, start_low = two_sum(xp.where(weightless, xp.zeros_like(half), log_weights), -constant)
    high, error = two_sum(start, half)
    return xp.where(weightless, log_weights, high), half_low + (error + start_low)
