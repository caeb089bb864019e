"""The door: what public calls accept, and the one sentence they answer with otherwise."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from numbers import Integral, Number, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from dfmath.backends._compat import (
    Array,
    Namespace,
    accumulation_dtype,
    array_namespace,
    device,
    has_no_values,
    is_numpy_array,
    is_torch_array,
    to_numpy,
)

if TYPE_CHECKING:
    from dfmath.backends.components import Components

_CHUNK = 2**22  # elements looked at together when searching for a non-finite row


def describe(value: Any) -> str:
    """Say what came: type, and shape and dtype where there are any."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, np.memmap):
        kind = "an array in a file,"
    if isinstance(value, Number):
        return f"{kind} {value}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{kind} {value!r}" if isinstance(value, str) else kind


@contextmanager
def on_behalf_of(name: str) -> Iterator[None]:
    """Let errors name the caller's argument, or file, before what was wrong inside."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from None


_first_row: ContextVar[int] = ContextVar("first_row", default=0)


@contextmanager
def rows_from(first: int) -> Iterator[None]:
    """Let errors count the rows of a part of some data from this one."""
    token = _first_row.set(first)
    try:
        yield
    finally:
        _first_row.reset(token)


def counted(row: int) -> int:
    """The number of this row in all of the data."""
    return _first_row.get() + row


def instance(name: str, value: Any, kind: type) -> None:
    """Raise unless value is an instance of the class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be an instance of {kind.__module__}.{kind.__name__}, got {describe(value)}")


def is_number(value: Any) -> bool:
    """Whether this is a real number of Python or NumPy, 0-d NumPy arrays included; truth values are none."""
    if type(value) is np.ndarray:
        return value.ndim == 0 and value.dtype.kind in "fiu"
    return isinstance(value, Real) and not isinstance(value, bool)


def real_number(name: str, value: Any) -> float:
    """Return a number, or a 0-d real array of any namespace, as a float; infinities and NaN pass."""
    if not is_number(value):
        xp = namespace(name, value, "a real number")
        if value.shape != () or not xp.isdtype(value.dtype, ("real floating", "integral")):
            raise TypeError(f"{name} must be a real number, got {describe(value)}")
        has_values(name, value)
        value = to_numpy(value)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be representable as a float, got an integer that is not") from None


def namespace(name: str, value: Any, expected: str = "an array") -> Namespace:
    """Return the namespace of a plain, dense array, or say what came instead."""
    try:
        xp = array_namespace(value)
    except TypeError:
        hint = "; wrap it in numpy.asarray" if "array" in expected and isinstance(value, list | tuple) else ""
        raise TypeError(f"{name} must be {expected}, got {describe(value)}{hint}") from None
    if isinstance(value, np.ndarray) and type(value) not in (np.ndarray, np.memmap):
        raise TypeError(
            f"{name} must be a plain numpy.ndarray, got {describe(value)}, whose mask, units or operators would be lost"
        )
    if is_torch_array(value) and str(value.layout) != "torch.strided":
        raise TypeError(f"{name} must be dense, got {describe(value)} and layout {value.layout}")
    return xp


def has_values(name: str, array: Array) -> None:
    """Raise for tensors that have a shape and a dtype but no numbers in them."""
    if lack := has_no_values(array):
        raise ValueError(f"{name} must hold values, got {describe(array)} {lack}")


def real_array(name: str, value: Any, shape: str, ndim: int) -> Array:
    """Return a float32 or float64 array of the given number of dimensions, or say what is wrong with it."""
    xp = namespace(name, value, f"an array of shape {shape}")
    info = xp.__array_namespace_info__().dtypes(kind="real floating")
    if value.dtype not in (info.get("float32"), info.get("float64")):
        raise TypeError(f"{name} must have dtype float32 or float64, got {describe(value)}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must have shape {shape}, got {describe(value)}{_axis_hint(value.ndim, ndim, shape)}")
    return value


def _axis_hint(came: int, wanted: int, shape: str) -> str:
    """What may be meant: of points, if the shape begins with their number, and not with that of given queries."""
    if (came, wanted) == (1, 2) and shape[1].isalpha():
        line = ", or a trailing one for points on a line" if shape.endswith((", d)", ", 1)")) else ""
        return f"; add a leading axis for a single point{line}"
    if (came, wanted) == (1, 2):
        return f"; a row for each query: numpy.broadcast_to(v, {shape}) is the same for all"
    return "; add a trailing axis, or use matvec" if (came, wanted) == (2, 3) else ""


def finite_rows(name: str, array: Array, unit: str = "row", limit: float = math.inf) -> None:
    """Raise a ValueError that names the first row (or component) with a NaN, an infinity, or a size over the limit."""
    has_values(name, array)
    xp = array_namespace(array)
    step, limit = max(1, _CHUNK // max(1, math.prod(array.shape[1:]))), min(limit, float(xp.finfo(array.dtype).max))
    for start in range(0, array.shape[0], step):
        rows = array[start : min(start + step, array.shape[0]), ...]
        if is_numpy_array(rows) and rows.size and rows.min() >= -limit and rows.max() <= limit:
            continue  # NaN is neither; without copies this takes a quarter of the time
        good = xp.abs(rows) <= limit  # False for NaN and infinity
        if not bool(xp.all(good)):
            first = int(xp.argmin(xp.astype(xp.all(xp.reshape(good, (good.shape[0], -1)), axis=1), xp.int32)))
            finite = bool(xp.all(xp.isfinite(rows[first, ...])))
            asked = f"at most {limit:g} in size, so that its square is representable" if finite else "finite"
            came = "more" if finite else "NaN or infinity"
            raise ValueError(f"{name} must be {asked}, got {came} in {unit} {counted(start + first)}")


def largest_size(array: Array) -> float:
    """Return a size such that (x - y)^2/sigma^2 is representable up to it in x and y, and down to its inverse in sigma.

    With room for sums over millions of dimensions, and for the splitting of factors in two-term products.
    """
    xp = array_namespace(array)
    return 1e70 if accumulation_dtype(xp, array) == xp.float64 else 1e8


def points(name: str, value: Any, shape: str = "(N, d)") -> Array:
    """Validate data points or means: at least one, of at least one dimension, all finite."""
    real_array(name, value, shape, 2)
    if 0 in value.shape:
        raise ValueError(f"{name} must hold at least one point of at least one dimension, got {describe(value)}")
    finite_rows(name, value, limit=largest_size(value))
    return value


def same_home(**arrays: Any) -> None:
    """Raise unless all arrays share one namespace and one device; numbers live everywhere."""
    (first_name, first), *rest = [(n, a) for n, a in arrays.items() if hasattr(a, "shape") and not is_number(a)]
    for name, other in rest:
        if namespace(name, other) is not array_namespace(first):
            library = array_namespace(first).__name__.removeprefix("array_api_compat.")
            raise TypeError(f"{name} must be in the array namespace of {first_name} ({library}), got {describe(other)}")
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
    finite_rows(name, x, limit=largest_size(x))
    return x


def vectors(name: str, v: Any, shape: tuple[int, ...], home: Array, columns: bool = False) -> Array:
    """Validate what a batch of matrices is to be multiplied with: (B, d), or (B, d, k) for `columns`."""
    b, d = shape[:2]
    expected = f"({b}, {d}, k)" if columns else f"({b}, {d})"
    real_array(name, v, expected, 3 if columns else 2)
    same_home(**{"the operator": home, name: v})
    if tuple(v.shape[:2]) != (b, d):
        raise ValueError(f"{name} must have shape {expected}, got {describe(v)}")
    finite_rows(name, v)
    return v


def noise_array(
    name: str, value: Any, home: Array, *, zero_allowed: bool, owner: str = "prior", least: float = 0.0
) -> Array:
    """Return a noise coefficient as a (1,) or (B,) array in the accumulation dtype, at least `least` unless zero."""
    xp = array_namespace(home)
    dtype = accumulation_dtype(xp, home)
    if is_number(value):
        array = xp.asarray([real_number(name, value)], dtype=dtype, device=device(home))
    else:
        namespace(name, value, "a number or an array of shape (B,)")
        real_array(name, value, "(B,)", min(value.ndim, 1))
        same_home(**{owner: home, name: value})
        array = xp.astype(xp.reshape(value, (-1,)), dtype, copy=False)
    _check_noise_range(name, array, zero_allowed, least)
    return array


def noise_number(name: str, value: Any, home: Array) -> float:
    """Return one positive noise coefficient for all queries."""
    return float(noise_array(name, real_number(name, value), home, zero_allowed=False)[0])


def _check_noise_range(name: str, array: Array, zero_allowed: bool, least: float) -> None:
    values = to_numpy(array)
    low, high = (1e-150, 1e150) if values.dtype.itemsize == 8 else (1e-18, 1e18)  # squares must not under- or overflow
    low = max(low, least)
    good = (values >= low) & (values <= high) | (zero_allowed & (values == 0))
    if not good.all():
        row = int(good.argmin())
        where = f" in row {row}" if values.size > 1 else ""
        floor = "zero or positive" if zero_allowed else "positive"
        raise ValueError(
            f"{name} must be {floor}, finite and its square representable, from {low:.0e} to {high:.0e}, "
            f"got {values[row]:g}{where}"
        )


def joint_range(alpha: Array, sigma: Array, components: Components, low: float, high: float) -> None:
    """Raise unless what the data become, alpha y, and the slope alpha/S of scores over data are in range together.

    Variances of components are from `low` to `high`. Data have a pass over them only where alpha is far above 1: below,
    alpha y is in range with y.
    """
    a, s = to_numpy(alpha), to_numpy(sigma)
    if 0 in (a.size, s.size):
        return
    double = a.dtype.itemsize == 8
    largest, steepest = (1e70, 1e150) if double else (1e8, 1e18)
    if float(a.max()) > 100.0:
        size = max(components.each(_largest_coordinate))
        if not float(a.max()) * max(size, math.sqrt(high)) <= 100.0 * largest:
            raise ValueError(
                f"alpha times the data must be at most {100.0 * largest:.0e} in size, so that squares are "
                f"representable, got alpha {float(a.max()):g} and data of size {max(size, math.sqrt(high)):g}"
            )
    with np.errstate(over="ignore", divide="ignore"):
        steep = float(np.max(a / (a**2 * low + s**2)))
    if not steep <= steepest:
        raise ValueError(
            f"alpha/(alpha^2 c + sigma^2), for components of variance c, must be at most {steepest:.0e}, so that its "
            f"square is representable, got {steep:g}; scale alpha and sigma together"
        )


def _largest_coordinate(part: Components) -> float:
    xp = array_namespace(part.centres)
    return float(to_numpy(xp.max(xp.abs(part.centres))))


def fits_dtype(name: str, spread: Array, dtype: Any) -> None:
    """Raise unless 1/S, (B,), can be told from zero and infinity in the dtype of the results."""
    values, info = to_numpy(spread), array_namespace(spread).finfo(dtype)
    least, most = 1.0 / float(info.max), 1.0 / float(info.smallest_normal)
    good = (values >= least) & (values <= most)
    if not good.all():
        row = int(good.argmin())
        raise ValueError(
            f"{name} has dtype {dtype}, whose results cannot hold 1/(alpha^2 c + sigma^2) = 1/{values[row]:.3g}, "
            f"with c the variance of a component; give data and queries in float64"
        )


def narrowed(values: Array, dtype: Any) -> Array:
    """Return results in the caller's dtype, or say that they are too large for it."""
    xp = array_namespace(values)
    if values.dtype == dtype or not is_numpy_array(values):
        return xp.astype(values, dtype, copy=False)
    try:
        with np.errstate(over="raise"):
            return xp.astype(values, dtype)
    except FloatingPointError:
        raise ValueError(
            f"results must be representable in the queries' dtype {dtype}, got numbers up to "
            f"{float(np.max(np.abs(values[np.isfinite(values)]))):.3g}; give data and queries in float64"
        ) from None


def fraction(name: str, value: Any, least: float = 0.0) -> float:
    """Return a number in [least, 1), such as a tolerance."""
    number = real_number(name, value)
    if not least <= number < 1:
        raise ValueError(f"{name} must be in [{least:.1g}, 1), got {number:g}")
    return number


def positive_integer(name: str, value: Any) -> int:
    """Return a positive int, or say what came instead."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {describe(value)}")
    return int(value)


def random_seed(seed: Any) -> int:
    """Return a seed, or say that one is required."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or int(seed) < 0:
        raise ValueError(f"seed must be a non-negative integer, got {describe(seed)}")
    return int(seed)


def index(name: str, value: Any, count: int) -> int:
    """Return an index into `count` things, counted from 0."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < count:
        raise ValueError(f"{name} must be an index from 0 and below {count}, got {describe(value)}")
    return int(value)


def one_of(name: str, value: Any, options: tuple[str, ...]) -> str:
    """Return the value if it is one of the options; otherwise list them and suggest the nearest."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {describe(value)}")
    if value in options:
        return value
    known = {option.lower(): option for option in options}
    near = get_close_matches(value.lower(), known, n=1, cutoff=0.3)
    hint = f"; did you mean {known[near[0]]!r}?" if near else ""
    listed = ", ".join(repr(option) if "," in "".join(options) else option for option in options)
    raise ValueError(f"{name} must be one of {listed}, got {value!r}{hint}")


def fits_in_memory(what: str, *shape: int, instead: str = "", itemsize: int = 8) -> None:
    """Refuse a result that is larger than the memory of this machine."""
    needed, have = math.prod(shape) * itemsize, _physical_memory()
    if needed > have:
        size = " x ".join(str(n) for n in shape)
        hint = f"; {instead}" if instead else ""
        raise ValueError(
            f"{what} would be {size} numbers, {needed / 2**30:.1f} GiB, more than the {have / 2**30:.1f} GiB here{hint}"
        )


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on POSIX
        return 16 * 2**30
