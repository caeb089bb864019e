"""Schemes of samplers: beside their textbook formulas, integrals in closed form, and the exact flow."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from dfmath import GaussianMixture, probability_flow
from dfmath.schedules import VP
from dfmath.solvers import Scheme, Stage, noise_levels, scheme

GRID = (7.0, 3.0, 1.9, 0.8, 0.45, 0.1)
KINDS = [("ddim", {}), *(("deis", {"order": q}) for q in range(4)), ("heun", {}), ("dpm++2m", {})]
NAMES = [name + str(options.get("order", "")) for name, options in KINDS]


def follow(scheme, field, z):
    """Run a scheme as it is defined."""
    states, noises = [z], []
    for stage, rho in zip(scheme.stages, scheme.rhos, strict=False):
        noises.append(field(states[-1], rho))
        states.append(states[stage.start] + sum(w * noises[i] for i, w in stage.weights.items()))
    return states


@pytest.fixture(scope="module")
def prior():
    rng = np.random.default_rng(0)
    return GaussianMixture(rng.standard_normal((3, 2)), np.array([0.2, 0.5, 1.0]))


def noise_of(prior):
    def field(z, rho):
        return -rho * prior.diffuse(1.0, rho).score(z)

    return field


def wobbly(z, rho):
    """A field with nothing special about it."""
    return np.sin(z) + np.cos(3.0 * rho) * z[::-1]


def integral_of_log_power(p, a, b):
    """Of (log r)^p over [a, b], in closed form."""
    if p == 0:
        return b - a
    return b * math.log(b) ** p - a * math.log(a) ** p - p * integral_of_log_power(p - 1, a, b)


@pytest.mark.parametrize("order", range(4))
def test_deis_integrates_polynomials_exactly(order):
    """Of log rho, up to its order and, in the first steps, up to what there are noises for."""
    found = scheme("deis", GRID, order=order)
    for k, stage in enumerate(found.stages):
        assert stage.start == k and set(stage.weights) == set(range(max(0, k - order), k + 1))
        for p in range(len(stage.weights)):
            value = sum(w * math.log(GRID[i]) ** p for i, w in stage.weights.items())
            assert value == pytest.approx(integral_of_log_power(p, GRID[k], GRID[k + 1]), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_integrates_polynomials_of_the_schedules_time(order):
    schedule = VP.linear()
    levels = tuple(schedule.rho(t) for t in (0.9, 0.6, 0.4, 0.2, 0.05))
    found = scheme("deis", levels, order=order, time=schedule.time)
    for p in range(order + 1):
        value = sum(w * schedule.time(levels[i]) ** p for i, w in found.stages[3].weights.items())
        wanted = quad(lambda r, p=p: schedule.time(r) ** p, levels[3], levels[4], epsrel=1e-12)[0]
        assert value == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("ratio", [2.0, 1e3, 1e6])
def test_deis_quadrature_holds_over_long_steps(ratio):
    found = scheme("deis", (2.0 * ratio, ratio, 1.0), order=1).stages[1].weights
    value = sum(w * math.log((2.0 * ratio, ratio)[i]) for i, w in found.items())
    assert value == pytest.approx(integral_of_log_power(1, ratio, 1.0), rel=1e-10)


def test_ddim_is_the_textbook_formula():
    """x_u = (alpha_u/alpha_t) x_t + (sigma_u - alpha_u sigma_t/alpha_t) eps (Song et al. 2021, eq. 12)."""
    schedule, times = VP.linear(), (0.9, 0.5, 0.2, 0.01)
    x = np.array([0.7, -1.2])
    states = follow(scheme("ddim", [schedule.rho(t) for t in times]), wobbly, x / schedule(times[0])[0])
    for t, u, state in zip(times, times[1:], states[1:], strict=False):
        (alpha, sigma), (alpha_u, sigma_u) = schedule(t), schedule(u)
        noise = wobbly(x / alpha, schedule.rho(t))
        x = alpha_u / alpha * x + (sigma_u - alpha_u * sigma / alpha) * noise
        np.testing.assert_allclose(alpha_u * state, x, rtol=1e-12)


def test_deis_of_order_0_is_ddim():
    assert scheme("deis", GRID, order=0) == scheme("ddim", GRID)


@pytest.mark.parametrize("levels", [GRID, (*GRID, 0.0)])
def test_heun_is_the_algorithm_of_edm(levels):
    """Karras et al. 2022, algorithm 1, in terms of the denoiser."""

    def denoiser(z, rho):
        return z - rho * wobbly(z, rho)

    z, wanted = np.array([0.7, -1.2]), []
    for t, u in itertools.pairwise(levels):
        slope = (z - denoiser(z, t)) / t
        after = z + (u - t) * slope
        if u != 0.0:
            after = z + (u - t) * 0.5 * (slope + (after - denoiser(after, u)) / u)
        z = after
        wanted.append(z)
    found = scheme("heun", levels)
    states = follow(found, wobbly, np.array([0.7, -1.2]))
    np.testing.assert_allclose([states[end] for end in found.ends[1:]], wanted, rtol=1e-12)
    assert [found.rhos[end] for end in found.ends] == list(levels)
    assert found.evaluations == 2 * (len(levels) - 1) - (levels[-1] == 0.0)


def test_dpm_solver_is_the_algorithm_of_its_paper():
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, in x with lambda = -log rho; its first step is of first order."""
    schedule, times = VP.linear(), (0.9, 0.5, 0.3, 0.2, 0.01)
    x, before = np.array([0.7, -1.2]), None
    states = follow(scheme("dpm++2m", [schedule.rho(t) for t in times]), wobbly, x / schedule(times[0])[0])
    for k, (t, u) in enumerate(itertools.pairwise(times)):
        (alpha, sigma), (alpha_u, sigma_u) = schedule(t), schedule(u)
        h = math.log(alpha_u / sigma_u) - math.log(alpha / sigma)
        mean = (x - sigma * wobbly(x / alpha, schedule.rho(t))) / alpha
        data = mean
        if before is not None:
            r = before[1] / h
            data = (1.0 + 0.5 / r) * mean - 0.5 / r * before[0]
        x = sigma_u / sigma * x - alpha_u * math.expm1(-h) * data
        before = mean, h
        np.testing.assert_allclose(alpha_u * states[k + 1], x, rtol=1e-11)


@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [("ddim", {}, 1), *(("deis", {"order": q}, q + 1) for q in range(1, 4)), ("heun", {}, 2), ("dpm++2m", {}, 2)],
)
def test_convergence_to_the_exact_flow(prior, solver, options, order):
    """From noise so high that the first steps, of lower order, cost nothing."""
    start, end = 1e4, 0.2
    z = start * np.random.default_rng(1).standard_normal((4, 2))
    exact = probability_flow(prior, z, start, end, rtol=1e-12, atol=1e-13).x
    errors = []
    for steps in (160, 320):
        levels = noise_levels(start, end, steps, "log")
        found = follow(scheme(solver, levels, **options), noise_of(prior), z)[-1]
        errors.append(np.abs(found - exact).max())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.35, errors
    assert errors[1] < 0.2 * 0.1**order


@st.composite
def grids(draw):
    ratios = draw(st.lists(st.floats(1.01, 30.0), min_size=1, max_size=8))
    levels = draw(st.floats(1e-3, 10.0)) * np.cumprod([1.0, *ratios])[::-1]
    return (*map(float, levels), 0.0) if draw(st.booleans()) else tuple(map(float, levels))


@pytest.mark.parametrize(("solver", "options"), KINDS, ids=NAMES)
@given(levels=grids())
def test_constant_noise_is_integrated_exactly(solver, options, levels):
    """Weights add up to the difference of the levels, and use what is there alone."""
    found = scheme(solver, levels, **options)
    for k, stage in enumerate(found.stages):
        wanted = found.rhos[k + 1] - found.rhos[stage.start]
        scale = sum(abs(w) for w in stage.weights.values())
        assert abs(sum(stage.weights.values()) - wanted) <= 1e-12 * (scale + levels[0])
        assert all(0 <= i <= k for i in (stage.start, *stage.weights))
    assert tuple(found.rhos[end] for end in found.ends) == levels


@pytest.mark.parametrize(("solver", "options"), KINDS, ids=NAMES)
def test_a_last_step_to_0_returns_the_mean(solver, options):
    found = scheme(solver, (*GRID, 0.0), **options)
    states = follow(found, wobbly, np.array([0.7, -1.2]))
    np.testing.assert_allclose(states[-1], states[-2] - GRID[-1] * wobbly(states[-2], GRID[-1]), rtol=1e-12)


def test_noise_levels():
    levels = noise_levels(80.0, 0.002, 17)
    assert levels[0] == 80.0 and levels[-1] == 0.002 and len(levels) == 18
    k = np.arange(18)
    wanted = (80.0 ** (1 / 7) + k / 17 * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
    np.testing.assert_allclose(levels, wanted, rtol=1e-12)
    np.testing.assert_allclose(noise_levels(8.0, 1.0, 3, "log"), [8.0, 4.0, 2.0, 1.0], rtol=1e-14)
    assert noise_levels(3.0, 1.0, 1) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"solver": "euler"}, ValueError, "solver must be one of ddim, deis, heun, dpm"),
        ({"solver": "dpm++2"}, ValueError, "did you mean 'dpm\\+\\+2m'"),
        ({"rhos": [1.0]}, ValueError, "at least two levels, got 1"),
        ({"rhos": 3.0}, TypeError, "sequence"),
        ({"rhos": [2.0, "1"]}, TypeError, "rhos"),
        ({"rhos": [1.0, 2.0]}, ValueError, "decrease strictly.*1 and 2 at indices 0 and 1"),
        ({"rhos": [2.0, 1.0, 1.0]}, ValueError, "indices 1 and 2"),
        ({"rhos": [1.0, -1.0]}, ValueError, "to 0 at the least"),
        ({"rhos": [2.0, 0.0, -1.0]}, ValueError, "decrease|positive"),
        ({"rhos": [math.inf, 1.0]}, ValueError, "finite"),
        ({"rhos": [math.nan, 1.0]}, ValueError, "finite"),
        ({"order": 1}, ValueError, "order is an option of solver 'deis', got it for 'ddim'"),
        ({"time": math.log}, ValueError, "time is an option"),
        ({"solver": "deis", "order": 4}, ValueError, "order must be an index from 0 and below 4"),
        ({"solver": "deis", "time": 3}, TypeError, "time must be a function of rho"),
        ({"solver": "deis", "time": lambda rho: -rho}, ValueError, "increase strictly"),
        ({"solver": "deis", "time": lambda rho: math.inf}, ValueError, "finite at every level, got inf at rho = 2"),
    ],
)
def test_wrong_arguments_are_refused(change, kind, words):
    arguments = {"solver": "ddim", "rhos": [2.0, 1.0, 0.0]} | change
    with pytest.raises(kind, match=words):
        scheme(arguments.pop("solver"), arguments.pop("rhos"), **arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rhos": (2.0,)}, "one more than stages, got 1 and 2"),
        ({"rhos": (2.0, 0.0, 1.0)}, "positive"),
        ({"stages": (Stage(0, {0: -1.0}), Stage(2, {0: 1.0}))}, "stage 1 must use states 0 to 1"),
        ({"stages": (Stage(0, {1: -1.0}), Stage(0, {0: 1.0}))}, "stage 0 must use states 0 to 0"),
        ({"stages": (Stage(0, {0: math.nan}), Stage(0, {0: 1.0}))}, "stage 0 must have finite weights"),
        ({"ends": (0, 1)}, "ends must increase from 0 to 2"),
        ({"ends": (0, 1, 1, 2)}, "ends must increase"),
        ({"ends": ()}, "ends"),
    ],
)
def test_schemes_that_cannot_be_run_are_refused(change, words):
    good = {"rhos": (2.0, 1.0, 0.0), "stages": (Stage(0, {0: -1.0}), Stage(1, {1: -1.0})), "ends": (0, 1, 2)}
    Scheme(**good)
    with pytest.raises(ValueError, match=words):
        Scheme(**(good | change))


@pytest.mark.parametrize("change", [{"steps": 0}, {"rho_min": 0.0}, {"rho_max": 0.01}, {"spacing": "linear"}])
def test_wrong_grids_are_refused(change):
    with pytest.raises(ValueError, match="|".join(change)):
        noise_levels(**({"rho_max": 80.0, "rho_min": 0.02, "steps": 4} | change))


def test_solvers_take_partial_application():
    """As `guided_sample` is given a solver with options."""
    assert partial(scheme, "deis", order=3)(GRID) == scheme("deis", GRID, order=3)
