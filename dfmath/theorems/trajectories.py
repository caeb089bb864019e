"""The probability-flow ODE [MATH 2.1-2.5]."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dfmath.backends._compat import to_numpy
from dfmath.flow import FlowResult, log_likelihood, probability_flow
from dfmath.priors import GaussianMixture, Prior
from dfmath.schedules import EDM, VE, VP, Discrete, FlowMatching, Schedule, SubVP
from dfmath.theorems.case import Case, Model
from dfmath.theorems.compare import length, relative, standard_errors
from dfmath.theorems.registry import PAPER, NotApplicable, Outcome, theorem

_STARTS = 4
_MATRIX_DIM = 128  # Jacobians are integrated up to this dimension
_RTOL = 1e-9
_LINE_VALUES = 200  # that a quadrature in one dimension takes of the data
_NATS = 1e-5


def schedules() -> dict[str, Schedule]:
    """Schedules that reach all noise levels from 80 to 0.02, one of each family."""
    return {"VP": VP.linear(), "sub-VP": SubVP.linear(), "EDM": EDM(sigma_max=200.0), "flow matching": FlowMatching()}


def _all_schedules() -> dict[str, Schedule]:
    """Every family, where one evaluation is all there is to do; the table's log rho is one straight line in time."""
    rhos = np.geomspace(1e-3, 1e3, 13)
    table = Discrete(1.0 / (1.0 + rhos**2))
    return {**schedules(), "cosine": VP.cosine(), "VE": VE(0.001, 200.0), "discrete": table}


def starts(case: Case, n: int = _STARTS) -> Any:
    """Draws from the marginal at the highest noise level, canonical coordinates."""
    return case.model.prior.diffuse(1.0, case.rhos[0]).sample(n, case.seed)


def flow(case: Case, prior: Prior, x: Any, **options: Any) -> FlowResult:
    """The flow from the highest noise level to the lowest, at the checks' tolerance."""
    return probability_flow(prior, x, case.rhos[0], case.rhos[-1], rtol=_RTOL, atol=_RTOL * case.rhos[-1], **options)


def need_small(case: Case) -> None:
    """Jacobians hold d^2 numbers for each trajectory."""
    if case.dim > _MATRIX_DIM:
        raise NotApplicable(f"Jacobians are integrated up to d = {_MATRIX_DIM}, and d = {case.dim}")


def tolerance(case: Case, float64: float = 1e-7) -> float:
    """Threshold for end points of the flow: many local errors of 1e-9, or the dtype of the states."""
    return float64 if case.model.dtype == "float64" else 2e-5


@theorem(
    "2.1", "Drift of the probability-flow ODE", r"f x - (g^2/2) s = \alpha' m + \sigma' \epsilon^*", "Song et al. 2021"
)
def drift(case: Case) -> Outcome:
    """alpha' and sigma' by central differences of the schedules, f and g^2 as they give them."""
    worst = 0.0
    for schedule in _all_schedules().values():
        t = schedule.time(case.rho)
        alpha, sigma = schedule(t)
        q = case.model.prior.diffuse(alpha, sigma)
        x = case.model.build(case.x64 * (alpha / case.alpha))
        score, mean = case.host(q.score(x)), case.host(q.posterior_mean(x))
        left = schedule.drift(t) * case.host(x) - 0.5 * schedule.diffusion_squared(t) * score
        alpha_slope, sigma_slope = _slopes(schedule, t)
        right = alpha_slope * mean - sigma_slope * sigma * score
        size = abs(schedule.drift(t)) * length(case.host(x)) + schedule.diffusion_squared(t) * length(score)
        worst = max(worst, relative(left, right, size))
    threshold = max(case.precision, 1e-8)
    return Outcome(worst, threshold, "central differences of the schedules are good to 1e-8")


def _slopes(schedule: Schedule, t: float) -> tuple[float, float]:
    """alpha' and sigma' at t: extrapolated central differences, within the domain."""
    low, high = schedule.domain
    h = min(1e-3 * t, 0.4 * (t - low), 0.4 * (high - t))
    if h <= 0:
        raise NotApplicable(f"rho = {schedule.rho(t):g} is at an end of a schedule's domain")
    (a1, s1), (a2, s2) = (_central(schedule, t, step) for step in (h, h / 2))
    return (4 * a2 - a1) / 3, (4 * s2 - s1) / 3


def _central(schedule: Schedule, t: float, h: float) -> tuple[float, float]:
    (a_up, s_up), (a_down, s_down) = schedule(t + h), schedule(t - h)
    return (a_up - a_down) / (2 * h), (s_up - s_down) / (2 * h)


@theorem(
    "2.1b",
    "Jacobian of the drift",
    r"\partial(f x - (g^2/2) s)/\partial x = f I + (g^2/2) F",
    "Song et al. 2021; sign as derived",
)
def drift_jacobian(case: Case) -> Outcome:
    """v.(f I + (g^2/2) F) v of each schedule against that of alpha' m + sigma' eps*, with the truth's Hessian of log q.

    By Tweedie's formula that drift is (alpha'/alpha) (x + sigma^2 s) - sigma' sigma s; alpha' and sigma' are central
    differences. F and the Hessian at a schedule's alpha are this case's in other units, since z and rho are the same.
    """
    true, square = case.curvature, length(case.v64) ** 2
    product, spread = (case.fisher_v * case.v64).sum(axis=1), 1.0 + case.covariance_trace / case.rho**2
    worst = 0.0
    for schedule in _all_schedules().values():
        t = schedule.time(case.rho)
        alpha, sigma = schedule(t)
        units, half = (case.alpha / alpha) ** 2, schedule.diffusion_squared(t) / 2
        got = schedule.drift(t) * square + half * units * product
        (alpha_slope, sigma_slope), curvature = _slopes(schedule, t), units * true.value
        wanted = alpha_slope / alpha * (square + sigma**2 * curvature) - sigma_slope * sigma * curvature
        size = square * (abs(schedule.drift(t)) + abs(half) / sigma**2 * spread)
        worst = max(worst, relative(got[:, None], wanted[:, None], size))
    blur = float(np.max(case.sigma**2 * true.error / (square * spread)))
    reason = f"central differences of the schedules are good to 1e-8, plus ten times the error of log q's, {blur:.0e}"
    return Outcome(worst, max(case.precision, 1e-8) + 10 * min(blur, 1e-5), reason)


@theorem(
    "2.2",
    "Canonical coordinates",
    r"dz/d\log\rho = z - m(z; \rho) \text{ for every schedule}",
    "new as a tool",
    scope="prior",
)
def canonical(case: Case) -> Outcome:
    """Each schedule's own ODE, integrated in its own time, against the canonical one."""
    x = starts(case)
    wanted = case.host(flow(case, case.model.prior, x).x)
    worst = 0.0
    for schedule in schedules().values():
        got = case.host(native(case, case.model.prior, x, schedule).x)
        worst = max(worst, relative(got, wanted, _size(case)))
    return Outcome(worst, tolerance(case, 1e-6), f"local errors of {_RTOL:.0e} in two integrations")


def _size(case: Case) -> float:
    """The spread of the data, the scale of end points, plus what their offset costs in the dtype."""
    offset = float(np.linalg.norm(case.model.mean))
    rounding = offset if case.model.dtype == "float32" else 1e-6 * offset
    return math.sqrt(float(np.trace(case.model.covariance))) + case.rhos[-1] * math.sqrt(case.dim) + rounding


def native(case: Case, prior: Prior, z: Any, schedule: Schedule, **options: Any) -> FlowResult:
    """The flow in a schedule's own time and coordinates, given and returned in canonical ones."""
    begin, end = schedule.time(case.rhos[0]), schedule.time(case.rhos[-1])
    before, after = schedule(begin)[0], schedule(end)[0]
    x = case.model.build(case.host(z) * before)
    atol = _RTOL * case.rhos[-1] * after
    result = probability_flow(prior, x, begin, end, schedule, native=True, rtol=_RTOL, atol=atol, **options)
    matrix = None if result.jacobian is None else result.jacobian * (before / after)
    return FlowResult(result.x / after, matrix, None, result.evaluations, result.error_estimate / after)


@theorem("2.3", "Jacobian of the flow", r"dA/d\log\rho = (I - P/\rho^2) A", PAPER, scope="prior")
def flow_jacobian(case: Case) -> Outcome:
    """A v against central differences of end points, extrapolated from two steps.

    Between two data points the flow divides ever more sharply as noise falls, and no difference quotient resolves it:
    the check ends at the noise level where trajectories still vary smoothly.
    """
    need_small(case)
    if case.model.dtype == "float32":
        raise NotApplicable("differences of end points in float32 are rounding")
    x, v = case.host(starts(case, 2)), case.v64[:2]
    end = max(case.rhos[-1], 0.3 * math.sqrt(float(np.trace(case.model.covariance)) / case.dim))
    if end >= case.rhos[0]:
        raise NotApplicable("the data are wider than the highest noise level")

    def run(points: Any, jacobian: bool = False) -> FlowResult:
        at = case.model.build(points)
        return probability_flow(case.model.prior, at, case.rhos[0], end, jacobian=jacobian, rtol=1e-11, atol=1e-13)

    def quotient(h: float) -> Any:
        return (case.host(run(x + h * v).x) - case.host(run(x - h * v).x)) / (2 * h)

    h = 1e-3 * case.rhos[0]
    coarse, fine = quotient(h), quotient(h / 2)
    wanted = (4 * fine - coarse) / 3
    matrix = case.host(run(x, True).jacobian)
    scale = length(v) * np.sqrt((matrix**2).sum(axis=(1, 2)))
    blur = relative(fine, coarse, scale)
    reason = f"1e-6, plus the difference quotients' own disagreement, {blur:.0e}"
    return Outcome(relative(np.einsum("bij,bj->bi", matrix, v), wanted, scale), 1e-6 + min(blur, 1e-3), reason)


@theorem(
    "2.4",
    "Likelihood along the flow",
    r"\log q_0(z_0) = \log q_T(z_T) - \int \mathrm{tr}(I - P/\rho^2)\, d\log\rho",
    "Chen et al. 2018; Song et al. 2021",
    scope="prior",
)
def likelihood(case: Case) -> Outcome:
    """The change along the trajectory, there and back, against the exact densities, in nats per dimension."""
    prior, x = case.model.prior, starts(case)
    result = flow(case, prior, x, log_density=True)
    begin = case.host(prior.diffuse(1.0, case.rhos[0]).log_density(x))
    finish = case.host(prior.diffuse(1.0, case.rhos[-1]).log_density(result.x))
    back = log_likelihood(prior, result.x, case.rhos[-1], case.rhos[0], rtol=_RTOL)
    ways = (begin + case.host(result.log_density_change), case.host(back.log_density))
    return Outcome(
        max(float(np.abs(way - finish).max()) for way in ways) / case.dim,
        1e-7 + _density_rounding(case, result),
        f"local errors of {_RTOL:.0e}, and the end point's rounding times the score there",
    )


def _density_rounding(case: Case, result: FlowResult) -> float:
    """What an end point rounded to its dtype changes its log density by, per dimension: |s| |dx|, |s| about 1/rho."""
    eps = float(np.finfo(case.model.dtype).eps)
    move = eps * float(length(case.host(result.x)).max())
    return move * 3.0 * math.sqrt(case.dim) / case.rhos[-1] / case.dim


@theorem(
    "2.4b",
    "Likelihood and the flow's volume",
    r"\log q_0(z_0) = \log q_T(z_T) + \log|\det dz_T/dz_0|",
    "change of variables",
    scope="prior",
)
def volume(case: Case) -> Outcome:
    """log det A from the integrated matrix against the integrated trace, in nats per dimension."""
    need_small(case)
    x = starts(case)
    result = flow(case, case.model.prior, x, jacobian=True, log_density=True)
    log_volume = np.linalg.slogdet(case.host(result.jacobian))[1]
    gap = float(np.abs(log_volume + case.host(result.log_density_change)).max()) / case.dim
    condition = float(np.linalg.cond(case.host(result.jacobian)).max())
    eps = float(np.finfo(case.model.dtype).eps)
    reason = f"local errors of {_RTOL:.0e} relative to |A|, which log det magnifies by A's condition {condition:.0e}"
    return Outcome(gap, 1e-6 + (10 * _RTOL + eps) * condition, reason)


@theorem(
    "2.4c",
    "Likelihood without a trajectory",
    r"-\log q_0(x_0) = h_G(x_0) - \tfrac12 \int [\mathrm{mmse}_G - E_\epsilon|x_0 - m|^2]\, d\,\mathrm{snr}",
    "Guo et al. 2005; Kong et al. 2023",
    scope="prior",
)
def i_mmse_likelihood(case: Case) -> Outcome:
    """For data noised to rho_min, so that they have a density: averages over draws of eps, at two points.

    They are known to two nats in 64 dimensions. One dimension comes first, where quadrature over eps is exact.
    """
    if case.model.dtype == "float32":
        raise NotApplicable("the integrand is a difference of errors that agree to more than float32 digits")
    if (missed := _by_quadrature(case)) > _NATS:
        return Outcome(missed, _NATS, "nats in one dimension: the integral over log snr ends where 1e-6 is left")
    smooth, noise = _smoothed(case), case.rng(5).standard_normal((64, 1, case.dim))
    point, centre = to_numpy(smooth.sample(2, case.seed)).astype(np.float64), case.model.mean
    variance = float(np.trace(case.model.covariance)) / case.dim + case.rhos[-1] ** 2
    draws = _saved(case, smooth, point, noise, centre, variance)
    # |eps|^2 - d has mean zero, and much of the draws' variance: what regression on it takes away is no bias.
    known = (noise**2).sum(axis=2) - case.dim
    draws = draws - known * ((known - known.mean()) * draws).sum(axis=0) / ((known - known.mean()) ** 2).sum()
    wanted = _nats(case, smooth, point, centre, variance)
    return standard_errors(draws, wanted, slack=1e-2 * case.dim**0.5 + 1e-4 * float(np.abs(wanted).max()))


def _saved(case: Case, smooth: Prior, point: Any, noise: Any, centre: Any, variance: float) -> Any:
    """Half the integral over snr of |x0 - m_G|^2 - |x0 - m|^2, (n, 2) for eps and points x0; G = N(centre, variance).

    A trapezoidal sum over log snr; its ends are where both errors agree, far above and below the data.
    """
    logs = np.linspace(math.log(1e-6 / variance), math.log(1e6 / case.rhos[-1] ** 2), 161)
    values = np.empty((len(logs), len(noise), len(point)))
    for i, snr in enumerate(np.exp(logs)):
        sigma = math.sqrt(1.0 / (1.0 + snr))
        alpha = math.sqrt(snr) * sigma
        x = alpha * point + sigma * noise
        mean = smooth.diffuse(alpha, sigma).posterior_mean(case.model.build(x.reshape(-1, x.shape[2])))
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        gaussian = ((point - centre - gain * (x - alpha * centre)) ** 2).sum(axis=2)
        values[i] = 0.5 * snr * (gaussian - ((point - case.host(mean).reshape(x.shape)) ** 2).sum(axis=2))
    return np.trapezoid(values, logs, axis=0)


def _nats(case: Case, smooth: Prior, point: Any, centre: Any, variance: float) -> Any:
    """What the integral must be, h_G(x0) + log q0(x0)."""
    square = ((point - centre) ** 2).sum(axis=1)
    reference = 0.5 * (square / variance + point.shape[1] * math.log(2 * math.pi * variance))
    return reference + case.host(smooth.diffuse(1.0, 1e-6 * case.rhos[-1]).log_density(case.model.build(point)))


def _by_quadrature(case: Case) -> float:
    """The error in nats on the first coordinate that varies, with eps on a grid that integrates its Gaussian exactly.

    The point lies near a component, so a mean that leaps over to another one does so over at least 1/20 in eps: an
    even grid with steps of 0.05 is right to 1e-8.
    """
    values = case.model.means[:, int((case.model.means.std(axis=0) > 0).argmax())]
    values, place = np.unique(values, return_inverse=True)
    weights = np.bincount(place, case.model.shares)[:_LINE_VALUES]
    values, weights = values[:_LINE_VALUES, None], weights / weights.sum()
    low, build = case.rhos[-1] ** 2, case.model.build
    smooth = GaussianMixture(build(values), low, weights=build(weights))
    centre = weights @ values
    variance = float(weights @ (values[:, 0] - centre[0]) ** 2) + low
    point, grid = to_numpy(smooth.sample(1, case.seed)), np.linspace(-7.5, 7.5, 301)
    density = np.exp(-(grid**2) / 2)
    found = density @ _saved(case, smooth, point, grid[:, None, None], centre, variance) / density.sum()
    return float(np.abs(found - _nats(case, smooth, point, centre, variance)).max())


def _smoothed(case: Case) -> GaussianMixture:
    """The data noised to rho_min, as a prior of its own."""
    model: Model = case.model
    count, low = len(model.means), case.rhos[-1] ** 2
    weights = model.build(model.shares)
    if model.covariances is None:
        return GaussianMixture(model.build(model.means), low, weights=weights)
    return GaussianMixture(
        model.build(model.means),
        model.build(model.covariances + low * np.eye(model.dim)[None].repeat(count, 0)),
        weights=weights,
    )


@theorem(
    "2.5",
    "Gaussian data",
    r"z_0 = \mu + (C + \rho_0^2)^{1/2} (C + \rho_T^2)^{-1/2} (z_T - \mu)",
    "classical",
    "N(mu, C) with the data's mean and covariance",
    scope="prior",
)
def gaussian(case: Case) -> Outcome:
    """End points and Jacobian of the flow of N(mean, covariance) against the closed form."""
    need_small(case)
    prior, high, low = case.model.gaussian(), case.rhos[0] ** 2, case.rhos[-1] ** 2
    x = prior.diffuse(1.0, case.rhos[0]).sample(_STARTS, case.seed)
    result = flow(case, prior, x, jacobian=True)
    values, basis = np.linalg.eigh(case.model.covariance)
    values = np.maximum(values, 0.0)
    matrix = (basis * np.sqrt((values + low) / (values + high))) @ basis.T
    wanted = case.model.mean + (case.host(x) - case.model.mean) @ matrix.T
    ends = relative(case.host(result.x), wanted, _size(case))
    size = np.sqrt((matrix**2).sum())
    worst = max(ends, relative(case.host(result.jacobian), np.broadcast_to(matrix, (_STARTS, *matrix.shape)), size))
    return Outcome(worst, tolerance(case), f"local errors of {_RTOL:.0e}")
