"""A batch of symmetric matrices known by what they do: the base of the Fisher and the posterior covariance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from dfmath import _checks
from dfmath.backends import Want
from dfmath.backends._compat import Array, array_namespace, to_numpy
from dfmath.backends.moments import Second
from dfmath.low_rank import LowRank


class SymmetricOperator(ABC):
    """A batch of B symmetric d x d matrices M_b. A subclass says what they are in `forms`; the rest follows.

    Results are in the namespace, device and dtype of the queries that the operator was made from.
    """

    def __init__(self, home: Array, shape: tuple[int, int, int], dtype: Any) -> None:
        self._home = home  # an array in the accumulation dtype, for namespace and device
        self._shape = shape
        self._dtype = dtype

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of shape {self._shape} and dtype {self._dtype}>"

    @abstractmethod
    def forms(self, want: Want, probes: Array | None = None) -> Second:
        """Return one form of the matrices, in the accumulation dtype; `probes` (B, d, p) for ``product``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, d, d)."""
        return self._shape

    @property
    def home(self) -> Array:
        """An array of the namespace and the device that the matrices live on."""
        return self._home

    @property
    def dtype(self) -> Any:
        """Dtype of the results."""
        return self._dtype

    def matvec(self, v: Array) -> Array:
        """Return M_b v_b for v (B, d): (B, d)."""
        _checks.vectors("v", v, self.shape, self._home)
        return self.unchecked_matvec(v)

    def unchecked_matvec(self, v: Array) -> Array:
        """`matvec` without its door, for derivatives: a batch of tangents under `vmap` has no values to look at."""
        return self._product(v[:, :, None])[:, :, 0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise TypeError(f"{type(self).__name__} is an operator; to_dense() makes an array of it")

    def __matmul__(self, matrices: Array) -> Array:
        """Return M_b V_b for V (B, d, k): (B, d, k)."""
        _checks.vectors("V", matrices, self.shape, self._home, columns=True)
        return self._product(matrices)

    def trace(self) -> Array:
        """Return tr M_b, (B,)."""
        return self._out(self.forms("trace").trace)

    def diagonal(self) -> Array:
        """Return the diagonals, (B, d)."""
        return self._out(self.forms("diagonal").diagonal)

    def to_dense(self) -> Array:
        """Return the matrices, (B, d, d); ValueError with the size where they would not fit in memory."""
        return self._out(self._dense())

    def low_rank(self) -> LowRank | None:
        """Return a multiple of the identity and what differs from it, where that is of low rank; None elsewhere."""
        return None

    def eigvalsh(self) -> Array:
        """Return the eigenvalues in ascending order, (B, d)."""
        return self._out(self._eigenvalues())

    def eigh(self) -> tuple[Array, Array]:
        """Return eigenvalues (B, d), ascending, and orthonormal eigenvectors as columns (B, d, d)."""
        _checks.fits_in_memory("the eigenvectors", *self.shape, instead="use eigvalsh or low_rank instead")
        found = self.low_rank()
        pair = array_namespace(self._home).linalg.eigh(self._matrix()) if found is None else found.eigh()
        return self._out(pair[0]), self._out(pair[1])

    def logdet(self) -> Array:
        """Return log det M_b, (B,): -inf where the determinant is zero, NaN where it is negative."""
        xp, found = array_namespace(self._home), self.low_rank()
        if found is None:
            sign, log_abs = xp.linalg.slogdet(self._matrix())
        else:
            sign = xp.prod(xp.sign(found.eigenvalues), axis=1)
            log_abs = xp.sum(xp.log(xp.abs(found.eigenvalues)), axis=1)
        return self._out(xp.where(sign < 0, xp.full_like(log_abs, xp.nan), log_abs))

    def solve(self, v: Array) -> Array:
        """Return M_b^-1 v_b for v (B, d): (B, d).

        Raises
        ------
        ValueError
            If a matrix is singular to working precision (smallest |eigenvalue| below d eps times the largest); the
            message names the row.
        """
        xp = array_namespace(self._home)
        _checks.vectors("v", v, self.shape, self._home)
        found, wide = self.low_rank(), self._widen(v)
        if found is not None:
            self._refuse_singular(found.eigenvalues)
            return self._out(found.solve(wide))
        values, vectors = xp.linalg.eigh(self._matrix())
        self._refuse_singular(values)
        rotated = xp.matmul(xp.matrix_transpose(vectors), wide[:, :, None])
        return self._out(xp.matmul(vectors, rotated / values[:, :, None])[:, :, 0])

    def _eigenvalues(self) -> Array:
        found = self.low_rank()
        return array_namespace(self._home).linalg.eigvalsh(self._matrix()) if found is None else found.eigenvalues

    def _refuse_singular(self, values: Array) -> None:
        xp = array_namespace(values)
        size = xp.abs(values)
        singular = xp.min(size, axis=1) <= self.shape[1] * xp.finfo(values.dtype).eps * xp.max(size, axis=1)
        if bool(xp.any(singular)):
            row = int(xp.argmax(xp.astype(singular, xp.int32)))
            raise ValueError(f"solve needs matrices that are not singular, got a singular one in row {row}")

    def to_scipy(self, i: int) -> Any:
        """Return matrix i as a `scipy.sparse.linalg.LinearOperator` on NumPy vectors."""
        from scipy.sparse.linalg import LinearOperator

        from dfmath.backends._compat import from_numpy

        one = self.row(_checks.index("i", i, self.shape[0]))

        def matmat(columns: Any) -> Any:
            probes = from_numpy(columns[None, ...], self._home)
            return to_numpy(one.forms("product", probes).product)[0]

        def matvec(v: Any) -> Any:
            return matmat(v.reshape(d, 1))

        d = self.shape[1]
        return LinearOperator((d, d), matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat, dtype="float64")

    @abstractmethod
    def row(self, i: int) -> SymmetricOperator:
        """Return the operator of query i alone."""

    def _product(self, probes: Array) -> Array:
        return self._out(self.forms("product", self._widen(probes)).product)

    def _widen(self, values: Array) -> Array:
        return array_namespace(values).astype(values, self._home.dtype, copy=False)

    def _dense(self) -> Array:
        _checks.fits_in_memory("the dense matrices", *self.shape, instead="use matvec, diagonal or trace instead")
        return self.forms("dense").dense

    def _matrix(self) -> Array:
        """What is decomposed: the matrices, or where they are not symmetric the part of them that is."""
        return self._dense()

    def _out(self, value: Array | None) -> Array:
        return _checks.narrowed(value, self._dtype)
