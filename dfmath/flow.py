"""The probability-flow ODE of a prior, with its Jacobian and likelihood [MATH 2.1-2.5].

In canonical coordinates z = x/alpha and log rho, rho = sigma/alpha, all schedules are one equation:

    dz/d log rho = z - m(z; rho) = -rho^2 s(z; rho),     dA/d log rho = rho^2 F A,     d log q/d log rho = -tr(rho^2 F).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from dfmath import _checks
from dfmath.backends import Moments, Want, memory_for, posterior_moments
from dfmath.backends._compat import Array, accumulation_dtype, array_namespace, from_numpy, index_dtype
from dfmath.backends.array_api import component_tiles
from dfmath.backends.components import Components
from dfmath.backends.moments import fisher_forms
from dfmath.marginal import left_out
from dfmath.priors import Prior
from dfmath.runge_kutta import Block, Solution, integrate
from dfmath.schedules import Schedule

RISE = 4.0  # growth of rho^2 for which components are remembered where noise rises


@dataclass(frozen=True)
class FlowResult:
    """The end of probability-flow trajectories.

    Attributes
    ----------
    x
        (B, d) end points.
    jacobian
        (B, d, d) derivative of the end points by the starting points, both as the caller sees them: of z by z, or of x
        by x when a schedule is given. None if not asked for.
    log_density_change
        (B,) log q at the end less log q at the start, along the trajectory; None if not asked for.
    evaluations
        (B,) evaluations of the drift that each trajectory needed.
    error_estimate
        (B,) estimated Euclidean error of x: the local errors of the embedded pair, carried along the linearised flow.
        Conservative, because the pair's error estimate is of lower order than its result; for `rtol` far above 1e-6
        steps are too long for more than an order of magnitude.
    """

    x: Array
    jacobian: Array | None
    log_density_change: Array | None
    evaluations: Array
    error_estimate: Array


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihoods of trajectories' starting points.

    Attributes
    ----------
    log_density
        (B,) in nats.
    evaluations
        (B,) evaluations of the drift.
    error_estimate
        (B,) estimated Euclidean error of the end points, as in `FlowResult`.
    """

    log_density: Array
    evaluations: Array
    error_estimate: Array


def probability_flow(
    prior: Prior,
    x: Array,
    start: float,
    end: float,
    schedule: Schedule | None = None,
    *,
    jacobian: bool = False,
    log_density: bool = False,
    rtol: float = 1e-8,
    atol: float = 1e-10,
    native: bool = False,
) -> FlowResult:
    """Carry points along the probability-flow ODE between two noise levels [MATH 2.1-2.4].

    Parameters
    ----------
    prior
        Data distribution with a closed form.
    x
        (B, d) states at `start`: canonical states z = x/alpha, or states x when a schedule is given.
    start, end
        Noise-to-signal ratios rho > 0, or times when a schedule is given; in either direction.
    schedule
        Converts times to noise levels. The map does not depend on it otherwise [MATH 2.2].
    jacobian, log_density
        Integrate the flow's Jacobian and the change of log density along with the state.
    rtol, atol
        Local error for each step and each sample on its own, in the root-mean-square norm: of the state, relative to
        its distance from the prior's mean, and absolute; of the Jacobian `rtol` alone; of the log density `rtol` of one
        nat. With the log density, errors of the state are relative to the noise where that is smaller, and `atol` does
        not count: across trajectories the density changes by the score, which is of the order of 1/sigma.
    native
        Integrate x' = f x - (g^2/2) s in the schedule's own time and coordinates, to compare with; slower.

    Returns
    -------
    FlowResult
        A sample's result depends on the other samples of the batch by no more than rounding and what is left out of
        the drift: posterior mass of 1e-4 `rtol`.

    Raises
    ------
    TypeError, ValueError
        If a noise level is not positive and finite, a tolerance is out of range, or x does not fit the prior.

    Examples
    --------
    >>> import numpy as np
    >>> from dfmath import GaussianMixture
    >>> prior = GaussianMixture(np.zeros((1, 1)), 1.0)
    >>> flow = probability_flow(prior, np.array([[2.0]]), start=1.0, end=0.5)
    >>> bool(np.isclose(flow.x[0, 0], 2.0 * np.sqrt(1.25 / 2.0)))
    True
    """
    check_prior_and_schedule(prior, schedule)
    _checks.batch("x", x, prior.dim, None, prior.home)
    rtol, atol = check_tolerances(rtol, atol, x)
    if native and schedule is None:
        raise ValueError("native integration needs a schedule, got schedule=None")
    if jacobian:
        stages = (14, x.shape[0], prior.dim, prior.dim)
        _checks.fits_in_memory("the Jacobians and their stages", *stages, instead="carry fewer points at a time")
    field: _Field = _Native(prior, schedule) if native and schedule else _Canonical(prior, schedule)
    a, b = field.clock("start", start), field.clock("end", end)
    solution, layout = _solve(field, x, a, b, jacobian, log_density, rtol, atol)
    return _result(field, x, a, b, solution, layout)


def log_likelihood(
    prior: Prior,
    x: Array,
    start: float,
    end: float,
    schedule: Schedule | None = None,
    *,
    rtol: float = 1e-8,
    atol: float = 1e-10,
) -> Likelihood:
    """Return log q(x) at noise level `start` by integrating the flow up to `end` [MATH 2.4].

    log q_start(x) = log q_end(x_end) - change along the trajectory, with q_end the prior's exact density there. It
    equals ``prior.diffuse(...).log_density(x)``, which is cheaper: this is the route that networks must take.

    Parameters
    ----------
    prior, x, start, end, schedule, rtol, atol
        As for `probability_flow`; `start` is the low noise level that x lives at, `end` the high one.

    Returns
    -------
    Likelihood
        In nats, of the whole vector, not per dimension.

    Raises
    ------
    TypeError, ValueError
        As `probability_flow`.

    Examples
    --------
    >>> import numpy as np
    >>> from dfmath import GaussianMixture
    >>> prior, x = GaussianMixture(np.zeros((1, 1)), 1.0), np.array([[0.5]])
    >>> found = log_likelihood(prior, x, start=0.1, end=10.0).log_density
    >>> bool(np.isclose(found[0], prior.diffuse(1.0, 0.1).log_density(x)[0], atol=1e-6))
    True
    """
    end = _checks.real_number("end", end)
    flow = probability_flow(prior, x, start, end, schedule, log_density=True, rtol=rtol, atol=atol)
    alpha, sigma = (1.0, end) if schedule is None else schedule(end)
    terminal = prior.diffuse(alpha, sigma).log_density(flow.x)
    return Likelihood(terminal - flow.log_density_change, flow.evaluations, flow.error_estimate)


class _Layout:
    """Where state, Jacobian and log density stand in the flat vector that the integrator sees."""

    def __init__(self, dim: int, jacobian: bool, log_density: bool) -> None:
        self.dim, self.jacobian, self.log_density = dim, jacobian, log_density
        self.end = dim + (dim * dim if jacobian else 0)

    def blocks(self, field: _Field, rtol: float, atol: float) -> list[Block]:
        centre = _mean(field.prior)

        def size(t: Array, x: Array) -> Array:
            xp, (alpha, sigma) = array_namespace(x), field.noise(t)
            distance = xp.sqrt(xp.mean((x - alpha[:, None] * centre) ** 2, axis=1))
            return xp.minimum(distance, sigma) if self.log_density else distance

        blocks = [Block(0, self.dim, 0.0 if self.log_density else atol, size)]
        if self.jacobian:
            blocks.append(Block(self.dim, self.end, 0.0))
        if self.log_density:
            blocks.append(Block(self.end, self.end + 1, rtol))
        return blocks

    def pack(self, x: Array, jacobian: Array | None, log_density: Array | None) -> Array:
        xp = array_namespace(x)
        parts = [x]
        if self.jacobian:
            parts.append(xp.reshape(jacobian, (x.shape[0], self.dim**2)))
        if self.log_density:
            parts.append(log_density[:, None])  # type: ignore[index]
        return xp.concat(parts, axis=1)

    def state(self, y: Array) -> Array:
        return y[:, : self.dim]

    def matrix(self, y: Array) -> Array:
        return array_namespace(y).reshape(y[:, self.dim : self.end], (y.shape[0], self.dim, self.dim))

    @property
    def want(self) -> tuple[Want, ...]:
        """What the drift needs: the Jacobian's own is F times it."""
        forms: dict[Want, bool] = {"product": self.jacobian, "trace": self.log_density}
        return ("mean", *(form for form, needed in forms.items() if needed))


class _Field(Protocol):
    """The ODE in some coordinates: x' = a x - b s, whose Jacobian is a I + b F."""

    prior: Prior
    stretches: bool  # whether a is not 0

    def clock(self, name: str, value: Any) -> float:
        """Turn what the caller gave into the integrator's time."""

    def noise(self, t: Array) -> tuple[Array, Array]:
        """(alpha, sigma) of the state at t."""

    def coefficients(self, t: Array) -> tuple[Array, Array]:
        """(a, b) at t."""

    def scale(self, t: float) -> float:
        """What the caller's x is, in units of the state, at t."""


class _Canonical:
    """t = log rho, state z = x/alpha: a = 0, b = rho^2 [MATH 2.2]."""

    stretches = False

    def __init__(self, prior: Prior, schedule: Schedule | None) -> None:
        self.prior, self.schedule = prior, schedule

    def clock(self, name: str, value: Any) -> float:
        return math.log(_rho(name, value, self.prior, self.schedule))

    def noise(self, t: Array) -> tuple[Array, Array]:
        xp = array_namespace(t)
        return xp.ones_like(t), xp.exp(t)

    def coefficients(self, t: Array) -> tuple[Array, Array]:
        xp = array_namespace(t)
        return xp.zeros_like(t), xp.exp(2.0 * t)

    def scale(self, t: float) -> float:
        return 1.0 if self.schedule is None else float(self.schedule(self.schedule.time(math.exp(t)))[0])


class _Native:
    """t the schedule's time, state x: a = f, b = g^2/2 [MATH 2.1]."""

    stretches = True

    def __init__(self, prior: Prior, schedule: Schedule) -> None:
        self.prior, self.schedule = prior, schedule

    def clock(self, name: str, value: Any) -> float:
        _rho(name, value, self.prior, self.schedule)
        return float(value)

    def noise(self, t: Array) -> tuple[Array, Array]:
        alpha, sigma = self.schedule(t)
        return alpha, sigma

    def coefficients(self, t: Array) -> tuple[Array, Array]:
        return self.schedule.drift(t), 0.5 * self.schedule.diffusion_squared(t)

    def scale(self, t: float) -> float:
        return 1.0


def _solve(
    field: _Field, x: Array, a: float, b: float, jacobian: bool, log_density: bool, rtol: float, atol: float
) -> tuple[Solution, _Layout]:
    xp = array_namespace(x)
    dtype = accumulation_dtype(xp, x)
    layout, count, dim = _Layout(field.prior.dim, jacobian, log_density), x.shape[0], x.shape[1]
    eye = xp.eye(dim, dtype=dtype, device=x.device)
    state = layout.pack(
        xp.astype(x, dtype) / field.scale(a),
        xp.broadcast_to(eye, (count, dim, dim)),
        xp.zeros((count,), dtype=dtype, device=x.device),
    )

    trail = _Trail(field, state, b > a, rtol)

    def drift(t: Array, y: Array) -> Array:
        return _drift(trail, layout, t, y)

    def tangent(t: Array, y: Array, e: Array) -> Array:
        moments = trail.moments(t, layout.state(y), ("product",), e[:, :, None])
        product = fisher_forms(moments).product[:, :, 0]  # type: ignore[index]
        stretch, weight = field.coefficients(t)
        return stretch[:, None] * e + weight[:, None] * product

    return integrate(drift, tangent, state, a, b, layout.blocks(field, rtol, atol), rtol), layout


def _mean(prior: Prior) -> Array:
    """Mean of the prior, (d,) in the accumulation dtype, tile by tile."""
    return sum(prior.components.each(_weighted_sum))


def _weighted_sum(part: Components) -> Array:
    xp, dtype = array_namespace(part.centres), accumulation_dtype(array_namespace(part.centres), part.centres)
    tiles = (part.tile(start, stop, dtype) for start, stop in component_tiles(part, 1))
    return sum(xp.matmul(xp.exp(tile.log_weights[0, :]), tile.centres[0, ...]) for tile in tiles)


def _drift(trail: _Trail, layout: _Layout, t: Array, y: Array) -> Array:
    """Right-hand sides of state, Jacobian and log density from one sweep of moments."""
    x, field = layout.state(y), trail.field
    stretch, weight = field.coefficients(t)
    matrix = layout.matrix(y) if layout.jacobian else None
    moments = trail.moments(t, x, layout.want, matrix)
    slope = stretch[:, None] * x - weight[:, None] * moments.mean
    fisher, turn, growth = fisher_forms(moments), None, None
    if layout.jacobian:
        turn = weight[:, None, None] * fisher.product
        if field.stretches:
            turn = turn + stretch[:, None, None] * matrix
    if layout.log_density:
        growth = -layout.dim * stretch - weight * fisher.trace
    return layout.pack(slope, turn, growth)


class _Trail:
    """Moments along the trajectories of one call, which remember what cannot matter nearby.

    What is left out of the drift, or rounded, shows in rho^2 F by as much: far below the error of a step.
    """

    def __init__(self, field: _Field, state: Array, rising: bool, rtol: float) -> None:
        self.field, self.components = field, field.prior.components
        eps = float(array_namespace(state).finfo(state.dtype).eps)
        self.precision = max(eps, 1e-3 * rtol)
        self.tolerance = left_out(self.precision, covariance=False)
        self.memory = memory_for(state, self.components, RISE if rising else 1.0)

    def moments(self, t: Array, x: Array, want: tuple[Want, ...], probes: Array | None = None) -> Moments:
        alpha, sigma = self.field.noise(t)
        return posterior_moments(
            x,
            self.components,
            alpha,
            sigma,
            want,
            space="score",
            probes=probes,
            tolerance=self.tolerance,
            precision=self.precision,
            memory=self.memory,
        )


def _result(field: _Field, x: Array, a: float, b: float, solution: Solution, layout: _Layout) -> FlowResult:
    xp, scale = array_namespace(x), field.scale(b)
    ratio, y = scale / field.scale(a), solution.state

    def out(value: Array) -> Array:
        return xp.astype(value, x.dtype, copy=False)

    change = None
    if layout.log_density:
        change = out(y[:, layout.end] - layout.dim * math.log(ratio))
    return FlowResult(
        x=out(scale * layout.state(y)),
        jacobian=out(ratio * layout.matrix(y)) if layout.jacobian else None,
        log_density_change=change,
        evaluations=from_numpy(solution.evaluations, x, index_dtype(x)),
        error_estimate=out(scale * xp.sqrt(xp.sum(solution.error**2, axis=1))),
    )


def _rho(name: str, value: Any, prior: Prior, schedule: Schedule | None) -> float:
    """Return the noise-to-signal ratio that the caller means by a ratio, or by a time of the schedule."""
    rho, what = _checks.real_number(name, value), name
    if schedule is not None:
        with _checks.on_behalf_of(name):
            rho, what = schedule.rho(rho), f"rho({name})"
    return _checks.noise_number(what, rho, prior.home)


def check_prior_and_schedule(prior: Any, schedule: Any) -> None:
    """Raise unless these are a prior, not a marginal or its data, and a schedule, not its name."""
    if hasattr(prior, "shape"):
        raise TypeError(f"prior must be a Prior; dfmath.PointMasses(points) makes one, got {_checks.describe(prior)}")
    _checks.instance("prior", prior, Prior)
    if isinstance(schedule, str | type):
        came = _checks.describe(schedule)
        raise TypeError(f"schedule must be a Schedule, such as dfmath.schedules.VP.linear(), got {came}")
    if schedule is not None:
        _checks.instance("schedule", schedule, Schedule)


def check_tolerances(rtol: Any, atol: Any, like: Array) -> tuple[float, float]:
    """Return rtol and atol as floats; below 10 eps of the accumulation dtype no step would be accepted."""
    xp = array_namespace(like)
    floor = 10 * float(xp.finfo(accumulation_dtype(xp, like)).eps)
    rtol, atol = _checks.fraction("rtol", rtol, floor), _checks.real_number("atol", atol)
    if not 0 <= atol < math.inf:
        raise ValueError(f"atol must be zero or positive, and finite, got {atol:g}")
    return rtol, atol
