"""The scheme of a solver on a grid of noise levels, by the solver's name [MATH 6.1, 6.2]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from dfmath import _checks
from dfmath.schedules import Schedule
from dfmath.solvers.grids import levels_of
from dfmath.solvers.heun import heun
from dfmath.solvers.multistep import HIGHEST_ORDER, euler_weights, pndm, polynomial_weights, two_step
from dfmath.solvers.stages import Scheme, one_stage_steps
from dfmath.solvers.stochastic import Churn, ddpm

Solver = Literal["ddim", "deis", "heun", "dpm++2m", "pndm", "ddpm"]
SOLVERS = get_args(Solver)
_OWNERS = {"order": "deis", "time": "deis", "normalizer": "deis", "churn": "heun"}


def scheme(
    solver: Solver,
    rhos: Sequence[float],
    *,
    order: int | None = None,
    time: Callable[[float], float] | Schedule | None = None,
    normalizer: Callable[[float], float] | None = None,
    churn: Churn | None = None,
) -> Scheme:
    r"""Return the scheme of a solver on a grid of noise levels [MATH 6.1, 6.2].

    .. math:: z_{k+1} = z_k + \int_{\rho_k}^{\rho_{k+1}} \hat\epsilon(\rho) \, d\rho

    with a model of the noise between levels:

    ``ddim``
        The last noise (Song et al. 2021), one evaluation for each step, first order; Euler's method in rho.
    ``deis``
        DEIS (Zhang & Chen 2022), the polynomial in time(rho) through the last order + 1 noises, fewer in the first
        steps: convergence of order + 1.
    ``heun``
        Karras et al. 2022, algorithm 1: the mean of the noises at both ends, two evaluations, second order.
    ``dpm++2m``
        DPM-Solver++(2M) (Lu et al. 2022), the line in log rho through the last two predictions of the data
        m = z - rho eps, second order.
    ``pndm``
        PNDM's linear multistep form (Liu et al. 2022): Adams and Bashforth's weights for even steps, whatever the
        steps are; a first step of Heun, whose end is evaluated anew.
    ``ddpm``
        Ancestral sampling (Ho et al. 2020), stochastic: DDIM's step down to rho'^2/rho, and noise up to rho'.

    A step to rho = 0 is DDIM's with every solver, and returns the last m: log rho has no value there.

    Parameters
    ----------
    solver
        One of these names.
    rhos
        Strictly decreasing; the last may be 0.
    order
        Of ``deis``, and only for it: 0 (which is DDIM, unless normalised) to 3; 2 if not given.
    time
        Of ``deis``, and only for it: what polynomials are in, a function of rho; log rho if not given. A schedule
        stands for its time and makes tAB-DEIS, ``lambda rho: rho`` rhoAB-DEIS.
    normalizer
        Of ``deis``, and only for it: n(rho) > 0, the size that noises have at rho. Polynomials are then through
        eps/n, as DEIS-SN has it (Xia et al. 2023); see `dfmath.normalizers`.
    churn
        Of ``heun``, and only for it: EDM's stochastic sampler, their algorithm 2.

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
    Stage(start=0, weights={0: -0.5, 1: -0.5}, fresh=0.0, states={})
    """
    _checks.one_of("solver", solver, SOLVERS)
    levels = levels_of(rhos)
    for name, value in {"order": order, "time": time, "normalizer": normalizer, "churn": churn}.items():
        if value is not None and solver != _OWNERS[name]:
            raise ValueError(f"{name} is an option of solver {_OWNERS[name]!r}, got it for {solver!r}")
    if churn is not None:
        _checks.instance("churn", churn, Churn)
    made: dict[str, Callable[[], Scheme]] = {
        "ddim": lambda: one_stage_steps(levels, euler_weights(levels)),
        "deis": lambda: one_stage_steps(levels, polynomial_weights(levels, _order(order), _variable(time), normalizer)),
        "heun": lambda: heun(levels, churn),
        "dpm++2m": lambda: two_step(levels),
        "pndm": lambda: pndm(levels),
        "ddpm": lambda: ddpm(levels),
    }
    return made[solver]()


def _variable(time: Any) -> Callable[[float], float]:
    """What polynomials are in, as a function of rho."""
    if time is None:
        return math.log
    return _TimeOf(time) if isinstance(time, Schedule) else time


class _TimeOf:
    """A schedule's time, as a function of rho that says where it is not smooth."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.kinks = schedule, schedule.kinks

    def __call__(self, rho: float) -> float:
        return float(self.schedule.time(rho))


def _order(order: Any) -> int:
    """Validate the order of polynomials."""
    return 2 if order is None else _checks.index("order", order, HIGHEST_ORDER + 1)
