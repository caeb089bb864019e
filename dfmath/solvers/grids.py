"""Grids of noise levels that samplers step along."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from dfmath import _checks
from dfmath.schedules import Schedule

Spacing = Literal["edm", "log", "time", "time-squared"]
SPACINGS = get_args(Spacing)
EDM_EXPONENT = 7.0  # Karras et al. 2022, eq. 5


def noise_levels(
    rho_max: float, rho_min: float, steps: int, spacing: Spacing = "edm", schedule: Schedule | None = None
) -> tuple[float, ...]:
    r"""Return steps + 1 noise levels from rho_max to rho_min.

    .. math:: h(\rho_k) = h(\rho_{max}) + \tfrac{k}{n} \left(h(\rho_{min}) - h(\rho_{max})\right)

    EDM samplers add a last level 0.

    Parameters
    ----------
    rho_max, rho_min
        Highest and lowest level.
    steps
        n, one less than the levels.
    spacing
        What h is. ``edm``: rho^(1/7) (Karras et al. 2022, eq. 5). ``log``: log rho. ``time``: t(rho), even in the
        schedule's time, as DDIM's and DDPM's grids are. ``time-squared``: sqrt(t(rho)), denser at low noise, DEIS's own
        grid (Zhang & Chen 2022).
    schedule
        Of the last two, and only for them.

    Raises
    ------
    ValueError
        If not rho_max > rho_min > 0, a level is one that the schedule does not reach, or the rest is out of range.

    Examples
    --------
    >>> [round(rho, 9) for rho in noise_levels(8.0, 1.0, 3, "log")]
    [8.0, 4.0, 2.0, 1.0]
    """
    count, _ = _checks.positive_integer("steps", steps), _checks.one_of("spacing", spacing, SPACINGS)
    high, low = _checks.real_number("rho_max", rho_max), _checks.real_number("rho_min", rho_min)
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"rho_max and rho_min must be finite with rho_max > rho_min > 0, got {high:g} and {low:g}")
    if spacing.startswith("time") != (schedule is not None):
        raise ValueError("schedule belongs to spacing 'time' and 'time-squared': give both or neither")
    if schedule is not None:
        inner = _even_in_time(schedule, high, low, count, 1.0 if spacing == "time" else 0.5)
    elif spacing == "log":
        inner = np.geomspace(high, low, count + 1)
    else:
        inner = np.linspace(high ** (1.0 / EDM_EXPONENT), low ** (1.0 / EDM_EXPONENT), count + 1) ** EDM_EXPONENT
    return (high, *map(float, inner[1:-1]), low)


def levels_of(rhos: Any) -> tuple[float, ...]:
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


def _even_in_time(schedule: Schedule, high: float, low: float, count: int, power: float) -> np.ndarray:
    """Levels whose times, to a power, are even."""
    _checks.instance("schedule", schedule, Schedule)
    with _checks.on_behalf_of("rho_max and rho_min"):
        first, last = (schedule.time(rho) ** power for rho in (high, low))
    times = np.linspace(first, last, count + 1) ** (1.0 / power)
    return np.asarray([schedule.rho(float(t)) for t in times[:-1]] + [low])
