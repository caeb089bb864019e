"""Sampling from priors, networks and functions alike: one loop over the stages of any scheme [MATH 6.1, 6.2]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfmath import _checks
from dfmath.backends._compat import Array, from_numpy
from dfmath.canonical import CanonicalNoise, Model, canonical_noise, states
from dfmath.schedules import Schedule
from dfmath.solvers import SOLVERS, SPACINGS, Churn, Scheme, Solver, Spacing, noise_levels, scheme
from dfmath.solvers.grids import levels_of

__all__ = ["Churn", "Samples", "follow", "sample"]


@dataclass(frozen=True)
class Samples:
    """Ends of trajectories of a sampler.

    Attributes
    ----------
    x
        (B, ...) at the last level: canonical states z, or states x when a schedule is given; both are in units of the
        data where that level is 0.
    rhos
        Noise levels at the ends of steps.
    evaluations
        Of the noise, for each sample.
    """

    x: Array
    rhos: tuple[float, ...]
    evaluations: int


def sample(
    model: Model,
    schedule: Schedule | None,
    x: Array,
    *,
    solver: Solver | Callable[[Sequence[float]], Scheme] = "deis",
    steps: int | Sequence[float] = 20,
    start: float | None = None,
    end: float | None = None,
    spacing: Spacing | None = None,
    clean: bool | None = None,
    order: int | None = None,
    time: Callable[[float], float] | Schedule | None = None,
    normalizer: Callable[[float], float] | None = None,
    churn: Churn | None = None,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    r"""Carry noise to samples by a solver of the probability flow, or of the reverse diffusion [MATH 2.2, 6.1].

    .. math:: z_{k+1} = z_{start} + \sum_i w_{ki}\, \epsilon(z_i, \rho_i) + s_k \xi_k

    Parameters
    ----------
    model
        A prior, whose noise is exact; a `ScoreNetwork`; or a function (z, rho) -> eps in canonical coordinates.
    schedule
        Says what x, start and end are; the weights do not depend on it. None: canonical states and levels.
    x
        (B, ...) states at the first level: canonical states z = x/alpha, or states x when a schedule is given. A sample
        from high noise starts at ``rho * noise``, or at ``prior.diffuse(1.0, rho).sample(n, seed)``.
    solver
        A name, see `dfmath.solvers.scheme`, or a function that makes a scheme of levels.
    steps
        Number of steps, or the noise levels rho themselves, decreasing.
    start, end
        First and last level: noise-to-signal ratios, or times when a schedule is given, whose ends they are if not
        given. They must be where a schedule ends without noise (``VP``, `end`) or without signal (`FlowMatching`,
        `start`). Not with levels.
    spacing
        Of levels between, see `noise_levels`; ``edm`` if not given. Not with levels.
    clean
        Whether the last of the steps goes from `end` to 0, and so returns the prediction of the data there. Yes if not
        given. Not with levels.
    order, time, normalizer, churn
        Options of the solver, see `dfmath.solvers.scheme`. A normalizer makes ``deis`` DEIS-SN [MATH 6.2].
    seed
        Of fresh noise; for stochastic solvers, and only for them.
    progress
        Called with (stages done, stages) after each.

    Returns
    -------
    Samples

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or the model returns what does not.

    Examples
    --------
    >>> import numpy as np
    >>> from dfmath import PointMasses
    >>> found = sample(PointMasses(np.array([[-1.0], [1.0]])), None, np.array([[5.0]]), start=10.0, end=0.01, steps=10)
    >>> found.x.round(6), found.evaluations
    (array([[1.]]), 10)
    """
    plan = _plan(solver, _levels(schedule, steps, start, end, spacing, clean), order, time, normalizer, churn)
    noise, x = canonical_noise(model), states(x)
    if plan.stochastic and seed is None:
        raise ValueError("seed belongs to stochastic solvers, got none for one")
    if seed is not None and not (plan.stochastic or churn is not None or solver == "ddpm"):
        raise ValueError(f"seed belongs to stochastic solvers, got {seed!r} for one that draws nothing")
    rng = None if seed is None else np.random.default_rng(_checks.random_seed(seed))
    state = x / _alpha(schedule, plan.rhos[0])
    for k, new in enumerate(follow(plan, state, noise, rng)):
        state = new
        if progress is not None:
            progress(k + 1, len(plan.stages))
    return Samples(state * _alpha(schedule, plan.rhos[-1]), tuple(plan.rhos[i] for i in plan.ends), plan.evaluations)


def follow(plan: Scheme, z: Array, noise: CanonicalNoise, rng: np.random.Generator | None = None) -> Iterator[Array]:
    """Yield the states of a scheme after the first, holding what later stages need.

    Random numbers are NumPy's, on the host, so that a seed means the same samples in every namespace.
    """
    kept, noises = {0: z}, {}
    state_until, noise_until = _last_uses(plan)
    for k, stage in enumerate(plan.stages):
        for i in stage.weights:
            if i not in noises:
                noises[i] = noise(kept[i], plan.rhos[i])
        new = stage.deterministic(kept, noises)
        if stage.fresh > 0.0 and rng is not None:
            new = new + stage.fresh * from_numpy(rng.standard_normal(tuple(z.shape)), z, z.dtype)
        kept[k + 1] = new
        kept = {i: part for i, part in kept.items() if state_until.get(i, -1) > k}
        noises = {i: part for i, part in noises.items() if noise_until[i] > k}
        yield new


def _last_uses(plan: Scheme) -> tuple[dict[int, int], dict[int, int]]:
    """The last stage that needs each state, to add to or to evaluate the noise there, and each noise."""
    states, noises = {}, {}
    for k, stage in enumerate(plan.stages):
        states.update(dict.fromkeys((stage.start, *stage.states), k))
        states.update({i: k for i in stage.weights if i not in noises})
        noises.update(dict.fromkeys(stage.weights, k))
    return states, noises


def _plan(solver: Any, levels: tuple[float, ...], *options: Any) -> Scheme:
    """The scheme on these levels."""
    named = dict(zip(("order", "time", "normalizer", "churn"), options, strict=True))
    if not callable(solver):
        name: Any = _checks.one_of("solver", solver, SOLVERS)
        return scheme(name, levels, **named)
    for name, value in named.items():
        if value is not None:
            raise ValueError(f"{name} is an option of solvers by name, got it beside a function")
    made = solver(levels)
    _checks.instance("what solver returns", made, Scheme)
    return made


def _levels(
    schedule: Schedule | None, steps: Any, start: Any, end: Any, spacing: Any, clean: bool | None
) -> tuple[float, ...]:
    """The grid that was asked for, in noise-to-signal ratios."""
    if schedule is not None:
        _checks.instance("schedule", schedule, Schedule)
    if isinstance(steps, str | bool) or steps is None:
        raise TypeError(f"steps must be a number of steps, or their noise levels, got {_checks.describe(steps)}")
    if not _checks.is_number(steps):
        for name, value in {"start": start, "end": end, "spacing": spacing, "clean": clean}.items():
            if value is not None:
                raise ValueError(f"{name} is not for steps that are levels, which say it themselves")
        return levels_of(steps)
    count, zero = _checks.positive_integer("steps", steps), clean is None or bool(clean)
    high, low = (_level(schedule, name, value) for name, value in (("start", start), ("end", end)))
    spacing = "edm" if spacing is None else _checks.one_of("spacing", spacing, SPACINGS)
    if zero and count == 1:
        return high, 0.0
    levels = noise_levels(high, low, count - zero, spacing, schedule if spacing.startswith("time") else None)
    return (*levels, 0.0) if zero else levels


def _level(schedule: Schedule | None, name: str, given: Any) -> float:
    """The noise-to-signal ratio of a start or an end."""
    if schedule is None:
        if given is None:
            raise ValueError(f"{name} must be given where there is no schedule: a noise-to-signal ratio")
        return _checks.real_number(name, given)
    t = schedule.domain[name == "start"] if given is None else _checks.real_number(name, given)
    if given is None and schedule(t)[0] == 0.0:
        raise ValueError(f"{name} must be given for a schedule whose last level has no signal, {schedule!r}")
    with _checks.on_behalf_of(name):
        rho = float(schedule.rho(t))
    if given is None and rho == 0.0:
        raise ValueError(f"{name} must be given for a schedule whose first level has no noise, {schedule!r}")
    return rho


def _alpha(schedule: Schedule | None, rho: float) -> float:
    """What turns z into x; 1 at the data."""
    return 1.0 if schedule is None or rho == 0.0 else float(schedule(schedule.time(rho))[0])
