"""What every noise schedule offers, and how it takes its arguments [MATH 0, 2.1, 2.2]."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

from dfmath._checks import describe, has_values, namespace, real_number
from dfmath.backends._compat import Array, Namespace, accumulation_dtype, numpy_namespace

# How far (relative) two float64 evaluations of one end point may lie apart: libraries round exp differently.
_END_POINT_ERROR = 4e-15


@dataclass(frozen=True)
class Schedule(ABC):
    """A noise schedule t -> (alpha, sigma), for x = alpha x0 + sigma eps [MATH 0].

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
        """rho(t) = sigma/alpha, the noise-to-signal ratio, strictly increasing in t [MATH 2.2].

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
        """f(t) = alpha'/alpha, the drift of the forward SDE dx = f x dt + g dw [MATH 0, 2.1].

        Parameters and errors are those of `rho`.
        """
        xp, inside, leave = self._enter_time(t, finite=True)
        return leave(self._drift(xp, inside))

    def diffusion_squared(self, t: Array) -> Array:
        """g^2(t) = 2 (sigma sigma' - f sigma^2) = 2 alpha^2 rho rho', g of the forward SDE [MATH 0, 2.1].

        Parameters and errors are those of `rho`.
        """
        xp, inside, leave = self._enter_time(t, finite=True)
        return leave(self._diffusion_squared(xp, inside))

    @property
    def domain(self) -> tuple[float, float]:
        """(t_min, t_max), both included; where alpha = 0 at t_max, only `__call__` is defined there."""
        return 0.0, 1.0

    @property
    def kinks(self) -> tuple[float, ...]:
        """Noise-to-signal ratios at which the time, as a function of them, is not smooth."""
        return ()

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
