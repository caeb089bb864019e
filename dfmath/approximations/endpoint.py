"""The diffusion Fisher from the end of the probability-flow trajectory [MATH 4.4, 4.6]."""

from __future__ import annotations

from typing import Any

from dfmath import _checks
from dfmath.approximations.arguments import mean_and_noise, optional_trace, row_of
from dfmath.approximations.forms import identity_forms, line_forms, symmetric_product_forms
from dfmath.backends import Want
from dfmath.backends._compat import Array, accumulation_dtype, array_namespace
from dfmath.backends.moments import Second, combine, outer_product_forms
from dfmath.operators import SymmetricOperator

VARIANTS = ("paper", "centred", "calibrated")


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
        m, self.alpha, self.sigma = mean_and_noise(mean, alpha, sigma)
        xh = _endpoint(endpoint, mean)
        rows, dim = m.shape
        super().__init__(m, (rows, dim, dim), mean.dtype)
        self.endpoint, self.mean = endpoint, mean
        self._u, self._sum = xh - m, xh + m
        if (variant == "calibrated") != (posterior_trace is not None):
            need, came = ("be given", "none") if variant == "calibrated" else ("not be given", "one")
            raise ValueError(f"posterior_trace must {need} for variant {variant!r}, got {came}")
        self.posterior_trace = optional_trace(posterior_trace, rows, {"mean": mean})

    def forms(self, want: Want, probes: Array | None = None) -> Second:
        """Return F = (I - S)/sigma^2 in one form, with S = (alpha^2/sigma^2) P."""
        xp = array_namespace(self._home)
        precision = xp.broadcast_to(1.0 / self.sigma**2, (self.shape[0],))
        identity = identity_forms(precision, self.shape[1], want, probes)
        ratio = xp.broadcast_to(self.alpha / self.sigma, (self.shape[0],))
        return combine([(xp.ones_like(ratio), identity), (-precision, self._shrinkage(ratio, want, probes))])

    def row(self, i: int) -> EndpointFisher:
        """Return the operator of query i alone."""
        trace = None if self.posterior_trace is None else self.posterior_trace[i : i + 1]
        ends, means = self.endpoint[i : i + 1, :], self.mean[i : i + 1, :]
        return EndpointFisher(ends, means, row_of(self.alpha, i), row_of(self.sigma, i), self.variant, trace)

    def _shrinkage(self, ratio: Array, want: Want, probes: Array | None) -> Second:
        """S = ratio^2 P; vectors are scaled before they are multiplied, so that nothing overflows early."""
        u, both = ratio[:, None] * self._u, ratio[:, None] * self._sum
        if self.variant == "paper":
            return symmetric_product_forms(u, both, want, probes)
        if self.variant == "centred":
            return outer_product_forms(u, frozenset((want,)), probes)
        return line_forms(self._u, ratio**2 * self.posterior_trace, want, probes)


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
