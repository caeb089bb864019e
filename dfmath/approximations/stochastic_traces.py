"""Unbiased traces from products with random vectors: Hutchinson and Hutch++ [MATH 4.7]."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfmath import _checks
from dfmath.approximations.arguments import cast_like, per_row
from dfmath.backends._compat import Array, accumulation_dtype, array_namespace, device, from_numpy
from dfmath.operators import SymmetricOperator

DISTRIBUTIONS = ("rademacher", "gaussian")

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
    inside = array_namespace(basis).sum(_quadratic(basis, apply(cast_like(basis, like))), axis=1)
    rest = (_on_sphere(v, basis, like) for v in _blocks(like, probes - 2 * rank, seed, _REST, "gaussian"))
    return _estimate([_quadratic(v, apply(v)) for v in rest], inside, probes, like)


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
    return TraceEstimate(cast_like(offset + mean, like), cast_like(xp.sqrt(variance / n), like), products)


def _exact(apply: Callable[[Array], Array], like: Array) -> TraceEstimate:
    """Return the traces from the products with all d unit vectors."""
    xp, (rows, dim) = array_namespace(like), like.shape
    step = max(1, _CHUNK // max(1, rows * dim))
    eye = xp.eye(dim, dtype=like.dtype, device=device(like))
    columns = [eye[:, i : min(i + step, dim)] for i in range(0, dim, step)]
    blocks = (xp.broadcast_to(c[None, ...], (rows, dim, c.shape[1])) for c in columns)
    value = sum(xp.sum(_quadratic(v, apply(v)), axis=1) for v in blocks)
    return TraceEstimate(cast_like(value, like), xp.zeros((rows,), dtype=like.dtype, device=device(like)), dim)


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
    return cast_like(v * xp.sqrt((basis.shape[1] - basis.shape[2]) / square), like)


def _shift(value: Any, like: Array) -> Array | float:
    """Validate a multiple of the identity: a finite float, or (B, 1, 1) in the accumulation dtype."""
    if _checks.is_number(value):
        shift = _checks.real_number("shift", value)
        if not math.isfinite(shift):
            raise ValueError(f"shift must be finite, got {shift:g}")
        return shift
    _checks.namespace("shift", value, f"a number or an array of shape ({like.shape[0]},)")
    return per_row("shift", value, like.shape[0], {"like": like})[:, None, None]


def _enough(name: str, value: Any, least: int, purpose: str) -> int:
    number = _checks.positive_integer(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least} ({purpose}), got {number}")
    return number
