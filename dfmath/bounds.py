"""Error bounds and spectra: one function for one statement, taking its hypotheses [MATH 1.6, 1.7, 4.2-4.9].

Arguments are numbers or arrays of any one array-API namespace that broadcast together; results are of the
same kind. Every bound is attained unless its docstring says otherwise. NaN passes through: a bound on what is
unknown is unknown. alpha/sigma multiplies before 1/sigma^2 does, so a tiny sigma overflows only where the
bound itself does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dfmath._checks import (
    has_values,
    is_number,
    namespace,
    one_of,
    positive_integer,
    real_array,
    real_number,
    same_home,
)
from dfmath.backends._compat import Array, array_namespace, to_numpy

__all__ = [
    "dropped_components",
    "endpoint_error",
    "fisher_rank",
    "fisher_spectrum",
    "hutchinson_variance",
    "local_loss_error",
    "omitted_mass",
    "posterior_trace_in_ball",
    "trace_matching_error",
    "weight_factor",
]

Number = Any  # a float, or an array of them


def trace_matching_error(d1: Number, d2: Number, mean_norm: Number, alpha: Number, sigma: Number, dim: int) -> Number:
    r"""Bound the error of `trace_matching` [MATH 4.2; paper, DF-TM].

    .. math:: |T_\theta - \operatorname{tr} F| \le \frac{\alpha^2}{\sigma^4} d\,\delta_1
              + \frac{2 \alpha |m|}{\sigma^3} \delta_2 + \frac{\delta_2^2}{\sigma^2}

    because :math:`|m_\theta|^2 - |m|^2 = 2 m \cdot (m_\theta - m) + |m_\theta - m|^2` and :math:`|m_\theta -
    m| \le (\sigma/\alpha) \delta_2`. Attained where the errors align: t too small, m_th beyond m.

    Parameters
    ----------
    d1
        Bound on abs(t_th - E[abs(x0)^2 given x]/d).
    d2
        Bound on the Euclidean norm of eps_th - eps*.
    mean_norm
        Norm of m, or of m_th: the bound holds with either, the two being a distance (sigma/alpha) d2 apart.
    alpha, sigma
        Noise level, positive.
    dim
        Dimension d.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number, is negative, or for alpha and sigma is zero.
    """
    _check(d1=d1, d2=d2, mean_norm=mean_norm, alpha=alpha, sigma=sigma, positive=("alpha", "sigma"))
    ratio = alpha / sigma
    second_moment = ratio * ratio * positive_integer("dim", dim) * d1
    return (second_moment + (2.0 * ratio * mean_norm + d2) * d2) * _inverse_square(sigma)


def local_loss_error(d1: Number, d2: Number, sigma: Number, dim: int) -> Number:
    r"""Bound the error of `local_loss_trace` [MATH 4.3, new].

    .. math:: |T - \operatorname{tr} F| \le (d\,\delta_1 + \delta_2^2)/\sigma^2

    because :math:`\operatorname{tr} F = (d - l + |\epsilon_\theta - \epsilon^*|^2)/\sigma^2`. Attained from
    below; from above T exceeds tr F by at most d d1/sigma^2.

    Parameters
    ----------
    d1
        Bound on abs(l_th - l)/d, the error of the local loss for each dimension.
    d2
        Bound on the Euclidean norm of eps_th - eps*.
    sigma
        Noise level, positive.
    dim
        Dimension d.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number, is negative, or for sigma is zero.
    """
    _check(d1=d1, d2=d2, sigma=sigma, positive=("sigma",))
    return (positive_integer("dim", dim) * d1 + d2 * d2) * _inverse_square(sigma)


def endpoint_error(radius: Number, d2: Number, alpha: Number, sigma: Number) -> Number:
    r"""Bound the Hilbert-Schmidt error of `EndpointFisher`, variant ``paper`` [MATH 4.5, sharpened].

    .. math:: |F_{EA} - F|_{HS}
              \le \frac{\alpha^2}{\sigma^4} \sqrt{R^4 + (R + \tfrac{\sigma}{\alpha} \delta_2)^4}
              \le \frac{\sqrt 2\, \alpha^2 R^2}{\sigma^4} + \frac{2 \alpha R\, \delta_2}{\sigma^3}
              + \frac{\delta_2^2}{\sigma^2}

    The right-hand side is the paper's form; the middle is returned. With M2 = P + m m^T the error is, up to
    alpha^2/sigma^4, the difference of the two positive semidefinite matrices xh xh^T and P + m_th m_th^T.
    Their inner product is not negative, so the squares of their norms, each at most a trace, add; and tr P +
    abs(m_th)^2 <= R^2 - abs(m)^2 + abs(m_th)^2. Attained where the posterior is one point of norm R at right
    angles to xh, and m_th lies beyond it.

    Parameters
    ----------
    radius
        R: the support of q0 and the end point xh lie in the ball of this radius around 0.
    d2
        Bound on the Euclidean norm of eps_th - eps*.
    alpha, sigma
        Noise level, positive.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number, is negative, or for alpha and sigma is zero.
    """
    _check(radius=radius, d2=d2, alpha=alpha, sigma=sigma, positive=("alpha", "sigma"))
    inner = alpha / sigma * radius
    outer = inner + d2
    return (inner * inner * inner * inner + outer * outer * outer * outer) ** 0.5 * _inverse_square(sigma)


def hutchinson_variance(
    frobenius_squared: Number, diagonal_squared_sum: Number, distribution: str = "rademacher"
) -> Number:
    r"""Return the variance of one Hutchinson sample :math:`v^T F v` for symmetric F [MATH 4.7].

    .. math:: \operatorname{Var} = 2 \Big(|F|_F^2 - \sum_i F_{ii}^2\Big) \text{ (Rademacher)}, \quad
              2 |F|_F^2 \text{ (Gaussian)}

    An equality, not a bound; the mean of n independent samples has this over n.

    Parameters
    ----------
    frobenius_squared
        Sum of all squared entries of F.
    diagonal_squared_sum
        Sum of the squared diagonal entries; of no consequence for Gaussian v.
    distribution
        ``rademacher`` or ``gaussian``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number or is negative, or there is no distribution of that name.
    """
    _check(frobenius_squared=frobenius_squared, diagonal_squared_sum=diagonal_squared_sum)
    if one_of("distribution", distribution, ("rademacher", "gaussian")) == "gaussian":
        return 2.0 * frobenius_squared
    return 2.0 * (frobenius_squared - diagonal_squared_sum)


def dropped_components(omitted_mass: Number, diameter: Number) -> tuple[Number, Number]:
    r"""Bound what leaving out components does to posterior mean and covariance [MATH 4.8, new, sharpened].

    .. math:: |m - m_S| \le \delta D, \qquad |P - P_S|_{op} \le \mu (1 - \mu) D^2,
              \qquad \mu = \min(\delta, \tfrac12)

    S keeps mass 1 - delta and renormalises. With g the difference of the means of what is left out and what
    is kept, m - m_S = delta g and P - P_S = delta (P_R - P_S) + delta (1 - delta) g g^T. In any direction
    that is largest where S sits at one end of the diameter and as much as helps, at most half of all mass, at
    the other; it is never below -delta D^2/4. Both bounds are attained, and both are monotone in delta, so an
    upper bound on delta may stand for it.

    Parameters
    ----------
    omitted_mass
        delta, the posterior mass of what is left out; above 1 counts as 1.
    diameter
        D: all components (points, or the vectors u_k) lie within this distance of each other.

    Returns
    -------
    mean_bound, covariance_bound
        Euclidean and spectral norm. A spread of matrices G_k within components comes on top.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number or is negative.
    """
    _check(omitted_mass=omitted_mass, diameter=diameter)
    half = _at_most(omitted_mass, 0.5)
    return _at_most(omitted_mass, 1.0) * diameter, half * (1.0 - half) * diameter * diameter


def omitted_mass(upper_logits: Array, best_kept: Number) -> Array:
    r"""Bound the posterior mass of what was left out, from bounds on its logits [MATH 4.8, sharpened].

    .. math:: \delta \le \frac{Q}{1 + Q} \le Q = \sum_{i \notin S} e^{b_i - r}

    because delta = W_R/(W_S + W_R) grows in the left-out mass W_R <= Q e^r and falls in the kept mass W_S >=
    e^r. Attained where S is one component and the b_i are exact. Never above 1, and free of overflow.

    Parameters
    ----------
    upper_logits
        (..., n): b_i >= l_i for each component left out; -inf for one of no weight. n may be 0.
    best_kept
        (...) or a number: r, the largest logit that was kept; finite.

    Returns
    -------
    Array
        (...).

    Raises
    ------
    TypeError
        If upper_logits is not a float32 or float64 array, or best_kept neither that nor a number.
    ValueError
        If upper_logits has no axis of components, or best_kept is infinite or of another shape.
    """
    real_array("upper_logits", upper_logits, "(..., n)", max(1, getattr(upper_logits, "ndim", 1)))
    if np.isinf(_numbers("best_kept", best_kept)).any():
        raise ValueError("best_kept must be finite, got an infinity")
    xp = array_namespace(upper_logits)
    _check_together({"upper_logits[..., 0]": xp.sum(upper_logits, axis=-1), "best_kept": best_kept})
    if upper_logits.shape[-1] == 0:
        return xp.sum(upper_logits, axis=-1)
    top = xp.max(upper_logits, axis=-1, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    mass = xp.sum(xp.exp(upper_logits - top), axis=-1)
    empty = mass == 0
    log_mass = top[..., 0] - best_kept + xp.log(xp.where(empty, xp.ones_like(mass), mass))
    small = xp.exp(-xp.abs(log_mass))  # Q or 1/Q, whichever is below 1
    share = xp.where(log_mass > 0, 1.0 / (1.0 + small), small / (1.0 + small))
    return xp.where(empty, xp.zeros_like(share), share)


def weight_factor(logit_error: Number) -> Number:
    r"""Return the largest factor by which errors in logits change a weight, :math:`e^{2 e}` [MATH 4.9, new].

    Every logit is off by at most e, so each weight w_i = exp(l_i)/sum exp(l_j) is off by a factor in
    [exp(-2e), exp(2e)]. Approached, not attained, by a light component whose logit errs one way and all
    others the other.

    Parameters
    ----------
    logit_error
        e, in natural logarithms.

    Raises
    ------
    TypeError, ValueError
        If e is not a number or is negative.
    """
    _check(logit_error=logit_error)
    return _exp(2.0 * logit_error)


def fisher_spectrum(diameter: Number, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    r"""Bound the eigenvalues of the diffusion Fisher for data of bounded support [MATH 1.7a].

    .. math:: \frac{1}{\sigma^2} - \frac{\alpha^2 D^2}{4 \sigma^4} \le F \le \frac{1}{\sigma^2}

    from 0 <= P <= (D^2/4) I (Popoviciu, in every direction). The lower one is attained by two points at
    distance D where both weigh one half, the upper one by one point.

    Parameters
    ----------
    diameter
        D, the diameter of the support of q0.
    alpha, sigma
        Noise level, positive.

    Returns
    -------
    lower, upper

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number, is negative, or for alpha and sigma is zero.
    """
    _check(diameter=diameter, alpha=alpha, sigma=sigma, positive=("alpha", "sigma"))
    half = 0.5 * alpha / sigma * diameter
    upper = _inverse_square(sigma)
    return (1.0 - half * half) * upper, upper


def posterior_trace_in_ball(radius: Number, mean_norm: Number) -> Number:
    r"""Bound tr P for data in a ball around 0 [MATH 1.7b].

    .. math:: \operatorname{tr} P \le R^2 - |m|^2 = (R - |m|)(R + |m|)

    Attained by data on the sphere. Below zero where mean_norm exceeds the radius, which contradicts the
    hypothesis.

    Parameters
    ----------
    radius
        R: the support of q0 lies in the ball of this radius around 0.
    mean_norm
        Norm of the posterior mean.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number or is negative.
    """
    _check(radius=radius, mean_norm=mean_norm)
    return (radius - mean_norm) * (radius + mean_norm)


def fisher_rank(components: int, dim: int) -> int:
    r"""Bound the rank of :math:`I/\sigma^2 - F` for point masses by min(d, N - 1) [MATH 1.6, 1.7d].

    Its range is the span of the differences of the points that carry weight. Attained by points in general
    position.

    Parameters
    ----------
    components
        N, the number of points.
    dim
        Dimension d.

    Raises
    ------
    ValueError
        If an argument is not a positive integer.
    """
    return min(positive_integer("dim", dim), positive_integer("components", components) - 1)


def _check(positive: tuple[str, ...] = (), **values: Any) -> None:
    """Raise unless all are numbers or arrays that go together, and none is negative (or, if `positive`, zero)."""
    for name, value in values.items():
        numbers = np.ravel(_numbers(name, value))
        bad = numbers <= 0 if name in positive else numbers < 0
        if bad.any():
            row = int(bad.argmax())
            where = f" in row {row}" if numbers.size > 1 else ""
            sign = "positive" if name in positive else "zero or positive"
            raise ValueError(f"{name} must be {sign}, got {numbers[row]:g}{where}")
    _check_together(values)


def _numbers(name: str, value: Any) -> Any:
    """Return a number or an array of floats on the host, or say what came instead."""
    if is_number(value):
        return real_number(name, value)
    namespace(name, value, "a number or an array")
    real_array(name, value, "(...)", value.ndim)
    has_values(name, value)
    return to_numpy(value)


def _check_together(values: dict[str, Any]) -> None:
    """Raise unless the arrays among the values share a home and broadcast."""
    arrays = {name: value for name, value in values.items() if not is_number(value)}
    if arrays:
        same_home(**arrays)
    shapes = [tuple(a.shape) for a in arrays.values()]
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        got = ", ".join(str(shape) for shape in shapes)
        raise ValueError(f"{', '.join(arrays)} must have shapes that broadcast together, got {got}") from None


def _inverse_square(sigma: Number) -> Number:
    inverse = 1.0 / sigma
    return inverse * inverse


def _at_most(value: Number, limit: float) -> Number:
    if isinstance(value, int | float):
        return value if math.isnan(value) else min(value, limit)
    xp = array_namespace(value)
    return xp.where(value > limit, xp.full_like(value, limit), value)


def _exp(value: Number) -> Number:
    """e^value, infinite without an exception or a warning where it overflows."""
    if isinstance(value, int | float):
        return math.inf if value > 709.0 else math.exp(value)
    xp = array_namespace(value)
    over = value > math.log(float(xp.finfo(value.dtype).max))
    return xp.where(over, xp.full_like(value, xp.inf), xp.exp(xp.where(over, xp.zeros_like(value), value)))
