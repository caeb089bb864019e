"""The diffusion Fisher of Gaussian data with a given covariance, at a given trace [MATH 4.6b]."""

from __future__ import annotations

from typing import Any

import numpy as np

from dfmath import _checks
from dfmath.approximations.arguments import noise, not_negative, optional_trace, row_of
from dfmath.approximations.forms import identity_forms, spectral_forms
from dfmath.backends import Want
from dfmath.backends._compat import Array, accumulation_dtype, array_namespace, device, from_numpy
from dfmath.backends.moments import Second, combine
from dfmath.operators import SymmetricOperator


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
        self.alpha = noise("alpha", alpha, rows, home)
        self.sigma = noise("sigma", sigma, rows, home)
        dim = self._c.shape[0] if basis is None else basis.shape[0]
        super().__init__(self._c, (rows, dim, dim), covariance_eigenvalues.dtype)
        self.covariance_eigenvalues, self.basis = covariance_eigenvalues, basis
        self.posterior_trace = optional_trace(posterior_trace, rows, home)
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
            return spectral_forms(1.0 / total + (1.0 - kappa) * share * precision, self._basis, want, probes)
        shift = xp.broadcast_to(precision[:, 0], (self.shape[0],))
        one, identity = xp.ones_like(shift), identity_forms(shift, self.shape[1], want, probes)
        correction = spectral_forms(-kappa * share * precision, self._basis, want, probes)
        return combine([(one, identity), (one, correction)])

    def row(self, i: int) -> GaussianFisher:
        """Return the operator of query i alone."""
        trace = None if self.posterior_trace is None else self.posterior_trace[i : i + 1]
        alpha, sigma = row_of(self.alpha, i), row_of(self.sigma, i)
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


def _spectrum(eigenvalues: Any, basis: Any) -> tuple[Array, Array | None]:
    """Validate an eigen-decomposition of C, in the accumulation dtype."""
    _checks.real_array("covariance_eigenvalues", eigenvalues, "(r,)", 1)
    if eigenvalues.shape[0] == 0:
        raise ValueError("covariance_eigenvalues must hold at least one, got none")
    _checks.finite_rows("covariance_eigenvalues", eigenvalues)
    not_negative("covariance_eigenvalues", eigenvalues)
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
