"""The diffusion Fisher and the posterior covariance, exact for every mixture [MATH 1.2-1.7]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfmath.backends import Want
from dfmath.backends._compat import Array, array_namespace
from dfmath.backends.moments import Moments, Second, Space, covariance_forms, fisher_forms
from dfmath.low_rank import LowRank, low_rank
from dfmath.operators import SymmetricOperator

if TYPE_CHECKING:
    from dfmath.marginal import Marginal
    from dfmath.span import OuterProductSpan


class _PosteriorOperator(SymmetricOperator):
    """An operator whose forms are posterior moments at fixed queries."""

    _space: Space  # of those moments, and
    _sign: float  # of Cov[u] in the operator

    def __init__(self, marginal: Marginal, x: Array, dtype: Any) -> None:
        super().__init__(x, (x.shape[0], marginal.dim, marginal.dim), dtype)
        self.marginal, self.x = marginal, x

    def low_rank(self) -> LowRank | None:
        """Return a multiple of the identity and what differs from it, if that is of low rank [MATH 1.6]; else None.

        Looked for where all components share one covariance c I, in 128 dimensions or more.
        """
        if not self.marginal.components.common:
            return None

        def ask(want: tuple[Want, ...], probes: Array) -> Moments:
            return self.marginal.moments(self.x, want, self._space, probes, self.dtype)

        def shift(moments: Moments) -> Array:
            return moments.within.trace / self.marginal.dim  # type: ignore[operator]

        eps = float(array_namespace(self.x).finfo(self.dtype).eps)
        return low_rank(ask, self.x, shift, self._sign, eps)

    def row(self, i: int) -> SymmetricOperator:
        """Return the operator of query i alone."""
        return type(self)(self.marginal.at_row(i), self.x[i : i + 1, :], self.dtype)


class DiffusionFisher(_PosteriorOperator):
    r"""The diffusion Fisher F = -Hess log q(x), a batch of B symmetric operators.

    .. math:: F = \sum_k w_k L_k - \Big[\sum_k w_k s_k s_k^T - s s^T\Big]
              = \frac{I}{\sigma^2} - \frac{\alpha^2}{\sigma^4} P

    computed from the first form with the bracket as a centred covariance of component scores, which loses no digits at
    any noise level [MATH 1.5]; for point masses it is the paper's Proposition 1 [MATH 1.3]. Made by
    ``marginal.fisher(x)``.
    """

    _space, _sign = "score", -1.0

    def forms(self, want: Want, probes: Array | None = None) -> Second:
        """Return E[L] - Cov[s_k]."""
        moments = self.marginal.moments(self.x, (want,), "score", probes, self.dtype)
        return fisher_forms(moments)

    def posterior_covariance(self) -> PosteriorCovariance:
        """Return P = Cov[x0 given x] = (sigma^2/alpha^2) (I - sigma^2 F) as an operator [MATH 1.2]."""
        return PosteriorCovariance(self.marginal, self.x, self.dtype)

    def span(self, form: str = "orthonormal", tolerance: float = 0.0) -> OuterProductSpan:
        """Return F as a multiple of the identity less a sum of outer products [MATH 1.6].

        Parameters
        ----------
        form
            ``orthonormal``: as few orthonormal vectors as `tolerance` allows, for every prior;
            ``centred``: outer products of u_i = y_i - m, or of s_k - s where all covariances are one c I;
            ``data``: the paper's, outer products of the data and of m = (x + sigma^2 s)/alpha, for point masses. Its
            terms grow with the distance of the data from the origin and cancel: see `rounding_error` of the result.
        tolerance
            For ``orthonormal``: the largest spectral norm, relative to the shift, of what is truncated. The other
            forms are complete and take 0 alone.

        Returns
        -------
        OuterProductSpan
            With `truncation_error` and `rounding_error`, which add to `error_bound`.

        Raises
        ------
        ValueError
            If the form does not exist for this prior, or the result would not fit in memory.
        """
        from dfmath.span import span

        return span(self, form, tolerance)

    def error_bound(self) -> Array:
        """Return a certified bound (B,) on the spectral norm of the error of F.

        It covers what `tolerance` left out [MATH 4.8], rounding in the logits and in the sums [MATH 4.9], and rounding
        to the result's dtype.
        """
        from dfmath.rounding import numerical_error

        moments = self.marginal.moments(self.x, ("trace",), "score", dtype=self.dtype)
        return self._out(numerical_error(self.marginal, self.x, moments, "score", self.dtype))


class PosteriorCovariance(_PosteriorOperator):
    r"""The posterior covariance P = Cov[x0 given x], a batch of B symmetric positive semidefinite operators.

    .. math:: P = \sum_k w_k \big[P_k + (m_k - m)(m_k - m)^T\big]

    a sum of positive terms at every noise level [MATH 1.5].
    """

    _space, _sign = "posterior", 1.0

    def forms(self, want: Want, probes: Array | None = None) -> Second:
        """Return E[P_k] + Cov[m_k]."""
        moments = self.marginal.moments(self.x, (want,), "posterior", probes, self.dtype)
        return covariance_forms(moments)

    def logdet(self) -> Array:
        """Return log det P, (B,): -inf where P is singular to working precision, as it is for N <= d points."""
        xp = array_namespace(self.x)
        values = self._eigenvalues()
        floor = values.shape[1] * float(xp.finfo(values.dtype).eps) * values[:, -1]
        singular = values[:, 0] <= floor
        logs = xp.sum(xp.log(xp.where(singular[:, None], xp.ones_like(values), values)), axis=1)
        return self._out(xp.where(singular, xp.full_like(logs, -xp.inf), logs))

    def error_bound(self) -> Array:
        """Return a certified bound (B,) on the spectral norm of the error of P; see `DiffusionFisher.error_bound`."""
        from dfmath.rounding import numerical_error

        moments = self.marginal.moments(self.x, ("trace",), "posterior", dtype=self.dtype)
        return self._out(numerical_error(self.marginal, self.x, moments, "posterior", self.dtype))
