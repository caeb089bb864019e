"""The door: what public calls accept, and the one sentence they answer with otherwise."""

from __future__ import annotations

import math
import os
from difflib import get_close_matches
from typing import Any

from dfmath.backends._compat import Array, accumulation_dtype, array_namespace, device, to_numpy

_CHUNK = 2**22  # elements looked at together when searching for a non-finite row


def describe(value: Any) -> str:
    """Say what came: type, and shape and dtype where there are any."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{kind} {value!r}" if isinstance(value, int | float | str) else kind


def real_array(name: str, value: Any, shape: str, ndim: int) -> Array:
    """Return a finite-dtype real array of the given number of dimensions, or say what is wrong with it."""
    try:
        xp = array_namespace(value)
    except TypeError:
        hint = "; wrap it in numpy.asarray" if isinstance(value, list | tuple) else ""
        raise TypeError(f"{name} must be an array of shape {shape}, got {describe(value)}{hint}") from None
    info = xp.__array_namespace_info__().dtypes(kind="real floating")
    if value.dtype not in (info.get("float32"), info.get("float64")):
        raise TypeError(f"{name} must have dtype float32 or float64, got {describe(value)}")
    if value.ndim != ndim:
        hint = "; add a leading axis for a single point" if value.ndim == ndim - 1 else ""
        raise ValueError(f"{name} must have shape {shape}, got {describe(value)}{hint}")
    return value


def finite_rows(name: str, array: Array) -> None:
    """Raise a ValueError that names the first row with a NaN or an infinity."""
    xp = array_namespace(array)
    step = max(1, _CHUNK // max(1, math.prod(array.shape[1:])))
    for start in range(0, array.shape[0], step):
        part = xp.isfinite(array[start : min(start + step, array.shape[0]), ...])
        if not bool(xp.all(part)):
            rows = xp.all(xp.reshape(part, (part.shape[0], -1)), axis=1)
            row = start + int(xp.argmin(xp.astype(rows, xp.int32)))
            raise ValueError(f"{name} must be finite, got NaN or infinity in row {row}")


def same_home(**arrays: Any) -> None:
    """Raise unless all arrays share one namespace and one device."""
    (first_name, first), *rest = [(name, a) for name, a in arrays.items() if hasattr(a, "shape")]
    for name, other in rest:
        if array_namespace(other) is not array_namespace(first):
            raise TypeError(
                f"{name} must be in the array namespace of {first_name} "
                f"({array_namespace(first).__name__}), got {describe(other)}"
            )
        if device(other) != device(first):
            raise ValueError(f"{name} must be on the device of {first_name} ({device(first)}), got {device(other)}")


def batch(name: str, x: Any, dim: int, rows: int | None, home: Array) -> Array:
    """Validate a batch of points (B, d) that lives where the prior lives."""
    real_array(name, x, f"(B, {dim})", 2)
    same_home(prior=home, **{name: x})
    if x.shape[1] != dim:
        raise ValueError(f"{name} must have shape (B, {dim}) to match the prior, got {describe(x)}")
    if rows is not None and x.shape[0] != rows:
        raise ValueError(f"{name} must have {rows} rows, one for each noise level, got {describe(x)}")
    finite_rows(name, x)
    return x


def noise_array(name: str, value: Any, home: Array, *, zero_allowed: bool) -> Array:
    """Return a noise coefficient as a (1,) or (B,) array in the accumulation dtype."""
    xp = array_namespace(home)
    dtype = accumulation_dtype(xp, home)
    if isinstance(value, bool) or not (isinstance(value, int | float) or hasattr(value, "dtype")):
        raise TypeError(f"{name} must be a number or an array of shape (B,), got {describe(value)}")
    if hasattr(value, "dtype") and value.ndim > 0:
        real_array(name, value, "(B,)", 1)
        same_home(prior=home, **{name: value})
        array = xp.astype(value, dtype, copy=False)
    elif hasattr(value, "dtype") and getattr(value, "requires_grad", False):
        array = xp.astype(xp.reshape(value, (1,)), dtype, copy=False)
    else:
        array = xp.asarray([float(value)], dtype=dtype, device=device(home))
    _check_noise_range(name, array, zero_allowed)
    return array


def _check_noise_range(name: str, array: Array, zero_allowed: bool) -> None:
    values = to_numpy(array)
    low, high = (1e-150, 1e150) if values.dtype.itemsize == 8 else (1e-18, 1e18)  # squares must not under- or overflow
    good = (values >= low) & (values <= high) | (zero_allowed & (values == 0))
    if not good.all():
        row = int(good.argmin())
        where = f" in row {row}" if values.size > 1 else ""
        floor = "zero or positive" if zero_allowed else "positive"
        raise ValueError(f"{name} must be {floor}, finite and its square representable, got {values[row]:g}{where}")


def positive_integer(name: str, value: Any) -> int:
    """Return a positive int, or say what came instead."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {describe(value)}")
    return value


def random_seed(seed: Any) -> int:
    """Return a seed, or say that one is required."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {describe(seed)}")
    return seed


def one_of(name: str, value: Any, options: tuple[str, ...]) -> str:
    """Return the value if it is one of the options; otherwise list them and suggest the nearest."""
    if value in options:
        return str(value)
    near = get_close_matches(str(value), options, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}{hint}")


def fits_in_memory(what: str, *shape: int, itemsize: int = 8) -> None:
    """Refuse a result that is larger than the memory of this machine."""
    needed, have = math.prod(shape) * itemsize, _physical_memory()
    if needed > have:
        size = " x ".join(str(n) for n in shape)
        raise ValueError(
            f"{what} would be {size} numbers, {needed / 2**30:.1f} GiB, more than the {have / 2**30:.1f} GiB here; "
            "use matvec, diagonal or trace instead"
        )


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on POSIX
        return 16 * 2**30
