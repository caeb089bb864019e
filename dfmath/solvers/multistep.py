"""Solvers that use noises of earlier steps: DEIS, DPM-Solver++(2M) and PNDM [MATH 6.1, 6.2]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from dfmath import _checks
from dfmath.solvers.stages import Scheme, Stage

HIGHEST_ORDER = 3  # of the polynomials of DEIS; beyond it extrapolation is no longer stable
QUADRATURE_ERROR = 1e-12  # of DEIS's coefficients, relative
ADAMS_BASHFORTH = (
    (1.0,),
    (1.5, -0.5),
    (23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0),
    (55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0),
)  # the last noise first

Variable = Callable[[float], float]  # of rho; where it is not smooth is said by its `kinks`, if it has any


def euler_weights(levels: tuple[float, ...]) -> list[dict[int, float]]:
    """DDIM: the noise stays what it was."""
    return [{k: levels[k + 1] - levels[k]} for k in range(len(levels) - 1)]


def polynomial_weights(
    levels: tuple[float, ...], order: int, time: Variable, size: Variable | None
) -> list[dict[int, float]]:
    r"""DEIS: integrals of Lagrange's polynomials L_i in time(rho) through the last noises, relative to their size.

    .. math:: w_i = \int_{\rho_k}^{\rho_{k+1}} \frac{n(\rho)}{n(\rho_i)} L_i(time(\rho)) \, d\rho
    """
    weights, times = euler_weights(levels), _values("time", time, levels)
    if any(b >= a for a, b in pairwise(times)):
        raise ValueError("time must increase strictly with rho, got one that does not on the given levels")
    sizes = [1.0] * len(times) if size is None else _sizes(size, levels)
    for k, (start, end) in enumerate(pairwise(levels)):
        nodes = range(max(0, k - order), k + 1)
        if end > 0.0 and (size is not None or len(nodes) > 1):
            weights[k] = _integrals(start, end, [times[i] for i in nodes], time, size, [sizes[i] for i in nodes], nodes)
    return weights


def _integrals(
    start: float,
    end: float,
    times: Sequence[float],
    time: Variable,
    size: Variable | None,
    sizes: Sequence[float],
    nodes: range,
) -> dict[int, float]:
    """Weights of one step, by adaptive quadrature in log rho: integrands are smooth in it over steps of any length."""
    from scipy.integrate import quad_vec

    def integrand(log_rho: float) -> np.ndarray:
        rho = math.exp(log_rho)
        weight = -rho if size is None else -rho * float(size(rho))  # noise falls, and SciPy's points must rise
        return weight * _lagrange(float(time(rho)), times) / sizes

    found, error = quad_vec(
        integrand,
        math.log(end),
        math.log(start),
        epsabs=0.0,
        epsrel=QUADRATURE_ERROR,
        norm="max",
        limit=20_000,
        points=[math.log(rho) for f in (time, size) for rho in getattr(f, "kinks", ()) if end < rho < start],
    )
    largest = np.abs(found).max()
    if not error <= 1e3 * QUADRATURE_ERROR * largest:
        raise ValueError(
            f"time and normalizer must be functions that can be integrated, got an error of {error / largest:g} "
            f"from rho = {start:g} to {end:g}"
        )
    return {i: float(value) for i, value in zip(nodes, found, strict=True)}


def _lagrange(at: float, times: Sequence[float]) -> np.ndarray:
    """The polynomials that are 1 at one time and 0 at the others, at a time between."""
    return np.asarray([math.prod((at - other) / (own - other) for other in times if other != own) for own in times])


def two_step(levels: tuple[float, ...]) -> Scheme:
    """DPM-Solver++(2M): z + (rho' - rho) eps + c (m - m_before), m = z - rho eps, c = (1 - rho'/rho) h/(2 h_before)."""
    stages = []
    for k, weights in enumerate(euler_weights(levels)):
        if k == 0 or levels[k + 1] == 0.0:
            stages.append(Stage(k, weights))
            continue
        before, now, after = levels[k - 1 : k + 2]
        share = 0.5 * (1.0 - after / now) * math.log(now / after) / math.log(before / now)
        noises = {k - 1: share * before, k: weights[k] - share * now}
        stages.append(Stage(k, noises, states={k - 1: -share, k: share}))
    return Scheme(levels, tuple(stages), tuple(range(len(levels))))


def pndm(levels: tuple[float, ...]) -> Scheme:
    """PNDM's linear multistep form (Liu et al. 2022): DDIM's step with Adams and Bashforth's mean of noises.

    The first step is Heun's, and its end is evaluated anew; orders then grow from 2 to 4.
    """
    euler = euler_weights(levels)
    if levels[1] == 0.0:
        return Scheme(levels, (Stage(0, euler[0]),), (0, 1))
    half = 0.5 * euler[0][0]
    stages = [Stage(0, euler[0]), Stage(0, {0: half, 1: half})]
    for k in range(1, len(euler)):
        used = [k + 1, *range(k, 1, -1), 0][:4]  # state 1 was a predictor
        factors = ADAMS_BASHFORTH[len(used) - 1] if levels[k + 1] > 0.0 else (1.0,)
        step = levels[k + 1] - levels[k]
        stages.append(Stage(k + 1, {i: step * factor for i, factor in zip(used, factors, strict=False)}))
    return Scheme((levels[0], *levels[1:2], *levels[1:]), tuple(stages), (0, *range(2, len(levels) + 1)))


def _values(name: str, function: Any, levels: tuple[float, ...]) -> list[float]:
    """A function of rho at the levels that are evaluated, finite."""
    if not callable(function):
        raise TypeError(f"{name} must be a function of rho, got {_checks.describe(function)}")
    found = [_checks.real_number(f"{name}(rho)", function(rho)) for rho in levels[:-1]]
    for rho, value in zip(levels, found, strict=False):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite at every level, got {value:g} at rho = {rho:g}")
    return found


def _sizes(size: Any, levels: tuple[float, ...]) -> list[float]:
    found = _values("normalizer", size, levels)
    if min(found) <= 0.0:
        raise ValueError(f"normalizer must be positive at every level, got {min(found):g}")
    return found
