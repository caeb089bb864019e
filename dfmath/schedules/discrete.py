"""The schedule of a discrete-time model, from its table of abar [MATH 0]."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from dfmath._checks import describe, has_values
from dfmath.backends._compat import Array, Namespace, from_numpy, numpy_namespace, to_numpy
from dfmath.schedules.variance_preserving import VP


@dataclass(frozen=True)
class Discrete(VP):
    """alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t) at t = 0, ..., T - 1; between, log rho is linear in t.

    f = -sigma^2 (log rho)' and g^2 = -2 f [MATH 0]; the derivative jumps at the integers, where the one to
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

    alphas_cumprod: Array = field(repr=False)

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

    @property
    def kinks(self) -> tuple[float, ...]:
        """Ratios of the table: log rho is a broken line through them."""
        return tuple(numpy_namespace().exp(self._line[1]).tolist())

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
