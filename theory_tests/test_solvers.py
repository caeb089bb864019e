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
from dfmath.schedules import VP, Discrete
from dfmath.solvers import Churn, Scheme, Stage, noise_levels, scheme

GRID = (7.0, 3.0, 1.9, 0.8, 0.45, 0.1)
KINDS = [
    ("ddim", {}),
    *(("deis", {"order": q}) for q in range(4)),
    ("heun", {}),
    ("dpm++2m", {}),
    ("pndm", {}),
]
NAMES = [name + str(options.get("order", "")) for name, options in KINDS]


def follow(scheme, field, z, fresh=None):
    """Run a scheme as it is defined."""
    states, noises = [z], []
    for stage, rho in zip(scheme.stages, scheme.rhos, strict=False):
        noises.append(field(states[-1], rho))
        carried = states[stage.start] + sum(a * states[i] for i, a in stage.states.items())
        states.append(carried + sum(w * noises[i] for i, w in stage.weights.items()))
        if stage.fresh:
            states[-1] = states[-1] + stage.fresh * next(fresh)
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


def fresh_noise():
    rng = np.random.default_rng(5)
    while True:
        yield rng.standard_normal(2)


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
    found = scheme("deis", levels, order=order, time=schedule)
    assert found == scheme("deis", levels, order=order, time=schedule.time)
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


@pytest.mark.parametrize("order", range(4))
def test_normalised_deis_integrates_polynomials_of_normalised_noise(order):
    """eps = n(rho) p(log rho) with n a power: integrals of powers times logarithms, by another quadrature."""

    def size(rho):
        return rho**0.6

    found = scheme("deis", GRID, order=order, normalizer=size)
    for k, stage in enumerate(found.stages):
        for p in range(len(stage.weights)):
            value = sum(w * size(GRID[i]) * math.log(GRID[i]) ** p for i, w in stage.weights.items())
            wanted = quad(lambda r, p=p: size(r) * math.log(r) ** p, GRID[k], GRID[k + 1], epsabs=0.0, epsrel=1e-13)[0]
            assert value == pytest.approx(wanted, rel=1e-11, abs=1e-12)


def test_a_constant_normalizer_changes_nothing():
    plain, normalised = (scheme("deis", GRID, order=2, normalizer=size) for size in (None, lambda rho: 3.0))
    for one, other in zip(plain.stages, normalised.stages, strict=True):
        assert dict(other.weights) == pytest.approx(dict(one.weights), rel=1e-12)


def test_deis_in_rho_has_rational_weights():
    """The line through two noises over the next step: h + h^2/(2 h_before) and -h^2/(2 h_before)."""
    found = scheme("deis", GRID, order=1, time=lambda rho: rho)
    for k in range(1, len(GRID) - 1):
        before, step = GRID[k] - GRID[k - 1], GRID[k + 1] - GRID[k]
        weights = found.stages[k].weights
        assert weights[k] == pytest.approx(step + step**2 / (2.0 * before), rel=1e-12)
        assert weights[k - 1] == pytest.approx(-(step**2) / (2.0 * before), rel=1e-12)


def test_quadrature_holds_for_times_with_kinks():
    """Tables of noise levels are broken lines."""

    def time(rho):
        return math.log(rho) + abs(math.log(rho) - 0.3)

    weights = scheme("deis", (4.0, 2.0, 1.0), order=1, time=time).stages[1].weights
    share = quad(
        lambda r: (time(r) - time(2.0)) / (time(4.0) - time(2.0)), 2.0, 1.0, points=[math.exp(0.3)], epsrel=1e-13
    )
    assert weights[0] == pytest.approx(share[0], rel=1e-10)


def test_a_table_of_levels_stands_for_its_time():
    """Its kinks are known: the weights are those of its time, whose integrals are sums over its pieces."""
    table = Discrete(np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000)))
    levels = [table.rho(t) for t in (700.0, 520.5, 333.0)]
    weights = scheme("deis", levels, order=1, time=table).stages[1].weights
    knots = [levels[1], *(table.rho(float(t)) for t in range(520, 333, -1)), levels[2]]
    share = 0.0
    for a, b in itertools.pairwise(knots):
        share += quad(lambda r: (table.time(r) - 520.5) / (700.0 - 520.5), a, b, epsabs=0.0, epsrel=1e-12)[0]
    assert weights[0] == pytest.approx(share, rel=1e-10)


def test_pndm_is_the_algorithm_of_its_paper():
    """Liu et al. 2022, eq. 12 and 13 with DDIM's transfer, after a first step of Heun."""
    z, noises, states = np.array([0.7, -1.2]), [], []
    for k, (t, u) in enumerate(itertools.pairwise(GRID)):
        noises.append(wobbly(z, t))
        e = noises[::-1]
        mean = [
            lambda e, z, t, u: 0.5 * (e[0] + wobbly(z + (u - t) * e[0], u)),
            lambda e, *_: (3.0 * e[0] - e[1]) / 2.0,
            lambda e, *_: (23.0 * e[0] - 16.0 * e[1] + 5.0 * e[2]) / 12.0,
            lambda e, *_: (55.0 * e[0] - 59.0 * e[1] + 37.0 * e[2] - 9.0 * e[3]) / 24.0,
        ][min(k, 3)](e, z, t, u)
        z = z + (u - t) * mean
        states.append(z)
    found = scheme("pndm", GRID)
    run = follow(found, wobbly, np.array([0.7, -1.2]))
    np.testing.assert_allclose([run[end] for end in found.ends[1:]], states, rtol=1e-12)
    assert found.evaluations == len(GRID)


def test_ddpm_is_the_textbook_formula():
    """Ho et al. 2020, eq. 7, in x and with abar: the posterior of the level before, given the data predicted."""
    schedule, times = VP.linear(), (0.9, 0.5, 0.2, 0.01)
    x, fresh = np.array([0.7, -1.2]), fresh_noise()
    found = scheme("ddpm", [schedule.rho(t) for t in times])
    states = follow(found, wobbly, x / schedule(times[0])[0], fresh_noise())
    for t, u, state in zip(times, times[1:], states[1:], strict=False):
        (alpha, sigma), (alpha_u, _) = schedule(t), schedule(u)
        data = (x - sigma * wobbly(x / alpha, schedule.rho(t))) / alpha
        abar, before = alpha**2, alpha_u**2
        beta = 1.0 - abar / before
        mean = (
            math.sqrt(before) * beta / (1.0 - abar) * data + math.sqrt(1.0 - beta) * (1.0 - before) / (1.0 - abar) * x
        )
        x = mean + math.sqrt((1.0 - before) / (1.0 - abar) * beta) * next(fresh)
        np.testing.assert_allclose(alpha_u * state, x, rtol=1e-11)
    assert found.stochastic and found.evaluations == 3


@pytest.mark.parametrize("levels", [GRID, (*GRID, 0.0)])
def test_churn_is_the_algorithm_of_edm(levels):
    """Karras et al. 2022, algorithm 2, with a window that leaves out both ends."""
    churn, fresh = Churn(1.5, 0.3, 4.0, 1.01), fresh_noise()
    z, wanted = np.array([0.7, -1.2]), []
    for t, u in itertools.pairwise(levels):
        gamma = min(1.5 / (len(levels) - 1), math.sqrt(2.0) - 1.0) if 0.3 <= t <= 4.0 else 0.0
        hat = t * (1.0 + gamma)
        if gamma > 0.0:
            z = z + math.sqrt(hat**2 - t**2) * 1.01 * next(fresh)
        slope = wobbly(z, hat)
        after = z + (u - hat) * slope
        z = z + (u - hat) * 0.5 * (slope + wobbly(after, u)) if u > 0.0 else after
        wanted.append(z)
    found = scheme("heun", levels, churn=churn)
    states = follow(found, wobbly, np.array([0.7, -1.2]), fresh_noise())
    np.testing.assert_allclose([states[end] for end in found.ends[1:]], wanted, rtol=1e-12)
    assert [found.rhos[end] for end in found.ends] == list(levels)
    assert found.evaluations == scheme("heun", levels).evaluations


def test_churn_of_a_large_amount_is_bounded():
    assert Churn(1e9).raised(2.0, 4) == pytest.approx(2.0 * math.sqrt(2.0), rel=1e-15)
    assert not scheme("heun", GRID, churn=Churn(0.0)).stochastic


@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [
        ("ddim", {}, 1),
        *(("deis", {"order": q}, q + 1) for q in range(1, 4)),
        ("heun", {}, 2),
        ("dpm++2m", {}, 2),
        ("pndm", {}, 2),
    ],
)
def test_convergence_to_the_exact_flow(prior, solver, options, order):
    """From noise so high that the first steps, of lower order, cost nothing.

    PNDM's weights are those of even steps; where noise levels are not even, its mean of noises has no higher order.
    """
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
        carried = sum(a * found.rhos[i] for i, a in stage.states.items())  # where noise is constant, z_i is rho_i of it
        scale = sum(abs(w) for w in stage.weights.values())
        assert abs(sum(stage.weights.values()) + carried - wanted) <= 1e-12 * (scale + levels[0])
        assert abs(sum(stage.states.values())) <= 1e-15
        assert all(0 <= i <= k for i in (stage.start, *stage.weights, *stage.states))
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


@pytest.mark.parametrize(("spacing", "power"), [("time", 1.0), ("time-squared", 2.0)])
def test_levels_that_are_even_in_time(spacing, power):
    schedule = VP.linear()
    high, low = schedule.rho(0.9), schedule.rho(0.01)
    found = noise_levels(high, low, 8, spacing, schedule)
    wanted = np.linspace(0.9 ** (1.0 / power), 0.01 ** (1.0 / power), 9) ** power
    np.testing.assert_allclose([schedule.time(rho) for rho in found], wanted, rtol=1e-10)
    assert found[0] == high and found[-1] == low


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
        ({"normalizer": math.log}, ValueError, "normalizer is an option of solver 'deis'"),
        ({"churn": Churn(1.0)}, ValueError, "churn is an option of solver 'heun', got it for 'ddim'"),
        ({"solver": "heun", "churn": 1.0}, TypeError, "churn must be an instance of"),
        ({"solver": "deis", "normalizer": 2.0}, TypeError, "normalizer must be a function of rho"),
        ({"solver": "deis", "normalizer": lambda rho: 1.0 - rho}, ValueError, "normalizer must be positive"),
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
        (
            {"stages": (Stage(0, {0: -1.0}, -1.0), Stage(1, {1: -1.0}))},
            "stage 0 must have a finite level of fresh noise",
        ),
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


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"rho_min": 0.0}, {"rho_max": 0.01}, {"spacing": "linear"}, {"schedule": VP.linear()}],
)
def test_wrong_grids_are_refused(change):
    with pytest.raises(ValueError, match="|".join(change)):
        noise_levels(**({"rho_max": 80.0, "rho_min": 0.02, "steps": 4} | change))


def test_wrong_spacings_in_time_are_refused():
    with pytest.raises(ValueError, match="give both or neither"):
        noise_levels(80.0, 0.02, 4, "time")
    with pytest.raises(ValueError, match="rho_max and rho_min"):
        noise_levels(1e9, 0.02, 4, "time", VP.linear())


@pytest.mark.parametrize(
    "change", [{"amount": -1.0}, {"scale": math.inf}, {"low": 2.0, "high": 1.0}, {"high": math.nan}]
)
def test_wrong_churns_are_refused(change):
    with pytest.raises(ValueError, match="|".join(change)):
        Churn(**({"amount": 1.0} | change))


def test_solvers_take_partial_application():
    """As `guided_sample` is given a solver with options."""
    assert partial(scheme, "deis", order=3)(GRID) == scheme("deis", GRID, order=3)
