"""What the approximations accept: posterior means, noise levels, and one number for each row."""

from __future__ import annotations

from typing import Any

from dfmath import _checks
from dfmath.backends._compat import Array, accumulation_dtype, array_namespace, to_numpy


def mean_and_noise(mean: Any, alpha: Any, sigma: Any) -> tuple[Array, Array, Array]:
    """Validate posterior means (B, d) and noise levels; all in the accumulation dtype."""
    _checks.real_array("mean", mean, "(B, d)", 2)
    _checks.finite_rows("mean", mean)
    xp, rows, home = array_namespace(mean), mean.shape[0], {"mean": mean}
    alpha, sigma = noise("alpha", alpha, rows, home), noise("sigma", sigma, rows, home)
    return xp.astype(mean, alpha.dtype, copy=False), alpha, sigma


def noise(name: str, value: Any, rows: int, home: dict[str, Array]) -> Array:
    """Validate alpha or sigma: (1,) or (B,) in the accumulation dtype."""
    ((owner, place),) = home.items()
    level = _checks.noise_array(name, value, place, zero_allowed=False, owner=owner)
    if level.shape[0] not in (1, rows):
        raise ValueError(f"{name} must be a number or have shape ({rows},), got {_checks.describe(value)}")
    return level


def per_row(name: str, value: Any, rows: int, home: dict[str, Array]) -> Array:
    """Validate one number for each row: (B,) in the accumulation dtype."""
    _checks.real_array(name, value, f"({rows},)", 1)
    _checks.same_home(**home, **{name: value})
    if value.shape[0] != rows:
        raise ValueError(f"{name} must have shape ({rows},), got {_checks.describe(value)}")
    _checks.finite_rows(name, value)
    xp = array_namespace(value)
    return xp.astype(value, accumulation_dtype(xp, value), copy=False)


def optional_trace(value: Any, rows: int, home: dict[str, Array]) -> Array | None:
    """Validate traces of P, where given."""
    if value is None:
        return None
    trace = per_row("posterior_trace", value, rows, home)
    not_negative("posterior_trace", trace)
    return trace


def not_negative(name: str, values: Array) -> None:
    """Raise a ValueError that names the first row with a negative number."""
    numbers = to_numpy(values)
    if (numbers < 0).any():
        row = int((numbers < 0).argmax())
        raise ValueError(f"{name} must be zero or positive, got {numbers[row]:g} in row {row}")


def row_of(level: Array, i: int) -> Array:
    """Return the noise level (1,) of row i."""
    return level if level.shape[0] == 1 else level[i : i + 1]


def cast_like(array: Array, like: Array) -> Array:
    """Return the array in the dtype of the other."""
    return array_namespace(like).astype(array, like.dtype, copy=False)
