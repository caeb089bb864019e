"""Deterministic samplers as explicit linear schemes in canonical coordinates [MATH 2.2, 6.1].

In z = x/alpha and rho = sigma/alpha the probability flow is dz/drho = eps(z, rho), whatever the schedule. Every
explicit solver of it adds multiples of noises at earlier states to an earlier state, so one description serves all of
them: what runs it, and what transposes it, need not know which solver it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from dfmath import _checks

__all__ = ["Scheme", "Solver", "Stage", "noise_levels", "scheme"]

Solver = Literal["ddim", "deis", "heun", "dpm++2m"]
SOLVERS = get_args(Solver)
SPACINGS = ("edm", "log")
HIGHEST_ORDER = 3  # of the polynomials of DEIS; beyond it extrapolation is no longer stable
EDM_EXPONENT = 7.0  # Karras et al. 2022, eq. 5
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(32)


@dataclass(frozen=True)
class Stage:
    r"""One new state: an earlier one plus multiples of noises, z_start + sum_i w_i eps_i.

    Attributes
    ----------
    start
        Number of the state that is added to.
    weights
        w_i, by the number i of the state at which eps_i = eps(z_i, rho_i) was evaluated.
    """

    start: int
    weights: Mapping[int, float]


@dataclass(frozen=True)
class Scheme:
    """An explicit linear scheme: stage k makes state k + 1, and every state but the last is evaluated once.

    Attributes
    ----------
    rhos
        Noise-to-signal ratio of every state, that of state 0, which is given, first.
    stages
        How the others are made.
    ends
        Numbers of the states that are ends of sampling steps, 0 and the last included; those between are predictors.

    Raises
    ------
    ValueError
        If numbers do not fit, a stage needs what is not there yet, or a state without noise would be evaluated.
    """

    rhos: tuple[float, ...]
    stages: tuple[Stage, ...]
    ends: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.stages or len(self.rhos) != len(self.stages) + 1:
            raise ValueError(f"rhos must be one more than stages, got {len(self.rhos)} and {len(self.stages)}")
        if not all(0.0 < rho < math.inf for rho in self.rhos[:-1]) or not 0.0 <= self.rhos[-1] < math.inf:
            raise ValueError(f"rhos must be positive and finite, the last may be 0, got {self.rhos}")
        for k, stage in enumerate(self.stages):
            _check_stage(k, stage)
        whole = self.ends[:1] == (0,) and self.ends[-1:] == (len(self.stages),)
        if not whole or any(b <= a for a, b in pairwise(self.ends)):
            raise ValueError(f"ends must increase from 0 to {len(self.stages)}, got {self.ends}")

    @property
    def evaluations(self) -> int:
        """How often the noise is evaluated."""
        return len(self.stages)


def scheme(
    solver: Solver,
    rhos: Sequence[float],
    *,
    order: int | None = None,
    time: Callable[[float], float] | None = None,
) -> Scheme:
    r"""Return the scheme of a solver on a grid of noise levels [MATH 6.1].

    .. math:: z_{k+1} = z_k + \int_{\rho_k}^{\rho_{k+1}} \hat\epsilon(\rho) \, d\rho

    with a model of the noise between levels:

    ``ddim``     the last noise (Song et al. 2021), one evaluation for each step, first order;
    ``deis``     tAB-DEIS (Zhang & Chen 2022), the polynomial in time(rho) through the last order + 1 noises, fewer in
                 the first steps: convergence of order + 1;
    ``heun``     Karras et al. 2022, algorithm 1: the mean of the noises at both ends, two evaluations, second order;
    ``dpm++2m``  DPM-Solver++(2M) (Lu et al. 2022), the line in log rho through the last two predictions of the data
                 m = z - rho eps, second order.

    A step to rho = 0 is DDIM's with every solver, and returns the last m: log rho has no value there.

    Parameters
    ----------
    rhos
        Strictly decreasing; the last may be 0.
    order
        Of ``deis``, and only for it: 0 (which is DDIM) to 3; 2 if not given.
    time
        Of ``deis``, and only for it: what polynomials are in; log rho if not given. A schedule's own ``time`` is what
        the DEIS paper takes.

    Returns
    -------
    Scheme

    Raises
    ------
    TypeError, ValueError
        If the solver is unknown, levels do not decrease, or an option does not belong to the solver or is out of range.

    Examples
    --------
    >>> scheme("heun", [2.0, 1.0, 0.0]).stages[1]
    Stage(start=0, weights={0: -0.5, 1: -0.5})
    """
    _checks.one_of("solver", solver, SOLVERS)
    levels = _levels(rhos)
    if solver == "deis":
        return _one_stage_steps(levels, _polynomial_weights(levels, _order(order), time or math.log))
    for name, value in {"order": order, "time": time}.items():
        if value is not None:
            raise ValueError(f"{name} is an option of solver 'deis', got it for {solver!r}")
    if solver == "heun":
        return _heun(levels)
    return _one_stage_steps(levels, _two_step_weights(levels) if solver == "dpm++2m" else _euler_weights(levels))


def noise_levels(
    rho_max: float, rho_min: float, steps: int, spacing: Literal["edm", "log"] = "edm"
) -> tuple[float, ...]:
    r"""Return steps + 1 noise levels from rho_max to rho_min.

    .. math:: \rho_k = \left(\rho_{max}^{1/7} + \tfrac{k}{n} (\rho_{min}^{1/7} - \rho_{max}^{1/7})\right)^7

    for ``edm`` (Karras et al. 2022, eq. 5); ``log`` is even in log rho. EDM samplers add a last level 0.

    Raises
    ------
    ValueError
        If not rho_max > rho_min > 0, or the rest is out of range.
    """
    count, _ = _checks.positive_integer("steps", steps), _checks.one_of("spacing", spacing, SPACINGS)
    high, low = _checks.real_number("rho_max", rho_max), _checks.real_number("rho_min", rho_min)
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"rho_max and rho_min must be finite with rho_max > rho_min > 0, got {high:g} and {low:g}")
    if spacing == "log":
        inner = np.geomspace(high, low, count + 1)
    else:
        inner = np.linspace(high ** (1.0 / EDM_EXPONENT), low ** (1.0 / EDM_EXPONENT), count + 1) ** EDM_EXPONENT
    return (high, *map(float, inner[1:-1]), low)


def _euler_weights(levels: tuple[float, ...]) -> list[dict[int, float]]:
    """DDIM: the noise stays what it was."""
    return [{k: levels[k + 1] - levels[k]} for k in range(len(levels) - 1)]


def _polynomial_weights(
    levels: tuple[float, ...], order: int, time: Callable[[float], float]
) -> list[dict[int, float]]:
    """tAB-DEIS: integrals of Lagrange's polynomials through the last evaluations."""
    weights, euler = [], _euler_weights(levels)
    times = _times(levels, time)
    for k, plain in enumerate(euler):
        nodes = range(max(0, k - order), k + 1)
        if levels[k + 1] == 0.0 or len(nodes) == 1:
            weights.append(plain)
            continue
        rho, measure = _quadrature(levels[k], levels[k + 1])
        at = np.asarray([float(time(float(r))) for r in rho])
        weights.append({i: float(measure @ _lagrange(at, times, i, nodes)) for i in nodes})
    return weights


def _quadrature(start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre in log rho, in which integrands are smooth over steps of any length: points, and weights."""
    middle, half = 0.5 * math.log(start * end), 0.5 * math.log(end / start)
    rho = np.exp(middle + half * _NODES)
    return rho, half * _NODE_WEIGHTS * rho


def _lagrange(at: np.ndarray, times: Sequence[float], i: int, nodes: range) -> np.ndarray:
    """The polynomial that is 1 at node i and 0 at the others."""
    factors = [(at - times[j]) / (times[i] - times[j]) for j in nodes if j != i]
    return np.prod(factors, axis=0)


def _two_step_weights(levels: tuple[float, ...]) -> list[dict[int, float]]:
    """DPM-Solver++(2M), z + (rho' - rho) eps + c (m - m_before) with c = (1 - rho'/rho) h/(2 h_before).

    With m = z - rho eps, its change is that of z, which earlier noises made, less that of rho eps. So the scheme is
    one in noises alone, of all earlier steps.
    """
    weights = _euler_weights(levels)
    for k in range(1, len(weights)):
        before, now, after = levels[k - 1 : k + 2]
        if after == 0.0:
            continue
        share = 0.5 * (1.0 - after / now) * math.log(now / after) / math.log(before / now)
        change = dict(weights[k - 1])
        change[k - 1] += before
        change[k] = -now
        weights[k] = {i: share * change[i] + weights[k].get(i, 0.0) for i in change}
    return weights


def _one_stage_steps(levels: tuple[float, ...], weights: list[dict[int, float]]) -> Scheme:
    """Every step is one stage from the state before."""
    stages = tuple(Stage(k, weight) for k, weight in enumerate(weights))
    return Scheme(levels, stages, tuple(range(len(levels))))


def _heun(levels: tuple[float, ...]) -> Scheme:
    """Euler's step, and from the same state one with the mean of both noises."""
    rhos, ends = [levels[0]], [0]
    stages: list[Stage] = []
    for before, after in pairwise(levels):
        now, step = len(stages), after - before
        stages.append(Stage(now, {now: step}))
        rhos.append(after)
        if after > 0.0:
            stages.append(Stage(now, {now: 0.5 * step, now + 1: 0.5 * step}))
            rhos.append(after)
        ends.append(len(stages))
    return Scheme(tuple(rhos), tuple(stages), tuple(ends))


def _levels(rhos: Any) -> tuple[float, ...]:
    """Validate a grid of noise levels."""
    try:
        levels = tuple(_checks.real_number("rhos", rho) for rho in rhos)
    except TypeError:
        raise TypeError(f"rhos must be a sequence of real numbers, got {_checks.describe(rhos)}") from None
    if len(levels) < 2:
        raise ValueError(f"rhos must hold at least two levels, got {len(levels)}")
    for k, (before, after) in enumerate(pairwise(levels)):
        if not math.inf > before > after >= 0.0:
            raise ValueError(
                "rhos must be finite and decrease strictly, to 0 at the least, "
                f"got {before:g} and {after:g} at indices {k} and {k + 1}"
            )
    return levels


def _order(order: Any) -> int:
    """Validate the order of polynomials."""
    return 2 if order is None else _checks.index("order", order, HIGHEST_ORDER + 1)


def _times(levels: tuple[float, ...], time: Callable[[float], float]) -> list[float]:
    """Times of the levels that are evaluated; they must tell levels apart."""
    if not callable(time):
        raise TypeError(f"time must be a function of rho, got {_checks.describe(time)}")
    times = [_checks.real_number("time(rho)", time(rho)) for rho in levels[:-1]]
    for rho, t in zip(levels, times, strict=False):
        if not math.isfinite(t):
            raise ValueError(f"time must be finite at every level, got {t:g} at rho = {rho:g}")
    if any(b >= a for a, b in pairwise(times)):
        raise ValueError("time must increase strictly with rho, got one that does not on the given levels")
    return times


def _check_stage(k: int, stage: Stage) -> None:
    """Raise unless stage k uses states that are there, and finite weights."""
    used = [stage.start, *stage.weights]
    if not all(0 <= i <= k for i in used):
        raise ValueError(f"stage {k} must use states 0 to {k}, got {sorted(used)}")
    if not all(math.isfinite(weight) for weight in stage.weights.values()):
        raise ValueError(f"stage {k} must have finite weights, got {dict(stage.weights)}")
