"""Noise schedules t -> (alpha, sigma), the inverse of rho = sigma/alpha, and f and g^2 (MATH.md 0, 2.1, 2.2).

A schedule is all that time means here: everything else depends on (x, alpha, sigma) alone. Times may be
Python floats, which give floats, or floating arrays of any array-API namespace, which give arrays of the same
namespace, dtype and device. Arrays are computed in the widest dtype the device has and rounded once at the
end, so a float32 result is as good as float32 can hold, for the float32 time that was given.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import ClassVar

from dfmath._checks import describe, has_values, namespace, one_of, real_number
from dfmath.backends._compat import (
    Array,
    Namespace,
    accumulation_dtype,
    from_numpy,
    numpy_namespace,
    to_numpy,
)

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Discrete",
    "FlowMatching",
    "Schedule",
    "SubVP",
    "VPCosine",
    "VPLinear",
    "schedule_by_name",
]

# How far (relative) two float64 evaluations of one end point may lie apart: libraries round exp differently.
_END_POINT_ERROR = 4e-15


@dataclass(frozen=True)
class Schedule(ABC):
    """A noise schedule t -> (alpha, sigma), for x = alpha x0 + sigma eps (MATH.md 0).

    Derived classes give (alpha, sigma), the inverse of rho, f and g^2 in closed form, each written so that
    nothing cancels near t = 0. Constructors raise ValueError or TypeError where parameters make no schedule.
    """

    # True where alpha reaches 0 at the end of the domain: there rho, f and g^2 are infinite.
    _ends_in_noise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for parameter in fields(self):
            value = _real(parameter.name, getattr(self, parameter.name))
            object.__setattr__(self, parameter.name, value)
        self._check_parameters()

    def __call__(self, t: Array) -> tuple[Array, Array]:
        """(alpha, sigma) at time t.

        Parameters
        ----------
        t : float or floating array, any shape
            Times in `domain`.

        Returns
        -------
        alpha, sigma : float or array of t's shape, namespace, dtype and device

        Raises
        ------
        ValueError
            If a time is outside `domain`.
        TypeError
            If t is neither a real number nor a real floating array.
        """
        xp, inside, leave = self._enter_time(t)
        alpha, sigma = self._levels(xp, inside)
        return leave(alpha), leave(sigma)

    def rho(self, t: Array) -> Array:
        """rho(t) = sigma/alpha, the noise-to-signal ratio, strictly increasing in t (MATH.md 2.2).

        Parameters and errors are those of `__call__`; a time at which alpha = 0 is refused as well, for rho
        is infinite there.
        """
        xp, inside, leave = self._enter_time(t, finite=True)
        return leave(self._rho(xp, inside))

    def time(self, rho: Array) -> Array:
        """The time at which sigma/alpha is rho: the inverse of `rho`, in closed form.

        Parameters
        ----------
        rho : float or floating array, any shape
            Noise-to-signal ratios between those at the two ends of `domain`.

        Returns
        -------
        t : float or array of rho's shape, namespace, dtype and device

        Raises
        ------
        ValueError
            If a ratio is infinite or is one that the schedule never reaches.
        TypeError
            If rho is neither a real number nor a real floating array.
        """
        xp, inside, leave = _enter(self, "rho", rho, self._rho_range, self._ends_in_noise)
        # A ratio may overstep its range by rounding; the time must not overstep its domain by more than that.
        return leave(_clip(xp, self._time(xp, inside), *self.domain))

    def drift(self, t: Array) -> Array:
        """f(t) = alpha'/alpha, the drift of the forward SDE dx = f x dt + g dw (MATH.md 0, 2.1).

        Parameters and errors are those of `rho`.
        """
        xp, inside, leave = self._enter_time(t, finite=True)
        return leave(self._drift(xp, inside))

    def diffusion_squared(self, t: Array) -> Array:
        """g^2(t) = 2 (sigma sigma' - f sigma^2) = 2 alpha^2 rho rho', g of the forward SDE (MATH.md 0, 2.1).

        Parameters and errors are those of `rho`.
        """
        xp, inside, leave = self._enter_time(t, finite=True)
        return leave(self._diffusion_squared(xp, inside))

    @property
    def domain(self) -> tuple[float, float]:
        """(t_min, t_max), both included; where alpha = 0 at t_max, only `__call__` is defined there."""
        return 0.0, 1.0

    @property
    def _rho_range(self) -> tuple[float, float]:
        low, high = self.domain
        return self._rho(math, low), math.inf if self._ends_in_noise else self._rho(math, high)

    def _enter_time(self, t: Array, finite: bool = False) -> tuple[Namespace, Array, Callable[[Array], Array]]:
        return _enter(self, "t", t, self.domain, finite and self._ends_in_noise)

    # What a derived class gives. Here xp is a namespace, or the math module, whose functions have the same
    # names; t and rho are valid.

    @abstractmethod
    def _check_parameters(self) -> None: ...

    @abstractmethod
    def _levels(self, xp: Namespace, t: Array) -> tuple[Array, Array]: ...

    @abstractmethod
    def _time(self, xp: Namespace, rho: Array) -> Array: ...

    @abstractmethod
    def _drift(self, xp: Namespace, t: Array) -> Array: ...

    @abstractmethod
    def _diffusion_squared(self, xp: Namespace, t: Array) -> Array: ...

    def _rho(self, xp: Namespace, t: Array) -> Array:
        alpha, sigma = self._levels(xp, t)
        return sigma / alpha


@dataclass(frozen=True)
class VP(Schedule):
    """Variance-preserving schedules: alpha^2 + sigma^2 = 1, hence g^2 = -2 f (MATH.md 0).

    `VP.linear` and `VP.cosine` make one; `Discrete` is the third of the family.

    References
    ----------
    Song et al., *Score-based generative modeling through SDEs*, arXiv 2011.13456.
    """

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

    f = -beta/2 and g^2 = beta (MATH.md 0), rho = sqrt(exp(B) - 1).

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

    f = -u' tan(u) and g^2 = -2 f (MATH.md 0). At t = 1 alpha is exactly 0: only (alpha, sigma) is defined
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

    This sigma is the square of VP's. f = -beta/2, g^2 = beta (1 - exp(-2 B)) (MATH.md 0), rho = 2 sinh(B/2).

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


@dataclass(frozen=True)
class VE(Schedule):
    """alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t, on [0, 1].

    f = 0 and g^2 = 2 sigma^2 log(sigma_max/sigma_min) (MATH.md 0).

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
    """alpha = 1, sigma = t, on [sigma_min, sigma_max]: here rho = t, f = 0 and g^2 = 2 t (MATH.md 0).

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


@dataclass(frozen=True)
class FlowMatching(Schedule):
    """alpha = 1 - t', sigma = t' with t' = shift t/(1 + (shift - 1) t), on [0, 1] (rectified flow).

    With D = 1 - t + shift t: f = -shift/((1 - t) D), g^2 = 2 shift^2 t/((1 - t) D^2) (MATH.md 0),
    rho = shift t/(1 - t). At t = 1 alpha is exactly 0: only (alpha, sigma) is defined there.

    Parameters
    ----------
    shift : float
        How much later in noise every time is read; positive, 1 for none.

    References
    ----------
    Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747; the shift: Esser et al., arXiv 2403.03206,
    equation 23.

    Examples
    --------
    >>> from dfmath.schedules import FlowMatching
    >>> FlowMatching()(0.25), FlowMatching(shift=3.0)(0.25)
    ((0.75, 0.25), (0.5, 0.5))
    """

    shift: float = 1.0
    _ends_in_noise: ClassVar[bool] = True

    def _check_parameters(self) -> None:
        if not self.shift > 0.0:
            raise ValueError(f"shift must be positive, got {self.shift!r}")

    def _denominator(self, t: Array) -> Array:
        # 1 + (shift - 1) t as a sum of positive terms.
        return (1.0 - t) + self.shift * t

    def _levels(self, xp: Namespace, t: Array) -> tuple[Array, Array]:
        denominator = self._denominator(t)
        return (1.0 - t) / denominator, self.shift * t / denominator

    def _rho(self, xp: Namespace, t: Array) -> Array:
        return self.shift * t / (1.0 - t)

    def _time(self, xp: Namespace, rho: Array) -> Array:
        return rho / (rho + self.shift)

    def _drift(self, xp: Namespace, t: Array) -> Array:
        return -self.shift / ((1.0 - t) * self._denominator(t))

    def _diffusion_squared(self, xp: Namespace, t: Array) -> Array:
        ratio = self.shift / self._denominator(t)
        return 2.0 * ratio * ratio * t / (1.0 - t)


@dataclass(frozen=True)
class Discrete(VP):
    """alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t) at t = 0, ..., T - 1; between, log rho is linear in t.

    f = -sigma^2 (log rho)' and g^2 = -2 f (MATH.md 0); the derivative jumps at the integers, where the one to
    the right is taken (at T - 1 the one to the left).

    Parameters
    ----------
    alphas_cumprod : array or sequence, shape (T,)
        abar_0 > abar_1 > ... > abar_{T-1}, all between 0 and 1, at least two of them; kept in float64 on the
        host. A table that was rounded to float32 knows 1 - abar_0, and with it sigma_0^2, only to about 6e-8.

    References
    ----------
    Ho et al., *Denoising diffusion probabilistic models*, arXiv 2006.11239.

    Examples
    --------
    >>> from dfmath.schedules import Discrete
    >>> schedule = Discrete([0.8, 0.5, 0.2])
    >>> schedule.domain, schedule.time(1.0)
    ((0.0, 2.0), 1.0)
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas_cumprod", _read_table("alphas_cumprod", self.alphas_cumprod))
        self._check_parameters()

    def _check_parameters(self) -> None:
        table = self.alphas_cumprod
        if len(table) < 2:
            raise ValueError(f"alphas_cumprod must have at least two entries, got {len(table)}")
        for i, value in enumerate(table):
            _check_level(i, value)
        log_rho = self._line[1]
        for i in range(1, len(table)):
            # Two levels may differ and still be one in log rho, which could not be inverted.
            if not (table[i] < table[i - 1] and log_rho[i] > log_rho[i - 1]):
                raise ValueError(
                    "alphas_cumprod must be strictly decreasing, by more than rounding: "
                    f"got {table[i - 1]!r} at index {i - 1} and {table[i]!r} at index {i}"
                )

    def __repr__(self) -> str:
        return f"Discrete(<{len(self.alphas_cumprod)} levels>)"

    @property
    def domain(self) -> tuple[float, float]:
        """(0, T - 1)."""
        return 0.0, float(len(self.alphas_cumprod) - 1)

    @cached_property
    def _line(self) -> tuple[Array, Array]:
        """The knots of log rho over t, as two float64 NumPy arrays."""
        np = numpy_namespace()
        abar = np.asarray(self.alphas_cumprod, dtype=np.float64)
        return np.arange(float(len(self.alphas_cumprod))), 0.5 * (np.log1p(-abar) - np.log(abar))

    def _levels(self, xp: Namespace, t: Array) -> tuple[Array, Array]:
        rho = self._rho(xp, t)
        length = xp.sqrt(1.0 + rho * rho)
        return 1.0 / length, rho / length

    def _rho(self, xp: Namespace, t: Array) -> Array:
        return xp.exp(_broken_line(xp, t, *self._line)[0])

    def _time(self, xp: Namespace, rho: Array) -> Array:
        times, log_rhos = self._line
        return _broken_line(xp, xp.log(rho), log_rhos, times)[0]

    def _drift(self, xp: Namespace, t: Array) -> Array:
        log_rho, slope = _broken_line(xp, t, *self._line)
        return -slope / (1.0 + xp.exp(-2.0 * log_rho))


_BY_NAME: dict[str, Callable[[], Schedule]] = {
    "vp": VP.linear,
    "vp-cosine": VP.cosine,
    "subvp": SubVP.linear,
    "ve": VE,
    "edm": EDM,
    "flow-matching": FlowMatching,
}


def schedule_by_name(name: str) -> Schedule:
    """Return the schedule of that name with its default parameters, as the command line offers it.

    Parameters
    ----------
    name : {"vp", "vp-cosine", "subvp", "ve", "edm", "flow-matching"}

    Raises
    ------
    ValueError
        If there is no schedule of that name; the message lists the names and suggests the nearest.

    Examples
    --------
    >>> from dfmath.schedules import schedule_by_name
    >>> schedule_by_name("edm")
    EDM(sigma_min=0.002, sigma_max=80.0)
    """
    return _BY_NAME[one_of("name", name, tuple(_BY_NAME))]()


def _enter(
    schedule: Schedule, name: str, given: Array, bounds: tuple[float, float], end_excluded: bool
) -> tuple[Namespace, Array, Callable[[Array], Array]]:
    """Return the namespace, the argument, widened and inside its bounds, and the way back to its own type."""
    xp, value, leave, eps = _widen(name, given)
    low, high = bounds
    # A bound rounded to the argument's dtype may overstep the bound by that rounding.
    slack = eps + _END_POINT_ERROR
    inside = (value >= low - slack * abs(low)) & (value <= high + slack * abs(high))
    if end_excluded:
        inside = inside & (value < high)
    if not (inside if xp is math else bool(xp.all(inside))):
        interval = f"[{low!r}, {high!r}{') (at its end alpha = 0)' if end_excluded else ']'}"
        raise ValueError(f"{name} must lie in {interval} for {schedule!r}, got {_first_outside(xp, value, inside)}")
    return xp, _clip(xp, value, low, high), leave


def _widen(name: str, given: Array) -> tuple[Namespace, Array, Callable[[Array], Array], float]:
    """Return the namespace (math for a number), the widened value, the way back and the dtype's epsilon."""
    if isinstance(given, int | float):
        return math, real_number(name, given), float, sys.float_info.epsilon
    xp = namespace(name, given, "a float or a floating array")
    if not xp.isdtype(given.dtype, "real floating"):
        raise TypeError(f"{name} must be real floating, got {describe(given)}")
    has_values(name, given)
    wide = xp.astype(given, accumulation_dtype(xp, given))
    return xp, wide, lambda value: xp.astype(value, given.dtype), float(xp.finfo(given.dtype).eps)


def _clip(xp: Namespace, value: Array, low: float, high: float) -> Array:
    return min(max(value, low), high) if xp is math else xp.clip(value, low, high)


def _first_outside(xp: Namespace, value: Array, inside: Array) -> str:
    """Say which entry is outside and, in an array, where it stands."""
    if xp is math or not value.shape:
        return repr(float(value))
    first = int(xp.argmin(xp.astype(xp.reshape(inside, (-1,)), xp.int32)))
    index = tuple(int(i) for i in numpy_namespace().unravel_index(first, tuple(value.shape)))
    return f"{float(xp.reshape(value, (-1,))[first])!r} at index {index[0] if len(index) == 1 else index}"


def _real(name: str, value: Array) -> float:
    """Return the number as a float; refuse what is no real number and what is not finite."""
    number = real_number(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number!r}")
    return number


def _check_increasing(sigma_min: float, sigma_max: float) -> None:
    if not 0.0 <= sigma_min < sigma_max:
        raise ValueError(
            "sigma_min and sigma_max must satisfy 0 <= sigma_min < sigma_max, "
            f"got sigma_min={sigma_min!r}, sigma_max={sigma_max!r}"
        )


def _constant(value: float, t: Array) -> Array:
    # 0 t + value has t's type, shape and device, whichever namespace it belongs to.
    return 0.0 * t + value


def _read_table(name: str, given: Array) -> tuple[float, ...]:
    """Return a one-dimensional array or sequence of numbers as a tuple of floats."""
    np = numpy_namespace()
    if hasattr(given, "ndim"):
        has_values(name, given)
    try:
        values = to_numpy(given) if hasattr(given, "ndim") else np.asarray(given)
    except ValueError:
        raise ValueError(f"{name} must be one-dimensional, got rows of different lengths") from None
    if values.ndim == 0:
        raise TypeError(f"{name} must be a one-dimensional array or sequence, got {describe(given)}")
    if values.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {values.shape}")
    if values.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got dtype {values.dtype}")
    return tuple(float(value) for value in values)


def _check_level(i: int, value: float) -> None:
    if value == 0.0:
        raise ValueError(
            f"alphas_cumprod must be positive, got 0 at index {i}: at zero terminal signal-to-noise "
            "ratio rho is infinite; leave that level out, or end the table above 0"
        )
    # Below 1e-300 rho^2 is no float any more.
    if not 1e-300 < value < 1.0:
        raise ValueError(f"alphas_cumprod must lie between 0 (above 1e-300) and 1, got {value!r} at index {i}")


def _broken_line(xp: Namespace, x: Array, knots: Array, heights: Array) -> tuple[Array, Array]:
    """Return the height and the slope at x of the line through (knots, heights), two NumPy arrays."""
    take = _at_number if xp is math else _at_array
    (left, right), (low, high) = take(xp, x, knots, heights)
    slope = (high - low) / (right - left)
    return low + (x - left) * slope, slope


def _at_number(xp: Namespace, x: float, knots: Array, heights: Array) -> Array:
    i = min(max(int(knots.searchsorted(x, side="right")) - 1, 0), knots.shape[0] - 2)
    return knots[i : i + 2].tolist(), heights[i : i + 2].tolist()


def _at_array(xp: Namespace, x: Array, knots: Array, heights: Array) -> Array:
    knots, heights = from_numpy(knots, x), from_numpy(heights, x)
    i = xp.searchsorted(knots, xp.reshape(x, (-1,)), side="right") - 1
    i = xp.clip(i, 0, knots.shape[0] - 2)
    return [[xp.reshape(xp.take(table, j, axis=0), x.shape) for j in (i, i + 1)] for table in (knots, heights)]
