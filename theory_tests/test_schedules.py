"""Schedules against the formulas of their sources, f and g^2 against derivatives of those, in high precision."""

import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from dfmath.schedules import EDM, VE, VP, Discrete, FlowMatching, Schedule, SubVP, schedule_by_name

mp.dps = 60  # 1 - cos^2 at t = 1e-15 still has 30 digits

TOLERANCE = 1e-14
NAMESPACES = {"numpy": np, "strict": array_api_strict, "torch": torch}


# The truth: (alpha, sigma^2) at an mpf time, as the sources write them.


def vp_linear(low, high):
    """score_sde's VPSDE.marginal_prob."""

    def levels(t):
        log_mean = -(t**2) * (mpf(high) - mpf(low)) / 4 - t * mpf(low) / 2
        return mp.exp(log_mean), 1 - mp.exp(2 * log_mean)

    return levels


def sub_vp_linear(low, high):
    """score_sde's subVPSDE.marginal_prob: the standard deviation is VP's variance."""

    def levels(t):
        mean, variance = vp_linear(low, high)(t)
        return mean, variance**2

    return levels


def vp_cosine(s):
    """Nichol & Dhariwal, equation 17."""

    def squared_cosine(t):
        return mp.cos((t + mpf(s)) / (1 + mpf(s)) * mp.pi / 2) ** 2

    def levels(t):
        abar = squared_cosine(t) / squared_cosine(mpf(0))
        return mp.sqrt(abar), 1 - abar

    return levels


def ve(low, high):
    """score_sde's VESDE.marginal_prob."""
    return lambda t: (mpf(1), (mpf(low) * (mpf(high) / mpf(low)) ** t) ** 2)


def edm():
    return lambda t: (mpf(1), t**2)


def flow_matching(shift):
    """The shifted time of Esser et al., equation 23, put into alpha = 1 - t, sigma = t."""

    def levels(t):
        shifted = mpf(shift) * t / (1 + (mpf(shift) - 1) * t)
        return 1 - shifted, shifted**2

    return levels


def true_rho(truth, t):
    alpha, variance = truth(t)
    return mp.sqrt(variance) / alpha


def true_drift(truth, t):
    return mp.diff(lambda u: mp.log(truth(u)[0]), t)


def true_diffusion_squared(truth, t):
    # d(sigma^2)/dt = 2 f sigma^2 + g^2; unlike sigma, sigma^2 is smooth at 0.
    return mp.diff(lambda u: truth(u)[1], t) - 2 * true_drift(truth, t) * truth(t)[1]


DEFAULTS = {
    "vp": (VP.linear(), vp_linear(0.1, 20.0)),
    "vp-cosine": (VP.cosine(), vp_cosine(0.008)),
    "subvp": (SubVP.linear(), sub_vp_linear(0.1, 20.0)),
    "ve": (VE(), ve(0.01, 50.0)),
    "edm": (EDM(), edm()),
    "flow-matching": (FlowMatching(), flow_matching(1)),
}
SHIFTED = {"flow-matching-3": (FlowMatching(shift=3.0), flow_matching(3))}
ENDS_IN_NOISE = {"vp-cosine", "flow-matching", "flow-matching-3"}


def ddpm_table(steps=1000):
    """abar of Ho et al.: betas linear from 1e-4 to 0.02, multiplied up without rounding."""
    abar, product = [], mpf(1)
    for i in range(steps):
        product *= 1 - (mpf("1e-4") + (mpf("0.02") - mpf("1e-4")) * i / (steps - 1))
        abar.append(product)
    return abar


DDPM = [float(a) for a in ddpm_table()]
ALL = [*(schedule for schedule, _ in (DEFAULTS | SHIFTED).values()), Discrete(DDPM)]


sigma_ranges = st.tuples(st.floats(1e-4, 0.5), st.floats(0.6, 200.0))
rates = st.tuples(st.floats(1e-3, 1.0), st.floats(1.0, 40.0))
KINDS = {  # any parameters, each schedule with its truth
    "vp": rates.map(lambda p: (VP.linear(*p), vp_linear(*p))),
    "vp-cosine": st.floats(0.0, 1.0).map(lambda s: (VP.cosine(s), vp_cosine(s))),
    "subvp": rates.map(lambda p: (SubVP.linear(*p), sub_vp_linear(*p))),
    "ve": sigma_ranges.map(lambda p: (VE(*p), ve(*p))),
    "edm": sigma_ranges.map(lambda p: (EDM(*p), edm())),
    "flow-matching": st.floats(0.05, 20.0).map(lambda p: (FlowMatching(p), flow_matching(p))),
}
near = st.floats(-12.0, -0.5).map(lambda e: 10.0**e)
fractions = st.one_of(st.floats(0.01, 0.99), near, near.map(lambda e: 1.0 - e))


def on_every_schedule(test):
    """Run the test on every kind of schedule, at times anywhere inside the domain or very near one of its ends."""

    @pytest.mark.parametrize("kind", KINDS)
    @settings(deadline=None, max_examples=40)
    @given(st.data(), fractions)
    def run(kind, data, fraction):
        schedule, truth = data.draw(KINDS[kind])
        low, high = schedule.domain
        test(schedule, truth, min(low + fraction * (high - low), high))

    run.__name__ = run.__qualname__ = test.__name__
    return run


def close(got, want, tolerance=TOLERANCE):
    return abs(mpf(got) - want) <= tolerance * abs(want) + mpf("1e-30")  # the truth's own rounding


# Values


@on_every_schedule
def test_levels_are_those_of_the_source(schedule, truth, t):
    alpha, sigma = schedule(t)
    want_alpha, want_variance = truth(mpf(t))
    assert close(alpha, want_alpha)
    assert close(sigma, mp.sqrt(want_variance))


@on_every_schedule
def test_rho_is_the_ratio(schedule, truth, t):
    assert close(schedule.rho(t), true_rho(truth, mpf(t)))


@on_every_schedule
def test_drift_is_the_logarithmic_derivative_of_alpha(schedule, truth, t):
    assert close(schedule.drift(t), true_drift(truth, mpf(t)))


@on_every_schedule
def test_diffusion_squared_is_what_the_variance_gains_beyond_the_drift(schedule, truth, t):
    assert close(schedule.diffusion_squared(t), true_diffusion_squared(truth, mpf(t)))


@on_every_schedule
def test_diffusion_squared_is_twice_alpha_squared_rho_times_the_slope_of_rho(schedule, truth, t):
    slope = mp.diff(lambda u: true_rho(truth, u), mpf(t), h=mpf(t) * mpf(10) ** -20)
    want = 2 * mpf(schedule(t)[0]) ** 2 * mpf(schedule.rho(t)) * slope
    assert close(schedule.diffusion_squared(t), want, 1e-13)


@pytest.mark.parametrize("name", DEFAULTS | SHIFTED)
def test_start_of_the_domain(name):
    schedule, truth = (DEFAULTS | SHIFTED)[name]
    start = schedule.domain[0]
    variance = truth(mpf(start))[1]
    assert schedule(start)[0] == 1.0
    assert close(schedule(start)[1] ** 2, variance)
    assert close(schedule.drift(start), true_drift(truth, mpf(start)))
    assert close(schedule.diffusion_squared(start), true_diffusion_squared(truth, mpf(start)))
    assert schedule.time(schedule.rho(start)) == start


@pytest.mark.parametrize("name", DEFAULTS | SHIFTED)
def test_end_of_the_domain(name):
    schedule, truth = (DEFAULTS | SHIFTED)[name]
    end = schedule.domain[1]
    alpha, sigma = schedule(end)
    if name in ENDS_IN_NOISE:
        assert alpha == 0.0
        assert abs(sigma - 1.0) <= 1e-15
    else:
        assert close(alpha, truth(mpf(end))[0])
        assert close(sigma, mp.sqrt(truth(mpf(end))[1]))


def test_sub_vp_has_its_own_sigma():
    vp, sub = VP.linear(), SubVP.linear()
    for t in (0.01, 0.1, 0.3):
        assert sub(t)[0] == vp(t)[0]
        assert sub(t)[1] == pytest.approx(vp(t)[1] ** 2, rel=1e-14)
        assert sub(t)[1] < 0.9 * vp(t)[1]


def test_shift_moves_times_towards_noise():
    assert FlowMatching(3.0)(0.5) == (0.25, 0.75)
    assert FlowMatching(1.0)(0.5) == (0.5, 0.5)


# Inverse


@on_every_schedule
def test_time_solves_for_the_given_ratio(schedule, truth, t):
    rho = schedule.rho(t)
    found = mpf(schedule.time(rho))
    # One Newton step from the answer, in arbitrary precision, is its error.
    slope = mp.diff(lambda u: true_rho(truth, u), found, h=found * mpf(10) ** -20)
    assert abs((true_rho(truth, found) - mpf(rho)) / slope) <= TOLERANCE * found


def steepness(schedule, t):
    """d log rho/dt; a rounding of rho moves the time by a rounding over this."""
    return schedule.diffusion_squared(t) / (2.0 * schedule(t)[1] ** 2)


@on_every_schedule
def test_round_trips(schedule, truth, t):
    rho = schedule.rho(t)
    assert abs(schedule.time(rho) - t) <= TOLERANCE * (t + 1.0 / steepness(schedule, t))
    again = schedule.rho(schedule.time(rho))
    assert abs(again - rho) <= TOLERANCE * rho * (1.0 + t * steepness(schedule, t))


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_round_trip_on_a_grid_over_the_whole_domain(schedule):
    low, high = schedule.domain
    grid = np.linspace(low, high, 2001)
    if schedule._ends_in_noise:
        grid = grid[:-1]
    np.testing.assert_allclose(schedule.time(schedule.rho(grid)), grid, rtol=1e-11, atol=1e-14)
    assert (np.diff(schedule.rho(grid)) > 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_end_points_survive_rounding(schedule, dtype):
    low, high = schedule.domain
    if schedule._ends_in_noise:
        high -= 1e-3
    rho = np.asarray([schedule.rho(low), schedule.rho(high)], dtype=dtype)
    times = schedule.time(rho)
    np.testing.assert_allclose(times, [low, high], rtol=3e-6, atol=1e-12)
    assert times[0] >= dtype(low)
    assert times[1] <= dtype(high) or schedule._ends_in_noise


def test_a_bound_rounded_up_to_float32_is_inside():
    schedule, top = EDM(0.002, 0.1), np.asarray([0.1], dtype=np.float32)
    assert float(top[0]) > 0.1
    assert schedule(top)[1] == top
    with pytest.raises(ValueError, match=r"^t must lie in \[0.002, 0.1\]"):
        schedule(np.asarray([0.1000001]))


# Tables


def test_discrete_is_exact_at_the_integers():
    schedule = Discrete(DDPM)
    for i in (0, 1, 2, 10, 500, 998, 999):
        abar = mpf(DDPM[i])
        alpha, sigma = schedule(float(i))
        assert close(alpha, mp.sqrt(abar))
        assert close(sigma, mp.sqrt(1 - abar))
        assert schedule(i) == (alpha, sigma)
        assert abs(schedule.time(schedule.rho(i)) - i) <= 1e-11


def test_discrete_is_the_ddpm_schedule():
    schedule = Discrete(DDPM)
    assert schedule.domain == (0.0, 999.0)
    assert schedule(999)[0] ** 2 == pytest.approx(4.0358e-05, rel=1e-4)  # as published
    # and close to the continuous VP with beta = T betas, whose time i + 1 is here i
    for i in (100, 500, 900):
        assert schedule.rho(i) == pytest.approx(VP.linear().rho((i + 1) / 1000), rel=0.05)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 998), st.floats(0.001, 0.999))
def test_discrete_is_geometric_in_rho_between_the_integers(i, weight):
    schedule, t = Discrete(DDPM), i + weight
    weight = mpf(t) - i

    def truth(u):
        left, right = (mp.sqrt((1 - mpf(DDPM[j])) / mpf(DDPM[j])) for j in (i, i + 1))
        rho = left * (right / left) ** (u - i)
        return 1 / mp.sqrt(1 + rho**2), rho**2 / (1 + rho**2)

    assert close(schedule.rho(t), true_rho(truth, mpf(t)))
    assert close(schedule(t)[0], truth(mpf(t))[0])
    assert close(schedule(t)[1], mp.sqrt(truth(mpf(t))[1]))
    assert close(schedule.drift(t), true_drift(truth, mpf(t)), 1e-12)
    assert close(schedule.diffusion_squared(t), true_diffusion_squared(truth, mpf(t)), 1e-12)
    assert abs(schedule.time(schedule.rho(t)) - t) <= 1e-11


def test_discrete_takes_the_slope_to_the_right_at_an_integer():
    schedule = Discrete(DDPM)
    assert schedule.drift(500) == pytest.approx(schedule.drift(500 + 1e-9), rel=1e-6)
    assert schedule.drift(500) != pytest.approx(schedule.drift(500 - 1e-9), rel=1e-6)
    assert schedule.drift(999) == pytest.approx(schedule.drift(999 - 1e-9), rel=1e-6)


@pytest.mark.parametrize("make", [list, tuple, np.asarray, torch.tensor, array_api_strict.asarray])
def test_discrete_reads_any_table(make):
    schedule = Discrete(make([0.9, 0.5, 0.1]))
    assert schedule.alphas_cumprod == pytest.approx((0.9, 0.5, 0.1), rel=1e-6)
    assert schedule == Discrete(schedule.alphas_cumprod)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert repr(schedule) == "Discrete(<3 levels>)"


# Types


def methods(schedule):
    return {
        "alpha": lambda t: schedule(t)[0],
        "sigma": lambda t: schedule(t)[1],
        "rho": schedule.rho,
        "drift": schedule.drift,
        "diffusion_squared": schedule.diffusion_squared,
        "time": schedule.time,
    }


def arguments(schedule, name):
    low, high = schedule.domain
    times = [low + u * (high - low) for u in (1e-6, 0.013, 0.25, 0.5, 0.77, 0.999)]
    return [schedule.rho(t) for t in times] if name == "time" else times


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", NAMESPACES)
@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_arrays_give_arrays_of_their_kind(schedule, library, dtype):
    xp = NAMESPACES[library]
    for name, method in methods(schedule).items():
        given_ = xp.reshape(xp.asarray(arguments(schedule, name), dtype=getattr(xp, dtype)), (3, 2))
        got = method(given_)
        assert type(got) is type(given_)
        assert (got.dtype, got.shape, got.device) == (given_.dtype, given_.shape, given_.device)
        for i in range(3):
            for j in range(2):
                want = method(float(given_[i, j]))  # at the time as it was rounded
                assert float(got[i, j]) == pytest.approx(want, rel=6e-8 if dtype == "float32" else 2e-15)


@pytest.mark.parametrize("library", NAMESPACES)
@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_zero_dimensional_and_empty_arrays(schedule, library):
    xp = NAMESPACES[library]
    for name, method in methods(schedule).items():
        single = xp.asarray(arguments(schedule, name)[2], dtype=xp.float32)
        got = method(single)
        kinds = (type(single), np.generic) if xp is np else type(single)  # NumPy makes scalars of 0-d arrays
        assert isinstance(got, kinds)
        assert (got.dtype, got.shape) == (single.dtype, ())
        assert method(xp.zeros((0,), dtype=xp.float64)).shape == (0,)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_floats_give_floats(schedule):
    for name, method in methods(schedule).items():
        value = arguments(schedule, name)[3]
        assert type(method(value)) is float
        assert type(method(np.float64(value))) is float
        assert method(np.float64(value)) == method(value)


@pytest.mark.parametrize("name", DEFAULTS | SHIFTED)
def test_float32_is_right_to_its_last_place(name):
    schedule, truth = (DEFAULTS | SHIFTED)[name]
    low, high = schedule.domain
    times = np.asarray(low + np.geomspace(1e-7, 0.9999, 40) * (high - low), dtype=np.float32)
    alpha, sigma = schedule(times)
    for i, t in enumerate(mpf(float(t)) for t in times):
        assert close(float(alpha[i]), truth(t)[0], 6e-8)
        assert close(float(sigma[i]), mp.sqrt(truth(t)[1]), 6e-8)
        assert close(float(schedule.drift(times)[i]), true_drift(truth, t), 6e-8)
        assert close(float(schedule.diffusion_squared(times)[i]), true_diffusion_squared(truth, t), 6e-8)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_torch_differentiates_through_time(schedule):
    low, high = schedule.domain
    t = torch.tensor(low + 0.3141 * (high - low), dtype=torch.float64, requires_grad=True)
    rho = schedule.rho(t)
    (slope,) = torch.autograd.grad(rho, t)
    alpha, _ = schedule(t)
    torch.testing.assert_close(2 * alpha**2 * rho * slope, schedule.diffusion_squared(t), rtol=1e-12, atol=0)
    ratio = rho.detach().requires_grad_()
    (inverse,) = torch.autograd.grad(schedule.time(ratio), ratio)
    torch.testing.assert_close(inverse * slope, torch.ones_like(slope), rtol=1e-11, atol=0)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_other_devices_than_the_default(schedule):
    xp, device = array_api_strict, array_api_strict.Device("device1")
    for name, method in methods(schedule).items():
        given_ = xp.asarray(arguments(schedule, name), dtype=xp.float32, device=device)
        assert method(given_).device == device
        with pytest.raises(ValueError, match=r"at index 0$"):
            method(-1.0 - given_)


def test_the_argument_is_left_alone():
    for schedule in ALL:
        t = np.linspace(*schedule.domain, 5)[1:-1]
        t.setflags(write=False)
        alpha, sigma = schedule(t)
        assert alpha is not t
        assert sigma is not t
        assert schedule.time(schedule.rho(t)) is not t


# Names and errors


@pytest.mark.parametrize("name", DEFAULTS)
def test_schedule_by_name(name):
    assert schedule_by_name(name) == DEFAULTS[name][0]


def test_schedule_by_name_suggests_the_nearest():
    with pytest.raises(ValueError) as error:
        schedule_by_name("flow_matchin")
    message = str(error.value)
    assert all(name in message for name in DEFAULTS)
    assert message.endswith("did you mean 'flow-matching'?")


def test_schedules_are_frozen_values():
    assert VP.linear() == VP.linear(0.1, 20)
    assert VP.linear() != SubVP.linear()
    assert len({VE(), VE(0.01, 50.0), EDM()}) == 2
    assert isinstance(VP.cosine(), VP) and isinstance(Discrete([0.5, 0.1]), VP)
    with pytest.raises(FrozenInstanceError):
        EDM().sigma_max = 1.0
    with pytest.raises(TypeError, match="abstract"):
        Schedule()


BAD = [
    (lambda: VP.linear()(1.5), ValueError, r"^t must lie in \[0.0, 1.0\] for VPLinear\(.*\), got 1.5$"),
    (lambda: VP.linear()(-1e-9), ValueError, r"^t must lie in \[0.0, 1.0\]"),
    (lambda: VP.linear()(math.nan), ValueError, r"^t must lie in .* got nan$"),
    (lambda: VE().drift(math.inf), ValueError, r"^t must lie in .* got inf$"),
    (lambda: EDM()(0.0), ValueError, r"^t must lie in \[0.002, 80.0\]"),
    (lambda: VE()(np.asarray([0.1, 0.2, 3.0, 4.0])), ValueError, r"got 3.0 at index 2$"),
    (lambda: VE()(torch.tensor([[0.1, 0.2], [0.3, -4.0]])), ValueError, r"got -4.0 at index \(1, 1\)$"),
    (lambda: VE()(array_api_strict.asarray([0.1, math.nan])), ValueError, r"got nan at index 1$"),
    (lambda: VE().rho(np.asarray(7.0)), ValueError, r"got 7.0$"),
    (lambda: VE()("0.5"), TypeError, r"^t must be a float or a floating array"),
    (lambda: VE()([0.5]), TypeError, r"^t must be a float or a floating array, got list"),
    (lambda: VE()(None), TypeError, r"^t must be a float or a floating array"),
    (lambda: VE()(True), TypeError, r"^t must be a real number"),
    (lambda: VE()(1j), TypeError, r"^t must be a float or a floating array"),
    (lambda: VE()(np.asarray([0, 1])), TypeError, r"^t must be real floating"),
    (lambda: VE()(np.asarray([0.5j])), TypeError, r"^t must be real floating"),
    (lambda: VP.linear().time(1e3), ValueError, r"^rho must lie in \[0.0, 152.\d+\] for VPLinear"),
    (lambda: VP.linear().time(-0.1), ValueError, r"^rho must lie in"),
    (lambda: VE().time(0.0099), ValueError, r"^rho must lie in \[0.01, "),
    (lambda: VP.cosine().time(math.inf), ValueError, r"^rho must lie in \[0.0, inf\)"),
    (lambda: FlowMatching().time(math.nan), ValueError, r"^rho must lie in \[0.0, inf\)"),
    (lambda: FlowMatching().rho(1.0), ValueError, r"^t must lie in \[0.0, 1.0\) .*alpha = 0"),
    (lambda: FlowMatching().drift(np.asarray([0.5, 1.0])), ValueError, r"got 1.0 at index 1$"),
    (lambda: VP.cosine().diffusion_squared(1.0), ValueError, r"alpha = 0"),
    (lambda: Discrete([0.9, 0.1])(1.5), ValueError, r"^t must lie in \[0.0, 1.0\] for Discrete"),
    (lambda: VP.linear(beta_min=0.0), ValueError, r"0 < beta_min <= beta_max"),
    (lambda: SubVP.linear(2.0, 1.0), ValueError, r"beta_min=2.0, beta_max=1.0"),
    (lambda: VP.linear(beta_max=1e4), ValueError, r"<= 500"),
    (lambda: VP.linear(beta_max=math.nan), ValueError, r"^beta_max must be finite"),
    (lambda: VP.linear(beta_min="0.1"), TypeError, r"^beta_min must be a real number"),
    (lambda: VP.linear(beta_min=np.asarray([0.1])), TypeError, r"^beta_min must be a real number"),
    (lambda: VP.cosine(-0.1), ValueError, r"^s must lie in \[0, 1\], got -0.1"),
    (lambda: VE(0.0, 1.0), ValueError, r"^sigma_min must be positive"),
    (lambda: VE(2.0, 1.0), ValueError, r"sigma_min < sigma_max"),
    (lambda: EDM(-1.0, 1.0), ValueError, r"0 <= sigma_min < sigma_max"),
    (lambda: FlowMatching(0.0), ValueError, r"^shift must be positive, got 0.0"),
    (lambda: Discrete([0.9, 0.5, 0.0]), ValueError, r"got 0 at index 2: at zero terminal signal-to-noise"),
    (lambda: Discrete([0.9, 0.9]), ValueError, r"strictly decreasing.*index 0 and 0.9 at index 1"),
    (lambda: Discrete([0.9, 0.5, 0.6]), ValueError, r"0.5 at index 1 and 0.6 at index 2"),
    (lambda: Discrete([1.0, 0.5]), ValueError, r"got 1.0 at index 0"),
    (lambda: Discrete([0.5, math.nan]), ValueError, r"got nan at index 1"),
    (lambda: Discrete([1e-290, math.nextafter(1e-290, 0.0)]), ValueError, r"by more than rounding"),
    (lambda: Discrete([0.5]), ValueError, r"at least two entries, got 1"),
    (lambda: Discrete(np.asarray([[0.5, 0.1]])), ValueError, r"one-dimensional, got shape \(1, 2\)"),
    (lambda: Discrete(["a", "b"]), TypeError, r"must hold real numbers"),
    (lambda: schedule_by_name(""), ValueError, r"^name must be one of vp, "),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input_is_refused_by_name(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_import_is_light():
    code = "import sys, dfmath.schedules; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"scipy", "numba", "torch", "matplotlib"} & set(run.stdout.split())
