"""Traces of the diffusion Fisher from what one more network output predicts [MATH 4.1, 4.3]."""

from __future__ import annotations

from dfmath import _checks
from dfmath.approximations.arguments import mean_and_noise, noise, per_row
from dfmath.backends._compat import Array, array_namespace


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
    m, alpha, sigma = mean_and_noise(mean, alpha, sigma)
    t = per_row("second_moment", second_moment, mean.shape[0], {"mean": mean})
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
    level = noise("sigma", sigma, loss.shape[0], {"loss": loss})
    xp = array_namespace(loss)
    return xp.astype((dim - xp.astype(loss, level.dtype)) / level**2, loss.dtype, copy=False)
