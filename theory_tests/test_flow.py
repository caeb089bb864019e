"""The probability-flow ODE against SciPy's integrators, closed forms and what must not change it [MATH 2.1-2.5]."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from helpers import FORMS, KINDS, NUMBA, Problem, assert_matches, mixture_problem, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.linalg import sqrtm
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal

import dfmath.flow
from dfmath import GaussianMixture, PointMasses
from dfmath.datasets import digits
from dfmath.flow import log_likelihood, probability_flow
from dfmath.schedules import EDM, VE, VP, Discrete, FlowMatching, SubVP

SCHEDULES = {
    "vp": VP.linear(),
    "vp-cosine": VP.cosine(),
    "sub-vp": SubVP.linear(),
    "ve": VE(),
    "edm": EDM(),
    "flow-matching": FlowMatching(),
    "discrete": Discrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).tolist()),
}
PRIORS = [None, "scalar", "full", "low-rank", "diagonal-singular"]


def problem_of(form):
    """Three starts at rho = 5."""
    problem = mixture_problem(form or "zero", 5.0, seed=4, alpha=1.0)
    return problem if form else replace(problem, covariances=None)


# An independent right-hand side: MATH 2.2 and 1.5, written down plainly


def posterior(problem, z, rho):
    """Mean and covariance of x0 given z = x0 + rho eps."""
    c, y = problem.dense_covariances, problem.centres
    spread = c + rho**2 * np.eye(len(z))
    gain = np.linalg.solve(spread, c).transpose(0, 2, 1)
    r = z - y
    square = np.einsum("ki,kij,kj->k", r, np.linalg.inv(spread), r)
    w = softmax(problem.logs - 0.5 * (square + np.linalg.slogdet(spread)[1]))
    means = y + np.einsum("kij,kj->ki", gain, r)
    mean = w @ means
    within = c - gain @ c
    return mean, np.einsum("k,kij->ij", w, within + (means - mean)[:, :, None] * (means - mean)[:, None, :])


def plain_flow(problem, start, end, method="DOP853"):
    """States, Jacobians and log-density changes of all queries by SciPy."""
    d = problem.x.shape[1]

    def slope(t, y):
        rho = np.exp(t)
        mean, covariance = posterior(problem, y[:d], rho)
        turn = np.eye(d) - covariance / rho**2
        return np.concatenate([y[:d] - mean, (turn @ y[d:-1].reshape(d, d)).ravel(), [-np.trace(turn)]])

    def one(z):
        begin = np.concatenate([z, np.eye(d).ravel(), [0.0]])
        tight = {"rtol": 1e-12, "atol": 1e-13} if method == "DOP853" else {"rtol": 1e-8, "atol": 1e-10}
        return solve_ivp(slope, (np.log(start), np.log(end)), begin, method, **tight).y[:, -1]

    ends = np.stack([one(z) for z in problem.x])
    return ends[:, :d], ends[:, d:-1].reshape(-1, d, d), ends[:, -1]


@pytest.mark.parametrize(("method", "rtol"), [("DOP853", 1e-7), ("Radau", 1e-5)])
@pytest.mark.parametrize("form", PRIORS)
def test_against_scipy(form, method, rtol):
    """State, Jacobian and log density, downwards; Radau is another family of methods altogether."""
    problem = problem_of(form)
    flow = probability_flow(
        problem.prior(), problem.x, 5.0, 0.3, jacobian=True, log_density=True, rtol=1e-9, atol=1e-11
    )
    x, jacobian, change = plain_flow(problem, 5.0, 0.3, method)
    assert_matches(flow.x, x, rtol, like=x)
    assert_matches(flow.jacobian, jacobian, rtol, like=x)
    assert_matches(flow.log_density_change, change, rtol, like=x)


@pytest.mark.parametrize("form", PRIORS)
def test_upwards_against_scipy(form):
    problem = replace(problem_of(form), x=problem_of(form).centres + 0.1)
    flow = probability_flow(
        problem.prior(), problem.x, 0.3, 5.0, jacobian=True, log_density=True, rtol=1e-10, atol=1e-12
    )
    x, jacobian, change = plain_flow(problem, 0.3, 5.0)
    assert_matches(flow.x, x, 1e-7, like=x)
    assert_matches(flow.jacobian, jacobian, 1e-7, like=x)
    assert_matches(flow.log_density_change, change, 1e-7, like=x)


@pytest.mark.parametrize("form", [None, "full"])
def test_jacobian_is_the_slope_of_the_map(form):
    """Central differences of end points; a transposed Jacobian would differ, for it is not symmetric here."""
    problem, h = problem_of(form), 1e-4
    run = lambda x: probability_flow(problem.prior(), x, 5.0, 0.3, rtol=1e-12, atol=1e-13).x  # noqa: E731
    slopes = np.stack([(run(problem.x + e) - run(problem.x - e)) / (2 * h) for e in h * np.eye(3)], axis=2)
    jacobian = probability_flow(problem.prior(), problem.x, 5.0, 0.3, jacobian=True).jacobian
    assert_matches(jacobian, slopes, 1e-6, like=slopes)
    assert np.abs(jacobian - jacobian.transpose(0, 2, 1)).max() > 1e-2 * np.abs(jacobian).max()


# Closed forms


def gaussian(seed=0, d=3):
    a = np.random.default_rng(seed).standard_normal((d, d))
    return np.arange(1.0, d + 1.0), a @ a.T


@pytest.mark.parametrize(("start", "end"), [(80.0, 0.01), (0.5, 20.0), (3.0, 2.9), (1.0, 1.0)])
def test_gaussian_data(start, end):
    """z_0 = mu + (C + rho_0^2)^1/2 (C + rho_T^2)^-1/2 (z_T - mu) [MATH 2.5]."""
    mu, c = gaussian()
    z = mu + start * np.random.default_rng(1).standard_normal((4, 3))
    matrix = (sqrtm(c + end**2 * np.eye(3)) @ np.linalg.inv(sqrtm(c + start**2 * np.eye(3)))).real
    prior = GaussianMixture(mu[None], c[None])
    flow = probability_flow(prior, z, start, end, jacobian=True, log_density=True, rtol=1e-11, atol=1e-13)
    assert_matches(flow.x, mu + (z - mu) @ matrix.T, 1e-10, like=z)
    assert_matches(flow.jacobian, np.stack([matrix] * 4), 1e-9, like=z)
    change = np.full(4, -np.linalg.slogdet(matrix)[1])
    assert_matches(flow.log_density_change, change, 1e-10, 1.0, like=z)
    assert (flow.evaluations > 0).all()


def test_one_point():
    """Everything flows to the only point in proportion to rho."""
    z = np.array([[5.0, -3.0], [1.0, 1.0]])
    flow = probability_flow(PointMasses(np.array([[1.0, 2.0]])), z, 10.0, 0.1, jacobian=True, log_density=True)
    assert_matches(flow.x, np.array([1.0, 2.0]) + 0.01 * (z - np.array([1.0, 2.0])), 1e-9, like=z)
    assert_matches(flow.jacobian, np.stack([0.01 * np.eye(2)] * 2), 1e-6, like=z)
    assert_matches(flow.log_density_change, np.full(2, 2 * np.log(100.0)), 1e-9, like=z)


@pytest.mark.parametrize("form", PRIORS)
def test_log_density_is_that_of_the_end_less_that_of_the_start(form):
    """Both exact, by SciPy."""
    problem = problem_of(form)
    flow = probability_flow(problem.prior(), problem.x, 5.0, 0.2, log_density=True, rtol=1e-10, atol=1e-12)
    exact = log_density(problem, flow.x, 0.2) - log_density(problem, problem.x, 5.0)
    assert_matches(flow.log_density_change, exact, 1e-8, like=exact)


def log_density(problem, z, rho):
    logs = problem.logs - logsumexp(problem.logs)
    spread = problem.dense_covariances + rho**2 * np.eye(3)
    parts = [multivariate_normal.logpdf(z, m, c) for m, c in zip(problem.centres, spread, strict=True)]
    return logsumexp(logs[:, None] + np.array(parts), axis=0)


@pytest.mark.parametrize("form", [None, "full"])
def test_log_likelihood_is_the_exact_log_density(form):
    problem = problem_of(form)
    low = probability_flow(problem.prior(), problem.x, 5.0, 0.5).x
    result = log_likelihood(problem.prior(), low, 0.5, 50.0, rtol=1e-10, atol=1e-12)
    assert_matches(result.log_density, log_density(problem, low, 0.5), 1e-8, 1.0, like=low)
    assert (result.evaluations > 0).all() and (result.error_estimate >= 0).all()


def test_log_likelihood_in_a_schedules_coordinates():
    """With the factor alpha^-d between the densities of x and z."""
    problem, schedule = problem_of("full"), VP.linear()
    t = schedule.time(0.5)
    alpha, _ = schedule(t)
    low = probability_flow(problem.prior(), problem.x, 5.0, 0.5).x
    result = log_likelihood(problem.prior(), alpha * low, t, schedule.time(50.0), schedule, rtol=1e-10, atol=1e-12)
    exact = log_density(problem, low, 0.5) - 3 * np.log(alpha)
    assert_matches(result.log_density, exact, 1e-8, 1.0, like=low)


def test_low_noise_ends_at_a_data_point():
    points = digits()[:100]
    prior = PointMasses(points)
    flow = probability_flow(prior, prior.diffuse(1.0, 20.0).sample(4, 0), 20.0, 1e-3)
    distance = np.linalg.norm(flow.x[:, None] - points, axis=2).min(axis=1)
    assert (distance < 8 * 1e-3 * 3).all()


# What must not change the map


@pytest.mark.parametrize(
    ("name", "native"),
    # The derivative of a table's broken line jumps at every knot: no high-order method gets along with it natively.
    [(name, native) for name in SCHEDULES for native in (False, True) if (name, native) != ("discrete", True)],
)
def test_every_schedule_is_the_same_map(name, native):
    """Between the same noise-to-signal ratios, x = alpha z [MATH 2.2]; natively, too, but for discretisation."""
    schedule, problem = SCHEDULES[name], problem_of("full")
    times = schedule.time(5.0), schedule.time(0.3)
    before, after = (float(schedule(t)[0]) for t in times)
    options = {"jacobian": True, "log_density": True, "rtol": 1e-9, "atol": 1e-11}
    canonical = probability_flow(problem.prior(), problem.x, 5.0, 0.3, **options)
    flow = probability_flow(problem.prior(), before * problem.x, *times, schedule, native=native, **options)
    rtol = 1e-6 if native else 1e-8
    assert_matches(flow.x / after, canonical.x, rtol, like=canonical.x)
    assert_matches(flow.jacobian * before / after, canonical.jacobian, rtol, like=canonical.x)
    change = flow.log_density_change + 3 * np.log(after / before)
    assert_matches(change, canonical.log_density_change, rtol, like=canonical.x)


def test_native_integration_is_another_one():
    """Else the test above would compare one with itself."""
    schedule, problem = VP.linear(), problem_of("full")
    times = schedule.time(5.0), schedule.time(0.3)
    x = float(schedule(times[0])[0]) * problem.x
    one, other = (probability_flow(problem.prior(), x, *times, schedule, native=native) for native in (False, True))
    assert (one.x != other.x).any() and (one.evaluations != other.evaluations).any()


@pytest.mark.parametrize("form", PRIORS)
def test_there_and_back(form):
    problem = problem_of(form)
    tight = {"rtol": 1e-11, "atol": 1e-13}
    down = probability_flow(problem.prior(), problem.x, 5.0, 0.5, jacobian=True, log_density=True, **tight)
    up = probability_flow(problem.prior(), down.x, 0.5, 5.0, jacobian=True, log_density=True, **tight)
    assert_matches(up.x, problem.x, 1e-8, like=problem.x)
    assert_matches(up.jacobian @ down.jacobian, np.stack([np.eye(3)] * 3), 1e-7, like=problem.x)
    assert_matches(up.log_density_change, -down.log_density_change, 1e-8, like=problem.x)


def test_half_way_and_on():
    problem, tight = problem_of("full"), {"rtol": 1e-11, "atol": 1e-13}
    whole = probability_flow(problem.prior(), problem.x, 5.0, 0.3, **tight).x
    half = probability_flow(problem.prior(), problem.x, 5.0, 1.7, **tight).x
    assert_matches(probability_flow(problem.prior(), half, 1.7, 0.3, **tight).x, whole, 1e-8, like=whole)


@pytest.mark.parametrize("form", [None, "scalar"])
def test_a_rows_result_does_not_depend_on_its_batch(form):
    """Every row has its own steps; rounding in matrix products may depend on how many rows there are."""
    rng = np.random.default_rng(0)
    prior = PointMasses(rng.standard_normal((300, 3)))
    if form:
        prior = GaussianMixture(rng.standard_normal((300, 3)), 0.1)
    z = 5.0 * rng.standard_normal((9, 3))
    options = {"jacobian": True, "log_density": True}
    together = probability_flow(prior, z, 5.0, 0.2, **options)
    assert len(set(together.evaluations.tolist())) > 1, "all rows took the same steps: this test would show little"
    for rows in ([0], [4], [8, 2]):
        alone = probability_flow(prior, z[rows], 5.0, 0.2, **options)
        np.testing.assert_array_equal(alone.evaluations, together.evaluations[rows])
        for name in ("x", "jacobian", "log_density_change"):
            np.testing.assert_allclose(getattr(alone, name), getattr(together, name)[rows], rtol=1e-11, err_msg=name)
        np.testing.assert_allclose(alone.error_estimate, together.error_estimate[rows], rtol=1e-3)


def test_asking_for_more_hardly_changes_the_state():
    """Jacobian and log density join the step control, so steps may be smaller."""
    problem = problem_of("full")
    alone = probability_flow(problem.prior(), problem.x, 5.0, 0.3)
    both = probability_flow(problem.prior(), problem.x, 5.0, 0.3, jacobian=True, log_density=True)
    assert alone.jacobian is None and alone.log_density_change is None
    assert (both.evaluations >= alone.evaluations).all()
    assert_matches(both.x, alone.x, 1e-6, like=alone.x)


@pytest.mark.parametrize("form", [None, "full", "low-rank"])
def test_every_kind_of_array(form, xp_kind, dtype):
    problem = problem_of(form).as_dtype(dtype)
    z = xp_kind.put(problem.x, dtype)
    coarse = xp_kind.unit > 1e-10
    options = {"jacobian": True, "log_density": True, "rtol": 1e-5 if coarse else 1e-9}
    flow = probability_flow(problem.prior(xp_kind, dtype), z, 5.0, 0.3, **options)
    expected = probability_flow(problem.prior(), problem.x, 5.0, 0.3, jacobian=True, log_density=True, rtol=1e-10)
    rtol = 1e-3 if coarse else {"float64": 1e-6, "float32": 2e-6}[dtype]
    for name in ("x", "jacobian", "log_density_change"):
        assert_matches(getattr(flow, name), getattr(expected, name), rtol, like=z)
    assert tuple(flow.evaluations.shape) == (3,) and "int" in str(flow.evaluations.dtype)
    assert_matches(flow.error_estimate, numbers(flow.error_estimate), 0.0, like=z)


@pytest.mark.parametrize("kind", KINDS[:4], ids=lambda kind: kind.name)
def test_no_starts(kind):
    with kind.context():
        z = kind.put(np.zeros((0, 3)))
        flow = probability_flow(problem_of(None).prior(kind), z, 5.0, 0.3, jacobian=True, log_density=True)
    assert_matches(flow.x, np.zeros((0, 3)), 0.0, like=z)
    assert tuple(flow.jacobian.shape) == (0, 3, 3) and tuple(flow.log_density_change.shape) == (0,)


# Honest accounts


@pytest.mark.parametrize("form", ["gaussian", None, "scalar", "full"])
def test_the_error_estimate_bounds_the_error_and_is_not_absurd(form):
    """At least every row's error, and within 1e4 of the largest; steps of 1e-3 are too long for more than the size."""
    mu, c = gaussian()
    z = 5.0 * np.random.default_rng(0).standard_normal((16, 3))
    prior = GaussianMixture(mu[None], c[None]) if form == "gaussian" else problem_of(form).prior()
    for end in (1.0, 0.1):
        truth = probability_flow(prior, z, 5.0, end, rtol=1e-12, atol=1e-14).x
        for rtol in (1e-3, 1e-6, 1e-8, 1e-10):
            flow = probability_flow(prior, z, 5.0, end, rtol=rtol, atol=1e-3 * rtol)
            error = np.linalg.norm(flow.x - truth, axis=1)
            short = 20.0 if rtol > 1e-4 else 1.0
            assert (error <= short * flow.error_estimate + 1e-11).all(), f"{error / flow.error_estimate} at {rtol}"
            assert flow.error_estimate.max() <= 1e4 * max(error.max(), 1e-11), (
                f"{flow.error_estimate / error} at {rtol}"
            )


def test_tighter_tolerances_cost_more_and_err_less():
    problem = problem_of("full")
    truth = probability_flow(problem.prior(), problem.x, 5.0, 0.3, rtol=1e-13, atol=1e-15).x
    runs = [
        probability_flow(problem.prior(), problem.x, 5.0, 0.3, rtol=r, atol=1e-3 * r) for r in (1e-2, 1e-5, 1e-8, 1e-11)
    ]
    errors = [np.linalg.norm(run.x - truth, axis=1).max() for run in runs]
    counts = [int(run.evaluations.sum()) for run in runs]
    assert counts == sorted(set(counts))
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-9


@pytest.mark.parametrize(
    "options", [{}, {"jacobian": True}, {"log_density": True}, {"jacobian": True, "log_density": True}]
)
@pytest.mark.parametrize("count", [1, 5])
def test_evaluations_are_counted_truly(count, options, monkeypatch):
    """Each row's count is how often the drift was computed at it; products for the error estimate are not drifts."""
    seen = []

    def counting(x, *args, **kwargs):
        want = args[3]
        if "mean" in want:  # what carries errors along asks for a product alone
            seen.append(x.shape[0])
        return original(x, *args, **kwargs)

    original = dfmath.flow.posterior_moments
    monkeypatch.setattr(dfmath.flow, "posterior_moments", counting)
    prior = PointMasses(np.random.default_rng(0).standard_normal((50, 3)))
    flow = probability_flow(prior, 5.0 * np.random.default_rng(1).standard_normal((count, 3)), 5.0, 0.2, **options)
    assert flow.evaluations.sum() == sum(seen)
    assert flow.evaluations.max() == len(seen)


@settings(max_examples=15)
@given(st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_random_flows_against_scipy(start, end, seed, dim):
    """Any two noise levels within four decades, in either direction."""
    start, end = 10.0**start, 10.0**end
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((4, dim))
    problem = Problem(centres, centres[:2] + start * rng.standard_normal((2, dim)), np.zeros((2, dim)), 1.0, start, 0.2)
    flow = probability_flow(problem.prior(NUMBA), problem.x, start, end, jacobian=True, log_density=True, rtol=1e-9)
    x, jacobian, change = plain_flow(problem, start, end)
    stretch = np.maximum(1.0, np.linalg.norm(jacobian, 2, axis=(1, 2)))  # errors grow as the flow stretches
    assert_matches(flow.x, x, 1e-6, stretch, like=x)
    assert_matches(flow.jacobian, jacobian, 1e-6, stretch, like=x)
    assert_matches(flow.log_density_change, change, 1e-6, stretch, like=x)


@pytest.mark.parametrize("form", FORMS)
def test_flows_reach_zero_noise_levels_that_mixtures_allow(form):
    """At rho = 1e-6 the map of a mixture with densities has converged."""
    problem = problem_of(form)
    near, nearer = (
        probability_flow(problem.prior(), problem.x, 5.0, rho, rtol=1e-10, atol=1e-12).x for rho in (1e-3, 1e-6)
    )
    assert_matches(nearer, near, 1e-4, like=near)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize(("low", "high"), [(1e-3, 80.0), (1e-6, 1.0), (0.02, 80.0)])
def test_likelihood_far_below_the_data_and_far_from_the_origin(low, high, offset):
    """Errors of the state count by the score there; what remains is rounding of the offset, eps offset/rho."""
    points = offset + np.random.default_rng(0).standard_normal((20, 3))
    q = PointMasses(points).diffuse(1.0, low)
    x = q.sample(6, 1)
    found = log_likelihood(PointMasses(points), x, low, high).log_density
    np.testing.assert_allclose(found, q.log_density(x), rtol=0, atol=3e-7 + 1e-15 * offset / low)


@pytest.mark.parametrize(("start", "end"), [(1e-6, 1.0), (1e-6, 1e6), (0.02, 80.0), (80.0, 0.02)])
def test_error_estimates_cover_the_error_over_many_decades(start, end):
    points = np.random.default_rng(0).standard_normal((20, 3))
    x = PointMasses(points).diffuse(1.0, start).sample(8, 0)
    rough, fine = (probability_flow(PointMasses(points), x, start, end, rtol=rtol, atol=0.0) for rtol in (1e-8, 1e-12))
    error = np.linalg.norm(rough.x - fine.x, axis=1)
    assert (error <= rough.error_estimate).all(), error / rough.error_estimate
