"""Symmetric matrices that are a multiple of the identity plus or less a matrix of low rank.

At low noise few components carry weight, and Cov[u] of the span decomposition has no larger rank [MATH 1.6]. It is
found from products with random vectors (Halko, Martinsson and Tropp 2011, algorithm 4.1). As it is positive
semidefinite, the trace it has beyond what was found bounds the spectral norm of all that was not: that is certified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dfmath.backends import Moments, Want
from dfmath.backends._compat import Array, array_namespace, from_numpy

Ask = Callable[[tuple[Want, ...], Array], Moments]  # (forms wanted, probes (B, d, k)) -> moments

WORTH = 128  # dimensions from which on d x d matrices cost more than looking for low rank in vain
FIRST, SHARE = 16, 8  # vectors to begin with; looking ends at d/8 of them
TOLERANCE = 32.0  # roundings that the bound on what was not found may amount to


@dataclass(frozen=True)
class LowRank:
    r"""A batch of matrices :math:`\text{shift}\, I + V \operatorname{diag}(\text{values}) V^T`, V orthonormal.

    Attributes
    ----------
    shift
        (B,).
    values
        (B, k).
    vectors
        (B, d, k).
    """

    shift: Array
    values: Array
    vectors: Array

    @property
    def eigenvalues(self) -> Array:
        """All of them in ascending order, (B, d)."""
        xp, (count, dim, rank) = array_namespace(self.shift), self.vectors.shape
        rest = xp.broadcast_to(self.shift[:, None], (count, dim - rank))
        return xp.sort(xp.concat([self.shift[:, None] + self.values, rest], axis=1), axis=1)

    def eigh(self) -> tuple[Array, Array]:
        """Eigenvalues in ascending order, (B, d), and orthonormal eigenvectors as columns, (B, d, d)."""
        xp, (count, dim, rank) = array_namespace(self.shift), self.vectors.shape
        basis = xp.linalg.qr(self.vectors, mode="complete")[0]
        rest = xp.broadcast_to(self.shift[:, None], (count, dim - rank))
        values = xp.concat([self.shift[:, None] + self.values, rest], axis=1)
        vectors = xp.concat([self.vectors, basis[:, :, rank:]], axis=2)
        order = xp.argsort(values, axis=1)
        columns = xp.broadcast_to(order[:, None, :], vectors.shape)
        return xp.take_along_axis(values, order, axis=1), xp.take_along_axis(vectors, columns, axis=2)

    def solve(self, v: Array) -> Array:
        """M^-1 v for v (B, d): V takes one share of v, and the rest of space the other."""
        xp, shift = array_namespace(v), self.shift[:, None]
        along = xp.matmul(v[:, None, :], self.vectors)[:, 0, :]
        change = along * (-self.values / (shift * (shift + self.values)))
        return v / shift + xp.matmul(self.vectors, change[:, :, None])[:, :, 0]


def low_rank(ask: Ask, like: Array, shift: Callable[[Moments], Array], sign: float, eps: float) -> LowRank | None:
    """Return shift I + sign Cov[u] if the rank of the covariance is far below d, else None.

    Parameters
    ----------
    ask
        Moments whose ``between`` is Cov[u].
    like
        (B, d) queries, in the dtype to compute in.
    shift
        The multiple of the identity, from any moments.
    eps
        Precision of results: what is not found may amount to a few of these, beside the larger of shift and norm.
    """
    xp, (count, dim) = array_namespace(like), like.shape
    if dim < WORTH or count == 0:
        return None
    width = FIRST
    while width * SHARE <= dim:
        normals = np.random.default_rng(0).standard_normal((dim, width))
        probes = xp.broadcast_to(xp.astype(from_numpy(normals, like), like.dtype), (count, dim, width))
        first = ask(("trace", "product"), probes)
        basis = xp.linalg.qr(first.between.product)[0]
        inner = xp.matmul(xp.matrix_transpose(basis), ask(("product",), basis).between.product)
        values, turned = xp.linalg.eigh(0.5 * (inner + xp.matrix_transpose(inner)))
        missing = xp.abs(first.between.trace - xp.sum(values, axis=1))
        if bool(xp.all(missing <= TOLERANCE * eps * xp.maximum(shift(first), values[:, -1]))):
            return LowRank(shift(first), sign * values, xp.matmul(basis, turned))
        width *= 2
    return None
