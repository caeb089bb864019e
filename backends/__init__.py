"""How posterior moments are computed: one primitive, and the machines it runs on.

The ground floor of the house: nothing here knows a prior, a Fisher or a schedule. A backend is a module with a
`posterior_moments` of the same signature; `array_api` is the specification, the others are faster on their own arrays.

==============  =======================================  =====================================================
name            arrays                                   covariance forms
==============  =======================================  =====================================================
``array-api``   any array-API namespace                  all
``device``      CuPy and torch (the default there)       one variance for all; the others through ``array-api``
``numba``       NumPy (the default there)                spherical; the others through ``array-api``
==============  =======================================  =====================================================
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from dfmath.backends._compat import Array, is_cupy_array, is_numpy_array, is_torch_array
from dfmath.backends.components import Components
from dfmath.backends.moments import Moments, Space, Want, merge
from dfmath.backends.parts import Parts

__all__ = ["Moments", "Space", "Want", "available", "chosen", "cluster", "merge", "posterior_moments", "use"]

_MODULES = {"array-api": "array_api", "device": "device", "numba": "numba_cpu"}
_chosen: ContextVar[str | None] = ContextVar("dfmath_backend", default=None)


def available() -> tuple[str, ...]:
    """Return the names that `use` accepts."""
    return tuple(_MODULES)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Compute on the named backend within this block, in this thread or task.

    Parameters
    ----------
    name
        One of `available()`.

    Raises
    ------
    ValueError
        If there is no backend of that name.

    Examples
    --------
    >>> import dfmath.backends
    >>> with dfmath.backends.use("array-api"):
    ...     pass
    """
    if not isinstance(name, str) or name not in _MODULES:
        near = get_close_matches(str(name).lower(), _MODULES, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"backend must be one of {', '.join(_MODULES)}, got {name!r}{hint}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> str | None:
    """Return the name given to `use` in this context, None if none was."""
    return _chosen.get()


def backend_for(array: Array, components: Components | None = None) -> ModuleType:
    """Return the backend module chosen by `use`, or else the one made for this kind of array.

    Components in parts have one that asks these for each part.
    """
    if isinstance(components, Parts):
        return importlib.import_module("dfmath.backends.in_parts")
    name = _chosen.get() or _made_for(array)
    if name == "numba" and not is_numpy_array(array):
        kind = f"{type(array).__module__}.{type(array).__name__}"
        raise TypeError(f"backend 'numba' computes on NumPy arrays, got {kind}; use 'array-api' there")
    return importlib.import_module(f"dfmath.backends.{_MODULES[name]}")


def _made_for(array: Array) -> str:
    if is_numpy_array(array):
        return "numba"
    return "device" if is_cupy_array(array) or is_torch_array(array) else "array-api"


def posterior_moments(
    queries: Array,
    components: Components,
    alpha: Array,
    sigma: Array,
    want: Iterable[Want] = (),
    *,
    space: Space = "posterior",
    probes: Array | None = None,
    tolerance: float = 0.0,
    precision: float = 0.0,
    memory: Any = None,
) -> Moments:
    """Return the posterior moments of a mixture at queries x = alpha x0 + sigma eps [MATH 1.3-1.5].

    Parameters
    ----------
    queries
        (B, d) in the dtype that moments accumulate in (float64 wherever the device has it).
    components
        K components of one covariance form, in any floating dtype; read tile by tile.
    alpha, sigma
        (B,) or (1,) each, in the queries' dtype.
    want
        Any of ``mean``, ``trace``, ``diagonal``, ``product`` (needs `probes`), ``dense``. Without any, only the log
        density is computed.
    space
        ``posterior`` for posterior means and covariances, ``score`` for scores and precisions; see `moments`.
    probes
        (B, d, p) vectors to multiply the second moments with.
    tolerance
        Posterior mass that a backend may leave out; how much it did is certified in ``omitted``.
    precision
        Relative precision that the caller's results have (the eps of their dtype): what cannot show there may be
        computed with less care.
    memory
        What `memory_for` returned, to be handed on from one evaluation of a trajectory to the next: components that
        cannot matter there are not looked at again. Results do not change by more than `tolerance` allows.

    Returns
    -------
    Moments
        In the queries' namespace, dtype and device. Inputs are not validated here: the public classes of `dfmath` do.
    """
    backend = backend_for(queries, components)
    result: Moments = backend.posterior_moments(
        queries,
        components,
        alpha,
        sigma,
        want=frozenset(want) | ({"mean"} if want else set()),
        space=space,
        probes=probes,
        tolerance=tolerance,
        precision=precision,
        memory=memory,
    )
    return result


def memory_for(queries: Array, components: Components, growth: float) -> Any:
    """Return what the backend can remember along trajectories of these queries, None if nothing.

    `growth` is the factor by which noise may grow, in sigma^2/alpha^2, before what is remembered is of no use.
    """
    remember = getattr(backend_for(queries, components), "memory_for", None)
    return None if remember is None else remember(components, growth)


def cluster(queries: Array, components: Components, count: int | None, seed: int) -> None:
    """Sort components into clusters where the backend for these arrays can make use of them."""
    sort = getattr(backend_for(queries, components), "cluster", None)
    if sort is not None:
        sort(components, count, seed)
