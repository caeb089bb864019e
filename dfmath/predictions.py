"""Conversions between what networks predict: eps, score, x0, v and flow [MATH 0, 1.1]."""

from __future__ import annotations

import math
from typing import Literal, get_args

from dfmath._checks import describe, has_values, is_number, namespace, one_of, real_number, same_home
from dfmath.backends._compat import Array, Namespace, array_namespace

__all__ = ["Prediction", "convert"]

Prediction = Literal["eps", "score", "x0", "v", "flow"]


def convert(value: Array, x: Array, alpha: Array, sigma: Array, source: Prediction, target: Prediction) -> Array:
    """Return the prediction `target` that says the same as the prediction `source` at the noised point x.

    With x = alpha x0 + sigma eps, every prediction is a combination a x0 + b eps::

        eps   = eps                       x0   = x0
        score = -eps/sigma                flow = eps - x0
        v     = alpha eps - sigma x0

    so x and the prediction are two linear equations for (x0, eps), of determinant alpha b - sigma a. Nothing
    is assumed of alpha^2 + sigma^2. For the ideal predictions these are Tweedie's formula [MATH 1.1].

    Parameters
    ----------
    value : array, shape of x
        The prediction `source`, in the namespace, dtype and device of x.
    x : floating array, shape (B, ...)
        The noised point at which it was made. Entries of x and value that are not finite are passed on.
    alpha, sigma : float or array of shape () or (B,)
        Signal and noise level, not negative; arrays hold one level per query.
    source, target : {"eps", "score", "x0", "v", "flow"}
        What `value` is, and what is wanted.

    Returns
    -------
    array, shape, namespace, dtype and device of x

    Raises
    ------
    ValueError
        On an unknown prediction, shapes or devices that do not fit, a level that is negative or not finite,
        or a singular conversion: to score at sigma = 0; from eps or score to x0, v or flow at alpha = 0;
        from x0 at sigma = 0; from v or flow at alpha = sigma = 0.
    TypeError
        If the arrays differ in namespace, value and x differ in dtype, or x is not real floating.

    References
    ----------
    v: Salimans & Ho, *Progressive distillation for fast sampling of diffusion models*, arXiv 2202.00512;
    flow: Liu et al., arXiv 2209.03003.

    Examples
    --------
    >>> import numpy as np
    >>> from dfmath.predictions import convert
    >>> x0, eps = np.array([[3.0]]), np.array([[1.0]])
    >>> x = 0.75 * x0 + 0.25 * eps
    >>> float(convert(eps - x0, x, 0.75, 0.25, "flow", "x0")[0, 0])
    3.0
    """
    one_of("source", source, get_args(Prediction))
    one_of("target", target, get_args(Prediction))
    xp = _check_arrays(value, x, alpha=alpha, sigma=sigma)
    alpha, sigma = _level("alpha", alpha, x), _level("sigma", sigma, x)
    if source == target:
        return value
    _check_possible(alpha, sigma, source, target)
    # The score is eps in another unit: eps = unit * score.
    unit = -_spread(xp, sigma, x)
    value = unit * value if source == "score" else value
    value = _combine(xp, value, x, alpha, sigma, _unitless(source), _unitless(target))
    return value / unit if target == "score" else value


def _combine(xp: Namespace, value: Array, x: Array, alpha: Array, sigma: Array, source: str, target: str) -> Array:
    """Return c x0 + d eps, where alpha x0 + sigma eps = x and a x0 + b eps = value (Cramer's rule)."""
    if source == target:
        return value
    (a, b), (c, d) = _coefficients(source, alpha, sigma), _coefficients(target, alpha, sigma)
    determinant = alpha * b - sigma * a
    of_x, of_value = (c * b - d * a) / determinant, (alpha * d - sigma * c) / determinant
    return _spread(xp, of_x, x) * x + _spread(xp, of_value, x) * value


def _coefficients(prediction: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """Return (a, b) of the prediction a x0 + b eps."""
    table = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-sigma, alpha), "flow": (-1.0, 1.0)}
    return table[prediction]


def _unitless(prediction: str) -> str:
    return "eps" if prediction == "score" else prediction


def _spread(xp: Namespace, level: Array, x: Array) -> Array:
    """Return a number, or an array () or (B,) in the dtype of x and in a shape that multiplies x."""
    if isinstance(level, float):
        return float(level)  # a NumPy scalar, unlike a number, would widen x
    return xp.reshape(xp.astype(level, x.dtype), level.shape + (1,) * (x.ndim - len(level.shape)))


def _check_arrays(value: Array, x: Array, **levels: Array) -> Namespace:
    """Return the one namespace of all arrays, or say what does not fit."""
    for name, array in {"x": x, "value": value}.items():
        namespace(name, array)
    xp = array_namespace(x)
    if not xp.isdtype(x.dtype, "real floating"):
        raise TypeError(f"x must be real floating, got {describe(x)}")
    if x.ndim == 0:
        raise ValueError(f"x must have shape (B, ...), got {describe(x)}")
    same_home(x=x, value=value, **levels)
    if value.dtype != x.dtype:
        raise TypeError(f"value must have the dtype of x, {x.dtype}, got {describe(value)}")
    if value.shape != x.shape:
        raise ValueError(f"value must have the shape of x, {tuple(x.shape)}, got {describe(value)}")
    return xp


def _level(name: str, level: Array, x: Array) -> Array:
    """Return alpha or sigma as a float or as an array () or (B,), once it is known to be a level."""
    expected = f"{name} must be finite and not negative"
    if is_number(level):
        number = real_number(name, level)
        _require(0.0 <= number < math.inf, f"{expected}, got {number:g}")
        return number
    _check_level_array(name, level, x)
    _require((level >= 0.0) & (level < math.inf), expected, level)
    return level


def _check_level_array(name: str, level: Array, x: Array) -> None:
    namespace(name, level, "a number or an array")
    has_values(name, level)
    if not array_namespace(x).isdtype(level.dtype, "real floating"):
        raise TypeError(f"{name} must be real floating, got {describe(level)}")
    if tuple(level.shape) not in {(), tuple(x.shape[:1])}:
        raise ValueError(f"{name} must have shape () or {tuple(x.shape[:1])}, got {describe(level)}")


def _check_possible(alpha: Array, sigma: Array, source: str, target: str) -> None:
    """Refuse what has no answer: a division by sigma, or two equations for (x0, eps) that are one."""
    what = f"{source} cannot be turned into {target} where"
    if target == "score":
        _require(sigma != 0.0, f"{what} sigma = 0")
    if _unitless(source) == _unitless(target):
        return
    if source in ("eps", "score"):
        _require(alpha != 0.0, f"{what} alpha = 0")
    elif source == "x0":
        _require(sigma != 0.0, f"{what} sigma = 0")
    else:
        _require(alpha + sigma != 0.0, f"{what} alpha = sigma = 0")


def _require(good: Array, message: str, given: Array | None = None) -> None:
    """Raise ValueError unless all of good is true; of an array, name the first entry that is not, and say what came."""
    if isinstance(good, bool) or not good.shape:
        if not bool(good):
            raise ValueError(message if given is None else f"{message}, got {float(given):g}")
        return
    xp = array_namespace(good)
    if not bool(xp.all(good)):
        i = int(xp.argmin(xp.astype(good, xp.int32)))
        came = "" if given is None else f", got {float(given[i]):g}"
        raise ValueError(f"{message}{came}: index {i}")
