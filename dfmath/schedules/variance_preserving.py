"""Schedules with a linear rate beta, variance-preserving and sub-VP, and the cosine schedule [MATH 0]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from dfmath.backends._compat import Array, Namespace
from dfmath.schedules.base import Schedule


@dataclass(frozen=True)
class VP(Schedule):
    """Variance-preserving schedules: alpha^2 + sigma^2 = 1, hence g^2 = -2 f [MATH 0].

    `VP.linear` and `VP.cosine` make one; `Discrete` is the third of the family.

    References
    ----------
    Song et al., *Score-based generative modeling through SDEs*, arXiv 2011.13456.
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        """Refuse the family itself."""
        if cls is VP:
            raise TypeError("VP is a family of schedules: use VP.linear() or VP.cosine()")
        return super().__new__(cls)

    @staticmethod
    def linear(beta_min: float = 0.1, beta_max: float = 20.0) -> VPLinear:
        """beta(t) = beta_min + t (beta_max - beta_min); see `VPLinear`."""
        return VPLinear(beta_min, beta_max)

    @staticmethod
    def cosine(s: float = 0.008) -> VPCosine:
        """alpha(t) proportional to cos((pi/2) (t + s)/(1 + s)); see `VPCosine`."""
        return VPCosine(s)

    def _diffusion_squared(self, xp: Namespace, t: Array) -> Array:
        return -2.0 * self._drift(xp, t)


@dataclass(frozen=True)
class _LinearRate(Schedule):
    """alpha = exp(-B/2), B the integral of beta = beta_min + t (beta_max - beta_min): VP's and sub-VP's."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _check_parameters(self) -> None:
        # Up to here rho^2 = exp(B) - 1 is a float; alpha is already below 1e-108.
        if not 0.0 < self.beta_min <= self.beta_max <= 500.0:
            raise ValueError(
                "beta_min and beta_max must satisfy 0 < beta_min <= beta_max <= 500, "
                f"got beta_min={self.beta_min!r}, beta_max={self.beta_max!r}"
            )

    def _rate(self, t: Array) -> Array:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Array) -> Array:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _time_of_integral(self, xp: Namespace, integral: Array) -> Array:
        # The root of a quadratic in the form that adds where the usual one subtracts.
        discriminant = self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * integral
        return 2.0 * integral / (self.beta_min + xp.sqrt(discriminant))

    def _drift(self, xp: Namespace, t: Array) -> Array:
        return -0.5 * self._rate(t)


@dataclass(frozen=True)
class VPLinear(_LinearRate, VP):
    """alpha = exp(-B/2), sigma = sqrt(1 - exp(-B)), B = beta_min t + (beta_max - beta_min) t^2/2, on [0, 1].

    f = -beta/2 and g^2 = beta [MATH 0], rho = sqrt(exp(B) - 1).

    Parameters
    ----------
    beta_min, beta_max : float
        beta at t = 0 and t = 1; 0 < beta_min <= beta_max <= 500.

    References
    ----------
    Song et al., arXiv 2011.13456, equation 32 and appendix C.

    Examples
    --------
    >>> from dfmath.schedules import VP
    >>> alpha, sigma = VP.linear()(0.5)
    >>> round(alpha, 12), round(alpha**2 + sigma**2, 12)
    (0.281182880797, 1.0)
    """

    def _levels(self, xp: Namespace, t: Array) -> tuple[Array, Array]:
        integral = self._integral(t)
        return xp.exp(-0.5 * integral), xp.sqrt(-xp.expm1(-integral))

    def _time(self, xp: Namespace, rho: Array) -> Array:
        return self._time_of_integral(xp, xp.log1p(rho * rho))


@dataclass(frozen=True)
class VPCosine(VP):
    """alpha = cos(u)/cos(u0), u = (pi/2) (t + s)/(1 + s), u0 = u(0); sigma = sqrt(1 - alpha^2); on [0, 1].

    f = -u' tan(u) and g^2 = -2 f [MATH 0]. At t = 1 alpha is exactly 0: only (alpha, sigma) is defined
    there. The discrete original clips its betas at 0.999 instead; give such a table to `Discrete`.

    Parameters
    ----------
    s : float
        The offset that keeps beta from vanishing at t = 0; 0 <= s <= 1.

    References
    ----------
    Nichol & Dhariwal, *Improved denoising diffusion probabilistic models*, arXiv 2102.09672, equation 17.
    """

    s: float = 0.008
    _ends_in_noise: ClassVar[bool] = True

    def _check_parameters(self) -> None:
        if not 0.0 <= self.s <= 1.0:
            raise ValueError(f"s must lie in [0, 1], got {self.s!r}")

    @property
    def _speed(self) -> float:
        return 0.5 * math.pi / (1.0 + self.s)

    def _levels(self, xp: Namespace, t: Array) -> tuple[Array, Array]:
        # cos(u) = sin(pi/2 - u) is accurate at t = 1;
        # cos^2 u0 - cos^2 u = sin(u - u0) sin(u + u0) is accurate at t = 0.
        speed = self._speed
        start = math.sin(speed)
        product = xp.sin(speed * t) * xp.sin(speed * (t + 2.0 * self.s))
        return xp.sin(speed * (1.0 - t)) / start, xp.sqrt(product) / start

    def _time(self, xp: Namespace, rho: Array) -> Array:
        # By the same identity sin(u - u0) = (sigma cos u0)^2/sin(u + u0): nothing is subtracted.
        cos0, sin0 = math.sin(self._speed), math.sin(self._speed * self.s)
        length = xp.sqrt(1.0 + rho * rho)
        noise = rho / length * cos0
        cos, sin = cos0 / length, xp.sqrt(noise * noise + sin0 * sin0)
        angle = xp.atan2(noise * noise, (sin * cos0 + cos * sin0) * (cos * cos0 + sin * sin0))
        return angle / self._speed

    def _drift(self, xp: Namespace, t: Array) -> Array:
        speed = self._speed
        return -speed * xp.sin(speed * (t + self.s)) / xp.sin(speed * (1.0 - t))


@dataclass(frozen=True)
class SubVP(_LinearRate):
    """alpha = exp(-B/2), sigma = 1 - exp(-B), B = beta_min t + (beta_max - beta_min) t^2/2, on [0, 1].

    This sigma is the square of VP's. f = -beta/2, g^2 = beta (1 - exp(-2 B)) [MATH 0], rho = 2 sinh(B/2).

    Parameters
    ----------
    beta_min, beta_max : float
        beta at t = 0 and t = 1; 0 < beta_min <= beta_max <= 500.

    References
    ----------
    Song et al., arXiv 2011.13456, section 3.4 and appendix B.
    """

    @classmethod
    def linear(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> SubVP:
        """beta(t) = beta_min + t (beta_max - beta_min)."""
        return cls(beta_min, beta_max)

    def _levels(self, xp: Namespace, t: Array) -> tuple[Array, Array]:
        integral = self._integral(t)
        return xp.exp(-0.5 * integral), -xp.expm1(-integral)

    def _rho(self, xp: Namespace, t: Array) -> Array:
        return 2.0 * xp.sinh(0.5 * self._integral(t))

    def _time(self, xp: Namespace, rho: Array) -> Array:
        return self._time_of_integral(xp, 2.0 * xp.asinh(0.5 * rho))

    def _diffusion_squared(self, xp: Namespace, t: Array) -> Array:
        return -self._rate(t) * xp.expm1(-2.0 * self._integral(t))
