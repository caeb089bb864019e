"""Schedules that keep alpha = 1 and let sigma grow: VE and EDM [MATH 0]."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dfmath.backends._compat import Array, Namespace
from dfmath.schedules.base import Schedule


@dataclass(frozen=True)
class VE(Schedule):
    """alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t, on [0, 1].

    f = 0 and g^2 = 2 sigma^2 log(sigma_max/sigma_min) [MATH 0].

    Parameters
    ----------
    sigma_min, sigma_max : float
        sigma at t = 0 and t = 1; 0 < sigma_min < sigma_max.

    References
    ----------
    Song et al., arXiv 2011.13456, equation 30 and appendix C.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def _check_parameters(self) -> None:
        _check_increasing(self.sigma_min, self.sigma_max)
        if self.sigma_min == 0.0 or math.isinf(self.sigma_max / self.sigma_min):
            raise ValueError(f"sigma_min must be positive in a geometric schedule, got {self.sigma_min!r}")

    @property
    def _log_ratio(self) -> float:
        return math.log1p((self.sigma_max - self.sigma_min) / self.sigma_min)

    def _levels(self, xp: Namespace, t: Array) -> tuple[Array, Array]:
        return _constant(1.0, t), self.sigma_min * xp.exp(t * self._log_ratio)

    def _time(self, xp: Namespace, rho: Array) -> Array:
        return xp.log1p((rho - self.sigma_min) / self.sigma_min) / self._log_ratio

    def _drift(self, xp: Namespace, t: Array) -> Array:
        return _constant(0.0, t)

    def _diffusion_squared(self, xp: Namespace, t: Array) -> Array:
        sigma = self._levels(xp, t)[1]
        return 2.0 * sigma * sigma * self._log_ratio


@dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1, sigma = t, on [sigma_min, sigma_max]: here rho = t, f = 0 and g^2 = 2 t [MATH 0].

    Parameters
    ----------
    sigma_min, sigma_max : float
        The domain; 0 <= sigma_min < sigma_max.

    References
    ----------
    Karras et al., *Elucidating the design space of diffusion-based generative models*, arXiv 2206.00364,
    table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def _check_parameters(self) -> None:
        _check_increasing(self.sigma_min, self.sigma_max)

    @property
    def domain(self) -> tuple[float, float]:
        """(sigma_min, sigma_max)."""
        return self.sigma_min, self.sigma_max

    def _levels(self, xp: Namespace, t: Array) -> tuple[Array, Array]:
        return _constant(1.0, t), t

    def _time(self, xp: Namespace, rho: Array) -> Array:
        return rho

    def _drift(self, xp: Namespace, t: Array) -> Array:
        return _constant(0.0, t)

    def _diffusion_squared(self, xp: Namespace, t: Array) -> Array:
        return 2.0 * t


def _check_increasing(sigma_min: float, sigma_max: float) -> None:
    if not 0.0 <= sigma_min < sigma_max:
        raise ValueError(
            "sigma_min and sigma_max must satisfy 0 <= sigma_min < sigma_max, "
            f"got sigma_min={sigma_min!r}, sigma_max={sigma_max!r}"
        )


def _constant(value: float, t: Array) -> Array:
    # 0 t + value has t's type, shape and device, whichever namespace it belongs to.
    return 0.0 * t + value
