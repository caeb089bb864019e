"""Run every theorem on a model and collect what they found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal, NoReturn

import numpy as np

from dfmath import _checks, backends
from dfmath.backends._compat import Array
from dfmath.priors import Prior
from dfmath.theorems import approximate, averages, forms, identities, maps, trajectories  # noqa: F401 - they register
from dfmath.theorems.case import Case, Model, mixture_model, point_model
from dfmath.theorems.registry import NotApplicable, Outcome, Theorem, registered
from dfmath.theorems.subject import subject_of

Verdict = Literal["pass", "fail", "not applicable"]

LEVELS = 8
BACKENDS = ("numba", "array-api", "array-api-strict", "torch", "jax", "cupy", "dask")
_COMPUTING = {"numba": "numba", "dask": "numba", "torch": "device", "cupy": "device"}  # others on the reference
CHUNKS = 8  # that Dask holds the data in
DTYPES = ("float64", "float32")


@dataclass(frozen=True)
class Level:
    """A theorem's outcome at one noise level."""

    rho: float
    discrepancy: float
    threshold: float
    reason: str


@dataclass(frozen=True)
class Result:
    """A theorem's verdict over all noise levels, with its worst level in front."""

    theorem: Theorem
    verdict: Verdict
    worst: Level | None
    reason: str
    levels: tuple[Level, ...]

    def as_dict(self) -> dict[str, Any]:
        """A plain object for JSON; infinite discrepancies become null."""
        t = self.theorem
        about = {"number": t.number, "title": t.title, "statement": t.statement, "source": t.source}
        return {
            **about,
            "hypotheses": t.hypotheses,
            "verdict": self.verdict,
            "reason": self.reason,
            "discrepancy": None if self.worst is None else _finite(self.worst.discrepancy),
            "threshold": None if self.worst is None else self.worst.threshold,
            "levels": [{**vars(level), "discrepancy": _finite(level.discrepancy)} for level in self.levels],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def noise_levels(rho_max: float = 80.0, rho_min: float = 0.02, count: int = LEVELS) -> tuple[float, ...]:
    """Return noise-to-signal ratios from high to low, evenly spaced in their logarithm."""
    rho_max, rho_min = _checks.real_number("rho_max", rho_max), _checks.real_number("rho_min", rho_min)
    count = _checks.positive_integer("count", count)
    if not 0 < rho_min < rho_max < math.inf:
        raise ValueError(f"rho_min and rho_max must satisfy 0 < rho_min < rho_max, got {rho_min:g} and {rho_max:g}")
    return tuple(float(rho) for rho in np.geomspace(rho_max, rho_min, count))


def select(only: Iterable[str] | None = None) -> list[Theorem]:
    """Return the theorems whose numbers are given, or all; ``1`` or ``1.2`` selects all that begin so.

    Raises
    ------
    ValueError
        If a number matches none; the message suggests the nearest.
    """
    everything = registered()
    if only is None:
        return everything
    chosen: dict[str, Theorem] = {}
    for number in (only,) if isinstance(only, str) else only:
        _checks.instance("theorem", number, str)
        found = [t for t in everything if t.number == number] or [t for t in everything if _begins(t.number, number)]
        if not found:
            _unknown(number, everything)
        chosen |= {t.number: t for t in found}
    return [t for t in everything if t.number in chosen]


def _unknown(number: str, everything: list[Theorem]) -> NoReturn:
    numbers = [t.number for t in everything]
    near = get_close_matches(number, numbers, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"theorem must be a number such as 1.2, or how some begin, such as 3, of {numbers[0]} to {numbers[-1]}, "
        f"got {number!r}{hint}"
    )


def _begins(number: str, prefix: str) -> bool:
    rest = number.removeprefix(prefix)
    return rest != number and not rest[:1].isdigit() and (rest[0] == "." or rest[0].isalpha())


def builder(backend: str = "numba", dtype: str = "float64") -> Callable[[Any], Array]:
    """Return a function that puts NumPy values into the array library and dtype to be verified."""
    _checks.one_of("backend", backend, BACKENDS)
    _checks.one_of("dtype", dtype, DTYPES)
    if backend in ("numba", "array-api", "dask"):
        return lambda values: np.ascontiguousarray(values, dtype=dtype)
    try:
        return _import_builder(backend, dtype)
    except ImportError:
        raise ValueError(f"backend {backend!r} needs a library that is not installed; pip install it first") from None


def _import_builder(backend: str, dtype: str) -> Callable[[Any], Array]:
    if backend == "torch":
        import torch

        return lambda values: torch.as_tensor(np.array(values, dtype=dtype))
    if backend == "array-api-strict":
        import array_api_strict

        return lambda values: array_api_strict.asarray(np.array(values, dtype=dtype))
    if backend == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
        return lambda values: jax.numpy.asarray(np.array(values, dtype=dtype))
    import cupy

    try:
        cupy.zeros(1)
    except (RuntimeError, OSError) as error:  # no driver, one that is too old, no device
        raise ValueError(f"backend 'cupy' needs a CUDA device and its driver, got: {error}") from None
    return lambda values: cupy.asarray(np.array(values, dtype=dtype))


def _in_chunks(array: Array) -> Any:
    """A Dask array, in chunks of rows."""
    try:
        import dask.array
    except ImportError:
        raise ValueError("backend 'dask' needs a library that is not installed; pip install dask first") from None
    return dask.array.from_array(array, chunks=(-(-len(array) // CHUNKS), *array.shape[1:]))


def model(
    points: Any, mixture: int | None = None, backend: str = "numba", dtype: str = "float64", seed: int = 0
) -> Model:
    """Return the prior to verify on: the points themselves, or a Gaussian mixture fitted to them.

    Parameters
    ----------
    points
        (N, d) NumPy array.
    mixture
        Number of components with full covariances to fit by scikit-learn; None for point masses.
    backend, dtype
        Array library and dtype of the prior's arrays, as `builder` takes them.
    seed
        Of the fit.
    """
    _checks.real_array("points", points, "(N, d)", 2)
    build, hold = builder(backend, dtype), _in_chunks if backend == "dask" else lambda array: array
    computing = _COMPUTING.get(backend, "array-api")
    if mixture is None:
        return replace(point_model(points, build, dtype, hold), backend=computing)
    mixture = _checks.positive_integer("mixture", mixture)
    from sklearn.mixture import GaussianMixture

    if mixture > len(points):
        raise ValueError(f"mixture must be between 1 and the number of points, {len(points)}, got {mixture}")
    scale = float(np.var(points, axis=0).mean())
    fitted = GaussianMixture(mixture, reg_covar=1e-3 * scale or 1e-3, random_state=seed).fit(points)
    found = mixture_model(fitted.means_, fitted.covariances_, fitted.weights_, build, dtype, hold)
    return replace(found, backend=computing)


def verify(
    subject: Model | Prior | Array,
    rhos: Sequence[float] | None = None,
    *,
    only: Iterable[str] | None = None,
    seed: int = 0,
    progress: Callable[[Theorem], None] = lambda theorem: None,
) -> list[Result]:
    """Check every registered theorem on a prior over noise levels [MATH 1-4].

    Parameters
    ----------
    subject
        A `PointMasses` or `GaussianMixture`; points (N, d), as point masses; or what `model` returns.
    rhos
        Noise-to-signal ratios from high to low; `noise_levels()` by default.
    only
        Numbers of the theorems to check, or their beginnings; all by default.
    seed
        Of queries, vectors and samples.
    progress
        Called with each theorem before it is checked.

    Returns
    -------
    list of Result
        In the order of their numbers. A check that raises counts as failed, with what it said.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> found = verify(np.array([[0.0], [1.0], [3.0]]), [2.0, 0.1], only=["1.2"])
    >>> [(result.theorem.number, result.verdict) for result in found]
    [('1.2', 'pass')]
    """
    subject, levels, seed = subject_of(subject), _levels(rhos), _checks.random_seed(seed)
    cases = [Case(subject, rho, levels, seed) for rho in levels]
    results = []
    with backends.use(subject.backend) if subject.backend else nullcontext():
        for theorem in select(only):
            progress(theorem)
            results.append(_check(theorem, cases if theorem.scope == "level" else cases[:1]))
    return results


def _levels(rhos: Sequence[float] | None) -> tuple[float, ...]:
    if rhos is None:
        return noise_levels()
    if isinstance(rhos, str) or not isinstance(rhos, Iterable):
        raise TypeError(f"rhos must be a sequence of noise-to-signal ratios, got {_checks.describe(rhos)}")
    levels = tuple(_checks.real_number("rhos", rho) for rho in rhos)
    falling = all(high > low for high, low in pairwise(levels))
    if not levels or not falling or not 0.0 < levels[-1] <= levels[0] < math.inf:
        raise ValueError(f"rhos must be positive, finite and from high to low, got {list(levels)}")
    return levels


def _check(theorem: Theorem, cases: list[Case]) -> Result:
    levels, excuse = [], ""
    for case in cases:
        try:
            outcome = _outcome(theorem, case)
        except NotApplicable as reason:
            excuse = str(reason)
            continue
        levels.append(Level(case.rho, outcome.discrepancy, outcome.threshold, outcome.reason))
    if not levels:
        return Result(theorem, "not applicable", None, excuse, ())
    worst = max(levels, key=_severity)
    passed = all(level.discrepancy <= level.threshold for level in levels)
    return Result(theorem, "pass" if passed else "fail", worst, worst.reason, tuple(levels))


def _outcome(theorem: Theorem, case: Case) -> Outcome:
    """What the check measured; whatever it raises, but that it does not apply, is a failure that says so."""
    try:
        outcome = theorem.check(case)
        if not isinstance(outcome, Outcome):
            raise TypeError(f"a check must return an Outcome, got {_checks.describe(outcome)}")
    except NotApplicable:
        raise
    except Exception as error:
        return Outcome(math.inf, 0.0, f"the check raised {type(error).__name__}: {error}")
    return outcome


def _severity(level: Level) -> float:
    """The share of what is allowed; what is not a number is worse than any."""
    if math.isnan(level.discrepancy) or (level.discrepancy > level.threshold == 0.0):
        return math.inf
    return level.discrepancy / level.threshold if level.threshold else 0.0
