"""Batches of structured symmetric matrices in the one form that is asked for."""

from __future__ import annotations

from dfmath.backends import Want
from dfmath.backends._compat import Array, array_namespace, device
from dfmath.backends.moments import Second, combine, outer_product_forms


def diagonal_forms(values: Array, want: Want, probes: Array | None) -> Second:
    """Return diag(values) for values (B, d), in one form."""
    xp = array_namespace(values)
    eye = xp.eye(values.shape[1], dtype=values.dtype, device=device(values)) if want == "dense" else None
    return Second(
        trace=xp.sum(values, axis=1) if want == "trace" else None,
        diagonal=values if want == "diagonal" else None,
        product=values[:, :, None] * probes if want == "product" else None,
        dense=values[:, :, None] * eye[None, ...] if eye is not None else None,
    )


def identity_forms(scale: Array, dim: int, want: Want, probes: Array | None) -> Second:
    """Return scale I for scale (B,), in one form."""
    xp = array_namespace(scale)
    return diagonal_forms(xp.broadcast_to(scale[:, None], (scale.shape[0], dim)), want, probes)


def spectral_forms(values: Array, basis: Array | None, want: Want, probes: Array | None) -> Second:
    """Return U diag(values) U^T in one form: values (B, r), orthonormal U (d, r) or None for the identity."""
    if basis is None:
        return diagonal_forms(values, want, probes)
    xp, rows = array_namespace(values), array_namespace(basis).matrix_transpose(basis)
    inner = values[:, :, None] * xp.matmul(rows, probes) if want == "product" else None
    return Second(
        trace=xp.sum(values, axis=1) if want == "trace" else None,
        diagonal=xp.matmul(values, rows**2) if want == "diagonal" else None,
        product=xp.matmul(basis, inner) if want == "product" else None,
        dense=xp.matmul(basis * values[:, None, :], rows) if want == "dense" else None,
    )


def symmetric_product_forms(a: Array, b: Array, want: Want, probes: Array | None) -> Second:
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


def line_forms(vectors: Array, trace: Array, want: Want, probes: Array | None) -> Second:
    """Return the rank-one matrix of the given trace along each vector; a multiple of the identity along 0."""
    xp, dim = array_namespace(vectors), vectors.shape[1]
    size = xp.max(xp.abs(vectors), axis=1)
    none, still = size == 0, xp.zeros_like(size)
    # Squares of a tiny vector would underflow; of a scaled one they do not.
    scaled = vectors / xp.where(none, xp.ones_like(size), size)[:, None]
    square = xp.sum(scaled * scaled, axis=1)
    weight = xp.where(none, still, trace / xp.where(none, xp.ones_like(square), square))
    line = outer_product_forms(scaled, frozenset((want,)), probes)
    identity = identity_forms(xp.where(none, trace / dim, still), dim, want, probes)
    return combine([(weight, line), (xp.ones_like(weight), identity)])
