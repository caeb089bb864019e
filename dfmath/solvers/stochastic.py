"""Schemes that draw fresh noise: a step goes below the level it is for, or starts above its own, and noise fills up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from dfmath import _checks
from dfmath.solvers.stages import Scheme, one_stage_steps

LARGEST_RISE = math.sqrt(2.0) - 1.0  # Karras et al. 2022, algorithm 2: noise added is never more than is there


@dataclass(frozen=True)
class Churn:
    """How EDM's stochastic sampler raises the noise before each step (Karras et al. 2022, algorithm 2).

    Attributes
    ----------
    amount
        S_churn: every step starts from rho (1 + gamma), gamma = min(S_churn/steps, sqrt(2) - 1).
    low, high
        S_tmin and S_tmax: only steps from these levels do.
    scale
        S_noise, of the noise that is added.
    """

    amount: float
    low: float = 0.0
    high: float = math.inf
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("amount", "low", "scale"):
            value = _checks.real_number(name, getattr(self, name))
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value:g}")
        if not self.low <= _checks.real_number("high", self.high):
            raise ValueError(f"high must not be below low, got {self.high:g} and {self.low:g}")

    def raised(self, rho: float, steps: int) -> float:
        """Level that a step from rho starts at."""
        inside = self.low <= rho <= self.high
        return rho * (1.0 + min(self.amount / steps, LARGEST_RISE)) if inside else rho


def ddpm(levels: tuple[float, ...]) -> Scheme:
    r"""Ancestral sampling (Ho et al. 2020): draws from q(z' | z, x0 = m) at each level.

    .. math:: z' = m + \frac{\rho'^2}{\rho^2} (z - m) + \rho' \sqrt{1 - \rho'^2/\rho^2}\, \xi

    that is, a step down to rho'^2/rho, and noise up to rho'.
    """
    weights, fresh = [], []
    for k, (now, after) in enumerate(pairwise(levels)):
        share = after / now
        weights.append({k: after * share - now})
        fresh.append(after * math.sqrt(1.0 - share**2))
    return one_stage_steps(levels, weights, fresh)
