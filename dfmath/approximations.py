"""The diffusion Fisher where there is only a network: traces and products from its outputs [MATH 4.1-4.7].

Formulas alone; how far each is off is in `dfmath.bounds`. They are written as F = (I - S)/sigma^2 with
S = (alpha^2/sigma^2) P, because 1/sigma^4 overflows at a sigma where F itself does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfmath import _checks
from dfmath.backends import Want
from dfmath.backends._compat import Array, accumulation_dtype, array_namespace, device, from_numpy, to_numpy
from dfmath.backends.moments import Second, combine, outer_product_forms
from dfmath.operators import SymmetricOperator

__all__ = [
    "EndpointFisher",
    "GaussianFisher",
    "TraceEstimate",
    "hutchinson_trace",
    "hutchpp_trace",
    "local_loss_trace",
    "trace_matching",
]

DISTRIBUTIONS = ("rademacher", "gaussian")
VARIANTS = ("paper", "centred", "calibrated")

_CHUNK = 2**22  # elements of a block of probes
# Streams of random numbers; samples of priors and marginals have 0 and 1, and probes must not depend on them.
_HUTCHINSON, _SKETCH, _REST = 2, 3, 4

Matrices = SymmetricOperator | Callable[[Array], Array]


@dataclass(frozen=True)
class TraceEstimate:
    """A stochastic estimate of the traces of B matrices.

    Attributes
    ----------
    value
        (B,) unbiased.
    standard_error
        (B,) of `value`, from the spread of the samples (n - 1 in the denominator).
    products
        How many products of a matrix with a vector each row cost.
    """

    value: Array
    standard_error: Array
    products: int


def trace_matching(second_moment: Array, mean: Array, alpha: float | Array, sigma: float | Array) -> Array:
    r"""Return tr F from a network that predicts the posterior second moment [MATH 4.1; paper, Alg. 1, DF-TM].

    .. math:: T = \frac{d}{\sigma^2} - \frac{\alpha^2}{\sigma^4} \big(d\, t_\theta - |m_\theta|^2\big)

    Its error is bounded by `bounds.trace_matching_error`; at small sigma the two terms nearly cancel, and
    `local_loss_trace` does not have them.

    Parameters
    ----------
    second_moment
        (B,) t_th, the estimate of E[abs(x0)^2 given x]/d.
    mean
        (B, d) m_th, the estimate of the posterior mean.
    alpha, sigma
        Noise level: scalars, or (B,).

    Returns
    -------
    Array
        (B,) in the dtype of `mean`.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes, namespaces, devices or values do not fit.
    """
    m, alpha, sigma = _mean_and_noise(mean, alpha, sigma)
    t = _per_row("second_moment", second_moment, mean.shape[0], {"mean": mean})
    xp, dim = array_namespace(m), m.shape[1]
    shrinkage = (alpha / sigma) ** 2 * (dim * t - xp.sum(m * m, axis=1))
    return xp.astype((dim - shrinkage) / sigma**2, mean.dtype, copy=False)


def local_loss_trace(loss: Array, sigma: float | Array, dim: int) -> Array:
    r"""Return tr F from a network that predicts the local denoising loss [MATH 4.3, new].

    .. math:: T = (d - l_\theta)/\sigma^2, \qquad l = E[|\epsilon - \epsilon_\theta|^2 \mid x]

    The target of the regression is the sample's own denoising loss, of order d at every noise level. Off by
    abs(eps_th - eps*)^2/sigma^2 even for the exact l: second order where `trace_matching` is first order. Its
    error is bounded by `bounds.local_loss_error`.

    Parameters
    ----------
    loss
        (B,) l_th, summed over the d dimensions, not averaged.
    sigma
        Noise level: a scalar, or (B,).
    dim
        Dimension d.

    Returns
    -------
    Array
        (B,) in the dtype of `loss`.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes, namespaces, devices or values do not fit.
    """
    _checks.real_array("loss", loss, "(B,)", 1)
    dim = _checks.positive_integer("dim", dim)
    _checks.finite_rows("loss", loss)
    level = _noise("sigma", sigma, loss.shape[0], {"loss": loss})
    xp = array_namespace(loss)
    return xp.astype((dim - xp.astype(loss, level.dtype)) / level**2, loss.dtype, copy=False)


def hutchinson_trace(
    matvec: Matrices, like: Array, probes: int, seed: int, distribution: str = "rademacher"
) -> TraceEstimate:
    r"""Estimate traces from products with random vectors [MATH 4.7; Hutchinson 1990].

    .. math:: \operatorname{tr} M \approx \frac1n \sum_{j=1}^n v_j^T M v_j

    One sample has the variance `bounds.hutchinson_variance`. Probe j of row b depends on (seed, j, b, d) alone: it
    is the same in every namespace and for every number of rows, and more probes only add to fewer.

    Parameters
    ----------
    matvec
        A `SymmetricOperator`, or a function from (B, d, k) to M_b V_b, (B, d, k). It is called with blocks of
        as many probes as fit in 2^22 numbers. M need not be symmetric.
    like
        (B, d) gives batch, namespace, device and dtype of the probes; its values do not matter.
    probes
        n, at least 2.
    seed
        Of NumPy's PCG64.
    distribution
        ``rademacher`` (smaller variance) or ``gaussian``.

    Returns
    -------
    TraceEstimate
        With n products.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or `matvec` returns another shape than it was given.
    """
    probes = _enough("probes", probes, 2, "a standard error")
    _checks.one_of("distribution", distribution, DISTRIBUTIONS)
    apply = _product(matvec, like)
    blocks = _blocks(like, probes, _checks.random_seed(seed), _HUTCHINSON, distribution)
    samples = [_quadratic(v, apply(v)) for v in blocks]
    return _estimate(samples, 0.0, probes, like)


def hutchpp_trace(
    matvec_block: Matrices, like: Array, probes: int, seed: int, shift: float | Array = 0.0
) -> TraceEstimate:
    r"""Estimate traces of matrices that are nearly of low rank [Meyer, Musco, Musco, Woodruff 2021, Hutch++].

    .. math:: \operatorname{tr} M = \operatorname{tr}(Q^T M Q)
              + \operatorname{tr}\big((I - Q Q^T) M (I - Q Q^T)\big)

    Q spans (M - shift I) S for a random S of n // 3 columns; the first term is computed, the second estimated
    from what is left of the budget, with probes uniform on the sphere of radius sqrt(d - n // 3) in the
    complement. Those make it exact for a multiple of the identity plus a matrix of rank at most n // 3, where
    `shift` is that multiple: 1/sigma^2 for a diffusion Fisher. Where n >= d, Q is the identity and the trace
    is exact after d products.

    Parameters
    ----------
    matvec_block
        A `SymmetricOperator`, or a function from (B, d, k) to M_b V_b, (B, d, k).
    like
        (B, d) gives batch, namespace, device and dtype of the probes; its values do not matter.
    probes
        n, the number of products to spend on each row; at least 4.
    seed
        Of NumPy's PCG64.
    shift
        A scalar or (B,): what multiple of the identity to leave out of the sketch. Any value is unbiased.

    Returns
    -------
    TraceEstimate
        Its standard error is that of the second term, given Q.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or `matvec_block` returns another shape than it was given.
    """
    needs = "one for the sketch, one for the range, two for the rest and its standard error"
    probes, seed = _enough("probes", probes, 4, needs), _checks.random_seed(seed)
    apply, shift = _product(matvec_block, like), _shift(shift, like)
    if probes >= like.shape[1]:
        return _exact(apply, like)
    rank = probes // 3
    basis = _range_of_sketch(apply, _blocks(like, rank, seed, _SKETCH, "gaussian"), shift)
    inside = array_namespace(basis).sum(_quadratic(basis, apply(_as(basis, like))), axis=1)
    rest = (_on_sphere(v, basis, like) for v in _blocks(like, probes - 2 * rank, seed, _REST, "gaussian"))
    return _estimate([_quadratic(v, apply(v)) for v in rest], inside, probes, like)


class EndpointFisher(SymmetricOperator):
    r"""The diffusion Fisher from the end of the trajectory, in two inner products [MATH 4.4, 4.6].

    Let xh be the end of the probability-flow trajectory through x, m the network's posterior mean, u = xh - m:

    .. math:: F v = \frac{v}{\sigma^2} - \frac{\alpha^2}{\sigma^4} P v, \qquad
              P = \begin{cases}
                  \hat x \hat x^T - m m^T & \text{paper (Algorithm 2, DF-EA)} \\
                  u u^T & \text{centred} \\
                  \tau\, u u^T/|u|^2 & \text{calibrated}
              \end{cases}

    ``paper`` is computed as (u (xh + m)^T + (xh + m) u^T)/2, the same matrix without its cancellation; its
    error is bounded by `bounds.endpoint_error`. ``centred`` has no cross terms and is <= I/sigma^2, as F is.
    ``calibrated`` has the trace of P that it is told, from `trace_matching` or `local_loss_trace`; where u is
    zero and gives no direction, P is (tau/d) I, the average over all directions.

    Parameters
    ----------
    endpoint
        (B, d) xh.
    mean
        (B, d) m, in the namespace, device and dtype of `endpoint`.
    alpha, sigma
        Noise level: scalars, or (B,).
    variant
        ``paper``, ``centred`` or ``calibrated``.
    posterior_trace
        (B,) tau = tr P, zero or positive; for ``calibrated``, and only for it.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes, namespaces, devices or values do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> F = EndpointFisher(np.array([[2.0, 0.0]]), np.array([[1.0, 0.0]]), 1.0, 2.0, "centred")
    >>> F.diagonal()
    array([[0.1875, 0.25  ]])
    """

    def __init__(
        self,
        endpoint: Array,
        mean: Array,
        alpha: float | Array,
        sigma: float | Array,
        variant: str = "paper",
        posterior_trace: Array | None = None,
    ) -> None:
        self.variant = _checks.one_of("variant", variant, VARIANTS)
        m, self.alpha, self.sigma = _mean_and_noise(mean, alpha, sigma)
        xh = _endpoint(endpoint, mean)
        rows, dim = m.shape
        super().__init__(m, (rows, dim, dim), mean.dtype)
        self.endpoint, self.mean = endpoint, mean
        self._u, self._sum = xh - m, xh + m
        if (variant == "calibrated") != (posterior_trace is not None):
            need, came = ("be given", "none") if variant == "calibrated" else ("not be given", "one")
            raise ValueError(f"posterior_trace must {need} for variant {variant!r}, got {came}")
        self.posterior_trace = _posterior_trace(posterior_trace, rows, {"mean": mean})

    def forms(self, want: Want, probes: Array | None = None) -> Second:
        """Return F = (I - S)/sigma^2 in one form, with S = (alpha^2/sigma^2) P."""
        xp = array_namespace(self._home)
        precision = xp.broadcast_to(1.0 / self.sigma**2, (self.shape[0],))
        identity = _identity(precision, self.shape[1], want, probes)
        ratio = xp.broadcast_to(self.alpha / self.sigma, (self.shape[0],))
        return combine([(xp.ones_like(ratio), identity), (-precision, self._shrinkage(ratio, want, probes))])

    def row(self, i: int) -> EndpointFisher:
        """Return the operator of query i alone."""
        trace = None if self.posterior_trace is None else self.posterior_trace[i : i + 1]
        ends, means = self.endpoint[i : i + 1, :], self.mean[i : i + 1, :]
        return EndpointFisher(ends, means, _row(self.alpha, i), _row(self.sigma, i), self.variant, trace)

    def _shrinkage(self, ratio: Array, want: Want, probes: Array | None) -> Second:
        """S = ratio^2 P; vectors are scaled before they are multiplied, so that nothing overflows early."""
        u, both = ratio[:, None] * self._u, ratio[:, None] * self._sum
        if self.variant == "paper":
            return _symmetric_product(u, both, want, probes)
        if self.variant == "centred":
            return outer_product_forms(u, frozenset((want,)), probes)
        return _along(self._u, ratio**2 * self.posterior_trace, want, probes)


class GaussianFisher(SymmetricOperator):
    r"""The diffusion Fisher of Gaussian data with a given covariance, at a given trace [MATH 4.6b, new].

    .. math:: F v = \frac{v}{\sigma^2} - \frac{\alpha^2}{\sigma^4} \kappa P_G v, \qquad
              P_G = \rho^2 C (C + \rho^2 I)^{-1}, \quad C = U \operatorname{diag}(c)\, U^T

    with rho = sigma/alpha. Exact for Gaussian data with kappa = 1. kappa is tr P/tr P_G where tr P is told,
    but at most 1 + rho^2/max c, beyond which kappa P_G <= rho^2 I and F >= 0 would end; it is 1 where tr P is
    not told, or C = 0.

    Parameters
    ----------
    covariance_eigenvalues
        (r,) c, zero or positive; gives namespace, device and dtype.
    basis
        U (d, r) with orthonormal columns, the other d - r directions having no variance; or None where C is
        diagonal in the coordinates themselves and d = r. That the columns are orthonormal, to the square root
        of the dtype's precision, is checked on one combination of them.
    alpha, sigma
        Noise level: scalars, or (B,).
    posterior_trace
        (B,) tr P, zero or positive, from `trace_matching` or `local_loss_trace`; or None.
    batch
        B, where no other argument has a length to say it; 1 if nothing does.

    Attributes
    ----------
    kappa
        (B,).

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes, namespaces, devices or values do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> F = GaussianFisher(np.array([1.0, 0.0]), None, alpha=1.0, sigma=1.0)
    >>> F.diagonal()
    array([[0.5, 1. ]])
    """

    def __init__(
        self,
        covariance_eigenvalues: Array,
        basis: Array | None,
        alpha: float | Array,
        sigma: float | Array,
        posterior_trace: Array | None = None,
        *,
        batch: int | None = None,
    ) -> None:
        self._c, self._basis = _spectrum(covariance_eigenvalues, basis)
        rows = _batch_size(batch, alpha, sigma, posterior_trace)
        home = {"covariance_eigenvalues": covariance_eigenvalues}
        self.alpha = _noise("alpha", alpha, rows, home)
        self.sigma = _noise("sigma", sigma, rows, home)
        dim = self._c.shape[0] if basis is None else basis.shape[0]
        super().__init__(self._c, (rows, dim, dim), covariance_eigenvalues.dtype)
        self.covariance_eigenvalues, self.basis = covariance_eigenvalues, basis
        self.posterior_trace = _posterior_trace(posterior_trace, rows, home)
        self._kappa = self._scale()

    @property
    def kappa(self) -> Array:
        """Scale (B,) of the Gaussian posterior covariance."""
        return self._out(self._kappa)

    def forms(self, want: Want, probes: Array | None = None) -> Second:
        """Return F in one form: shift I + U diag(e) U^T.

        Where U is complete there is no shift, and e are the eigenvalues of F themselves, 1/(alpha^2 c + sigma^2) for
        kappa = 1: differences from 1/sigma^2 would cancel.
        """
        xp = array_namespace(self._home)
        variance = self.alpha[:, None] ** 2 * self._c[None, :]
        total = variance + self.sigma[:, None] ** 2
        precision = 1.0 / self.sigma[:, None] ** 2
        kappa, share = self._kappa[:, None], variance / total
        if self._c.shape[0] == self.shape[1]:
            return _spectral(1.0 / total + (1.0 - kappa) * share * precision, self._basis, want, probes)
        shift = xp.broadcast_to(precision[:, 0], (self.shape[0],))
        one, identity = xp.ones_like(shift), _identity(shift, self.shape[1], want, probes)
        correction = _spectral(-kappa * share * precision, self._basis, want, probes)
        return combine([(one, identity), (one, correction)])

    def row(self, i: int) -> GaussianFisher:
        """Return the operator of query i alone."""
        trace = None if self.posterior_trace is None else self.posterior_trace[i : i + 1]
        alpha, sigma = _row(self.alpha, i), _row(self.sigma, i)
        return GaussianFisher(self.covariance_eigenvalues, self.basis, alpha, sigma, trace)

    def _scale(self) -> Array:
        xp = array_namespace(self._c)
        one = xp.ones((self.shape[0],), dtype=self._c.dtype, device=device(self._c))
        largest = xp.max(self._c)
        if self.posterior_trace is None or not bool(largest > 0):
            return one
        c, rho = self._c[None, :], (self.sigma / self.alpha)[:, None]
        gaussian = xp.sum(rho**2 * (c / (c + rho**2)), axis=1)
        kappa = self.posterior_trace / gaussian
        limit = one + rho[:, 0] ** 2 / largest
        return xp.where(kappa > limit, limit, kappa)


def _diagonal(values: Array, want: Want, probes: Array | None) -> Second:
    """Return diag(values) for values (B, d), in one form."""
    xp = array_namespace(values)
    eye = xp.eye(values.shape[1], dtype=values.dtype, device=device(values)) if want == "dense" else None
    return Second(
        trace=xp.sum(values, axis=1) if want == "trace" else None,
        diagonal=values if want == "diagonal" else None,
        product=values[:, :, None] * probes if want == "product" else None,
        dense=values[:, :, None] * eye[None, ...] if eye is not None else None,
    )


def _identity(scale: Array, dim: int, want: Want, probes: Array | None) -> Second:
    """Return scale I for scale (B,), in one form."""
    xp = array_namespace(scale)
    return _diagonal(xp.broadcast_to(scale[:, None], (scale.shape[0], dim)), want, probes)


def _spectral(values: Array, basis: Array | None, want: Want, probes: Array | None) -> Second:
    """Return U diag(values) U^T in one form: values (B, r), orthonormal U (d, r) or None for the identity."""
    if basis is None:
        return _diagonal(values, want, probes)
    xp, rows = array_namespace(values), array_namespace(basis).matrix_transpose(basis)
    inner = values[:, :, None] * xp.matmul(rows, probes) if want == "product" else None
    return Second(
        trace=xp.sum(values, axis=1) if want == "trace" else None,
        diagonal=xp.matmul(values, rows**2) if want == "diagonal" else None,
        product=xp.matmul(basis, inner) if want == "product" else None,
        dense=xp.matmul(basis * values[:, None, :], rows) if want == "dense" else None,
    )


def _symmetric_product(a: Array, b: Array, want: Want, probes: Array | None) -> Second:
    """Return (a b^T + b a^T)/2 for a, b (B, d), in one form."""
    xp, half = array_namespace(a), 0.5 * a

    def outer(left: Array, right: Array) -> Array:
        return left[:, :, None] * right[:, None, :]

    def product(left: Array, right: Array) -> Array:
        return left[:, :, None] * xp.matmul(right[:, None, :], probes)

    return Second(
        trace=xp.sum(a * b, axis=1) if want == "trace" else None,
        diagonal=a * b if want == "diagonal" else None,
        product=product(half, b) + product(b, half) if want == "product" else None,
        dense=outer(half, b) + outer(b, half) if want == "dense" else None,
    )


def _along(vectors: Array, trace: Array, want: Want, probes: Array | None) -> Second:
    """Return the rank-one matrix of the given trace along each vector; a multiple of the identity along 0."""
    xp, dim = array_namespace(vectors), vectors.shape[1]
    size = xp.max(xp.abs(vectors), axis=1)
    none, still = size == 0, xp.zeros_like(size)
    # Squares of a tiny vector would underflow; of a scaled one they do not.
    scaled = vectors / xp.where(none, xp.ones_like(size), size)[:, None]
    square = xp.sum(scaled * scaled, axis=1)
    weight = xp.where(none, still, trace / xp.where(none, xp.ones_like(square), square))
    line = outer_product_forms(scaled, frozenset((want,)), probes)
    identity = _identity(xp.where(none, trace / dim, still), dim, want, probes)
    return combine([(weight, line), (xp.ones_like(weight), identity)])


def _product(matvec: Matrices, like: Array) -> Callable[[Array], Array]:
    """Return the product with blocks (B, d, k), checked: functions must return the shape they are given."""
    _checks.real_array("like", like, "(B, d)", 2)
    shape = tuple(like.shape)
    if isinstance(matvec, SymmetricOperator):
        if matvec.shape[:2] != shape:
            raise ValueError(f"matvec must have shape {(*shape, shape[1])} to match like, got {matvec.shape}")
        _checks.same_home(matvec=matvec.home, like=like)
        return lambda block: matvec @ block
    if not callable(matvec):
        raise TypeError(f"matvec must be a SymmetricOperator or a function, got {_checks.describe(matvec)}")

    def apply(block: Array) -> Array:
        result = matvec(block)
        _checks.real_array("matvec's result", result, str(tuple(block.shape)), 3)
        _checks.same_home(like=like, **{"matvec's result": result})
        if tuple(result.shape) != tuple(block.shape):
            raise ValueError(f"matvec must return shape {tuple(block.shape)}, got {_checks.describe(result)}")
        return result

    return apply


def _blocks(like: Array, count: int, seed: int, stream: int, distribution: str) -> Iterator[Array]:
    """Yield probes (B, d, k) in the dtype of `like`, `count` in all."""
    shape = tuple(like.shape)
    step = max(1, _CHUNK // max(1, shape[0] * shape[1]))
    for start in range(0, count, step):
        some = [_probe(shape, [seed, stream, j], distribution) for j in range(start, min(start + step, count))]
        yield from_numpy(np.stack(some, axis=2), like)


def _probe(shape: tuple[int, ...], key: list[int], distribution: str) -> Any:
    rng = np.random.default_rng(key)
    if distribution == "gaussian":
        return rng.standard_normal(shape)
    return 2.0 * rng.integers(0, 2, size=shape) - 1.0


def _quadratic(v: Array, product: Array) -> Array:
    """Return the inner products of columns, (B, k), summed in the accumulation dtype."""
    xp = array_namespace(product)
    dtype = accumulation_dtype(xp, product)
    return xp.sum(xp.astype(v, dtype, copy=False) * xp.astype(product, dtype, copy=False), axis=1)


def _estimate(samples: list[Array], offset: Array | float, products: int, like: Array) -> TraceEstimate:
    """Return offset + mean of the samples, blocks of (B, k), and the standard error of that mean."""
    xp = array_namespace(like)
    every = xp.concat(samples, axis=1)
    n, mean = every.shape[1], xp.mean(every, axis=1)
    variance = xp.sum((every - mean[:, None]) ** 2, axis=1) / (n - 1)
    return TraceEstimate(_as(offset + mean, like), _as(xp.sqrt(variance / n), like), products)


def _exact(apply: Callable[[Array], Array], like: Array) -> TraceEstimate:
    """Return the traces from the products with all d unit vectors."""
    xp, (rows, dim) = array_namespace(like), like.shape
    step = max(1, _CHUNK // max(1, rows * dim))
    eye = xp.eye(dim, dtype=like.dtype, device=device(like))
    columns = [eye[:, i : min(i + step, dim)] for i in range(0, dim, step)]
    blocks = (xp.broadcast_to(c[None, ...], (rows, dim, c.shape[1])) for c in columns)
    value = sum(xp.sum(_quadratic(v, apply(v)), axis=1) for v in blocks)
    return TraceEstimate(_as(value, like), xp.zeros((rows,), dtype=like.dtype, device=device(like)), dim)


def _range_of_sketch(apply: Callable[[Array], Array], probes: Iterator[Array], shift: Array | float) -> Array:
    """Return an orthonormal basis (B, d, r) of a space that contains the range of (M - shift I) S.

    Householder QR completes the basis where the sketch has lower rank, so there is nothing to fail.
    """
    parts = []
    for block in probes:
        product = apply(block)
        xp = array_namespace(product)
        dtype = accumulation_dtype(xp, product)
        parts.append(xp.astype(product, dtype, copy=False) - shift * xp.astype(block, dtype, copy=False))
    return xp.linalg.qr(xp.concat(parts, axis=2)).Q


def _on_sphere(block: Array, basis: Array, like: Array) -> Array:
    """Project probes to the complement of the basis and scale them to the root of its dimension."""
    xp = array_namespace(basis)
    v = xp.astype(block, basis.dtype, copy=False)
    v = v - xp.matmul(basis, xp.matmul(xp.matrix_transpose(basis), v))
    square = xp.sum(v * v, axis=1, keepdims=True)
    return _as(v * xp.sqrt((basis.shape[1] - basis.shape[2]) / square), like)


def _as(array: Array, like: Array) -> Array:
    return array_namespace(like).astype(array, like.dtype, copy=False)


def _row(level: Array, i: int) -> Array:
    return level if level.shape[0] == 1 else level[i : i + 1]


def _noise(name: str, value: Any, rows: int, home: dict[str, Array]) -> Array:
    """Validate alpha or sigma: (1,) or (B,) in the accumulation dtype."""
    ((owner, place),) = home.items()
    level = _checks.noise_array(name, value, place, zero_allowed=False, owner=owner)
    if level.shape[0] not in (1, rows):
        raise ValueError(f"{name} must be a number or have shape ({rows},), got {_checks.describe(value)}")
    return level


def _per_row(name: str, value: Any, rows: int, home: dict[str, Array]) -> Array:
    """Validate one number for each row: (B,) in the accumulation dtype."""
    _checks.real_array(name, value, f"({rows},)", 1)
    _checks.same_home(**home, **{name: value})
    if value.shape[0] != rows:
        raise ValueError(f"{name} must have shape ({rows},), got {_checks.describe(value)}")
    _checks.finite_rows(name, value)
    xp = array_namespace(value)
    return xp.astype(value, accumulation_dtype(xp, value), copy=False)


def _mean_and_noise(mean: Any, alpha: Any, sigma: Any) -> tuple[Array, Array, Array]:
    """Validate posterior means (B, d) and noise levels; all in the accumulation dtype."""
    _checks.real_array("mean", mean, "(B, d)", 2)
    _checks.finite_rows("mean", mean)
    xp, rows, home = array_namespace(mean), mean.shape[0], {"mean": mean}
    alpha, sigma = _noise("alpha", alpha, rows, home), _noise("sigma", sigma, rows, home)
    return xp.astype(mean, alpha.dtype, copy=False), alpha, sigma


def _endpoint(endpoint: Any, mean: Array) -> Array:
    """Validate end points against the means, in the accumulation dtype."""
    _checks.real_array("endpoint", endpoint, "(B, d)", 2)
    _checks.same_home(mean=mean, endpoint=endpoint)
    if tuple(endpoint.shape) != tuple(mean.shape):
        raise ValueError(f"endpoint must have the shape of mean, {tuple(mean.shape)}, got {_checks.describe(endpoint)}")
    if endpoint.dtype != mean.dtype:
        raise TypeError(f"endpoint must have the dtype of mean, {mean.dtype}, got {_checks.describe(endpoint)}")
    _checks.finite_rows("endpoint", endpoint)
    xp = array_namespace(endpoint)
    return xp.astype(endpoint, accumulation_dtype(xp, endpoint), copy=False)


def _posterior_trace(value: Any, rows: int, home: dict[str, Array]) -> Array | None:
    """Validate traces of P, where given."""
    if value is None:
        return None
    trace = _per_row("posterior_trace", value, rows, home)
    _not_negative("posterior_trace", trace)
    return trace


def _not_negative(name: str, values: Array) -> None:
    numbers = to_numpy(values)
    if (numbers < 0).any():
        row = int((numbers < 0).argmax())
        raise ValueError(f"{name} must be zero or positive, got {numbers[row]:g} in row {row}")


def _spectrum(eigenvalues: Any, basis: Any) -> tuple[Array, Array | None]:
    """Validate an eigen-decomposition of C, in the accumulation dtype."""
    _checks.real_array("covariance_eigenvalues", eigenvalues, "(r,)", 1)
    if eigenvalues.shape[0] == 0:
        raise ValueError("covariance_eigenvalues must hold at least one, got none")
    _checks.finite_rows("covariance_eigenvalues", eigenvalues)
    _not_negative("covariance_eigenvalues", eigenvalues)
    xp = array_namespace(eigenvalues)
    dtype = accumulation_dtype(xp, eigenvalues)
    if basis is not None:
        _check_basis(basis, eigenvalues)
        basis = xp.astype(basis, dtype, copy=False)
    return xp.astype(eigenvalues, dtype, copy=False), basis


def _check_basis(basis: Any, eigenvalues: Array) -> None:
    rank = eigenvalues.shape[0]
    _checks.real_array("basis", basis, f"(d, {rank})", 2)
    _checks.same_home(covariance_eigenvalues=eigenvalues, basis=basis)
    if basis.shape[1] != rank or basis.shape[0] < rank:
        raise ValueError(f"basis must have shape (d, {rank}) with d >= {rank}, got {_checks.describe(basis)}")
    _checks.finite_rows("basis", basis)
    xp, weights = array_namespace(basis), from_numpy(np.random.default_rng(0).standard_normal(rank), basis)
    error = xp.matmul(xp.matrix_transpose(basis), xp.matmul(basis, weights)) - weights
    off = float(xp.sqrt(xp.sum(error**2) / xp.sum(weights**2)))
    if not off <= xp.finfo(basis.dtype).eps ** 0.5:
        raise ValueError(f"basis must have orthonormal columns, got U^T U off the identity by about {off:.1g}")


def _batch_size(batch: int | None, *per_row: Any) -> int:
    """Return B from an explicit number, or else from the longest of the arguments that have a length, or else 1."""
    if batch is not None:
        return _checks.positive_integer("batch", batch)
    return max((int(a.shape[0]) for a in per_row if getattr(a, "ndim", 0) == 1), default=1)


def _shift(value: Any, like: Array) -> Array | float:
    """Validate a multiple of the identity: a finite float, or (B, 1, 1) in the accumulation dtype."""
    if _checks.is_number(value):
        shift = _checks.real_number("shift", value)
        if not math.isfinite(shift):
            raise ValueError(f"shift must be finite, got {shift:g}")
        return shift
    _checks.namespace("shift", value, f"a number or an array of shape ({like.shape[0]},)")
    return _per_row("shift", value, like.shape[0], {"like": like})[:, None, None]


def _enough(name: str, value: Any, least: int, purpose: str) -> int:
    number = _checks.positive_integer(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least} ({purpose}), got {number}")
    return number
