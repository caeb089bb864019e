"""Sampling: one loop for priors, networks and functions; normalizers beside closed forms; DEIS-SN."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import assert_matches, numbers
from scipy.stats import kstest

from dfmath import GaussianMixture, PointMasses, probability_flow
from dfmath.normalizers import Normalizer, normalizer_along_run, normalizer_of_prior
from dfmath.samplers import Churn, sample
from dfmath.schedules import EDM, VP, Discrete, FlowMatching
from dfmath.solvers import SOLVERS, noise_levels, scheme

VARIANCE = 0.7
KINDS = [("ddim", {}), ("deis", {"order": 2}), ("heun", {}), ("dpm++2m", {}), ("pndm", {})]


@pytest.fixture(scope="module")
def prior():
    rng = np.random.default_rng(0)
    return GaussianMixture(rng.standard_normal((3, 2)), np.array([0.2, 0.5, 1.0]))


def gaussian(z, rho):
    """The noise of N(0, VARIANCE)."""
    return rho * z / (VARIANCE + rho**2)


@pytest.mark.parametrize(("solver", "options"), KINDS, ids=[name for name, _ in KINDS])
def test_samples_follow_the_exact_flow(prior, solver, options):
    z = prior.diffuse(1.0, 20.0).sample(5, seed=1)
    found = sample(
        prior, None, z, solver=solver, steps=400, start=20.0, end=0.05, spacing="log", clean=False, **options
    )
    wanted = probability_flow(prior, z, 20.0, 0.05).x
    np.testing.assert_allclose(found.x, wanted, atol=2e-2 if solver == "ddim" else 1e-3)
    assert found.rhos[0] == 20.0 and found.rhos[-1] == 0.05 and len(found.rhos) == 401


@pytest.mark.parametrize("solver", SOLVERS)
def test_gaussians_have_affine_samplers(solver):
    """Every scheme is linear in the state, so its gain is what becomes of 1, stage by stage."""
    levels = noise_levels(30.0, 0.1, 12)
    plan, gains = scheme(solver, levels), [1.0]
    for stage in plan.stages:
        noises = {i: gaussian(gains[i], plan.rhos[i]) for i in stage.weights}
        carried = gains[stage.start] + sum(a * gains[i] for i, a in stage.states.items())
        gains.append(carried + sum(w * noises[i] for i, w in stage.weights.items()))
    x = np.linspace(-2.0, 2.0, 6).reshape(3, 2)
    seed = {"seed": 0} if plan.stochastic else {}
    pair = [sample(gaussian, None, at, solver=solver, steps=levels, **seed).x for at in (x, 0.0 * x)]
    np.testing.assert_allclose(pair[0] - pair[1], gains[-1] * x, rtol=1e-10)


@pytest.mark.parametrize("options", [{"solver": "ddpm", "steps": 1}, {"solver": "heun", "churn": Churn(0.0)}])
def test_seeds_may_stay_where_stochastic_solvers_draw_nothing(options):
    found = sample(gaussian, None, np.ones((2, 2)), start=10.0, end=0.1, seed=0, **{"steps": 4} | options)
    assert np.isfinite(found.x).all()


@pytest.mark.parametrize(("solver", "options"), [("ddpm", {}), ("heun", {"churn": Churn(80.0)})])
def test_stochastic_samplers_have_the_right_law(solver, options):
    start = 40.0
    x = math.sqrt(VARIANCE + start**2) * np.random.default_rng(2).standard_normal((4000, 1))
    found = sample(gaussian, None, x, solver=solver, steps=300, start=start, end=0.02, spacing="log", seed=3, **options)
    assert kstest(found.x[:, 0] / math.sqrt(VARIANCE), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(found.x[:, 0], x[:, 0])[0, 1]) < 0.5, "the noise is the caller's, not fresh"


def test_seeds_decide_on_fresh_noise(prior):
    z = prior.diffuse(1.0, 5.0).sample(4, seed=0)
    options = {"solver": "ddpm", "steps": 5, "start": 5.0, "end": 0.1}
    one, same, other = (sample(prior, None, z, seed=seed, **options).x for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


@pytest.mark.parametrize("schedule", [VP.linear(), FlowMatching(), EDM(0.001, 100.0)], ids=["vp", "flow", "edm"])
def test_schedules_change_the_coordinates_alone(prior, schedule):
    """At even noise levels results are those of canonical coordinates, times alpha."""
    first, last = schedule.time(8.0), schedule.time(0.1)
    z = prior.diffuse(1.0, 8.0).sample(4, seed=0)
    for clean, end in ((True, 1.0), (False, schedule(last)[0])):
        plain = sample(prior, None, z, steps=9, start=8.0, end=0.1, clean=clean)
        found = sample(prior, schedule, schedule(first)[0] * z, steps=9, start=first, end=last, clean=clean)
        np.testing.assert_allclose(found.x, end * plain.x, rtol=1e-9)
        assert found.evaluations == plain.evaluations == 9


def test_ends_of_a_schedule_are_the_default(prior):
    found = sample(prior, EDM(0.01, 30.0), prior.diffuse(1.0, 30.0).sample(2, seed=0), steps=6)
    assert found.rhos == (*noise_levels(30.0, 0.01, 5), 0.0)
    times = sample(prior, VP.linear(), np.ones((1, 2)), steps=4, end=0.01, spacing="time").rhos
    np.testing.assert_allclose([VP.linear().time(rho) for rho in times[:-1]], [1.0, 0.67, 0.34, 0.01], rtol=1e-9)


def test_one_step_is_the_posterior_mean(prior):
    z = prior.diffuse(1.0, 3.0).sample(4, seed=0)
    found = sample(prior, None, z, steps=1, start=3.0, end=0.1, solver="heun")
    np.testing.assert_allclose(found.x, prior.diffuse(1.0, 3.0).posterior_mean(z), rtol=1e-12)


def test_every_namespace_and_shape(xp_kind, dtype):
    rng = np.random.default_rng(0)
    means, z = (rng.standard_normal((n, 2)).astype(dtype).astype("float64") for n in (3, 5))
    home = GaussianMixture(xp_kind.put(means, dtype), 0.3)
    for solver, seed in (("deis", None), ("ddpm", 7)):
        options = {"solver": solver, "steps": 8, "start": 10.0, "end": 0.05, "seed": seed}
        given = xp_kind.put(10.0 * z, dtype)
        found = sample(home, None, given, **options).x
        wanted = sample(GaussianMixture(means, 0.3), None, 10.0 * z, **options).x
        assert_matches(found, wanted, 1e-4 if dtype == "float32" else 1e-9, like=given)
    image = xp_kind.put(rng.standard_normal((2, 3, 4, 4)), dtype)
    shaped = numbers(sample(gaussian, None, image, steps=4, start=5.0, end=0.1).x)
    flat = sample(gaussian, None, xp_kind.put(numbers(image).reshape(2, 48), dtype), steps=4, start=5.0, end=0.1).x
    assert (shaped.reshape(2, 48) == numbers(flat)).all()


def test_noise_is_asked_for_once_at_each_evaluated_state():
    asked, done = [], []

    def noise(z, rho):
        asked.append(rho)
        return gaussian(z, rho)

    options = {"steps": 6, "start": 9.0, "end": 0.1, "progress": lambda k, n: done.append((k, n))}
    found = sample(noise, None, np.ones((1, 1)), solver="heun", churn=Churn(3.0), seed=0, **options)
    assert len(asked) == found.evaluations == 11
    assert done[-1] == (len(done), len(done))


# Normalizers


def test_normalizer_of_a_gaussian_is_known():
    """E|eps| = sqrt(2/pi) rho/sqrt(v + rho^2)."""
    prior = GaussianMixture(np.zeros((1, 3)), VARIANCE)
    levels = (0.05, 0.3, 1.0, 10.0)
    found = normalizer_of_prior(prior, levels, samples=20_000, seed=1)
    wanted = math.sqrt(2.0 / math.pi) * np.asarray(levels) / np.sqrt(VARIANCE + np.square(levels))
    assert found.rhos == levels
    assert (np.abs(found.sizes - wanted) < 5.0 * np.asarray(found.standard_errors)).all()
    spread = math.sqrt(1.0 - 2.0 / math.pi) / math.sqrt(2.0 / math.pi) / math.sqrt(3 * 20_000)
    np.testing.assert_allclose(np.asarray(found.standard_errors) / wanted, spread, rtol=0.05)


def test_normalizer_along_a_run_is_that_of_the_prior(prior):
    levels = noise_levels(40.0, 0.05, 150, "log")
    run = normalizer_along_run(prior, prior.diffuse(1.0, 40.0).sample(3000, seed=0), (*levels, 0.0))
    exact = normalizer_of_prior(prior, levels[::10], samples=3000, seed=1)
    assert run.rhos == tuple(sorted(levels))
    for rho, size, error in zip(exact.rhos, exact.sizes, exact.standard_errors, strict=True):
        assert abs(run(rho) - size) < 8.0 * error + 0.01 * size, rho


def test_between_levels_and_beyond():
    n = Normalizer((0.1, 1.0, 10.0), (0.05, 0.4, 0.75), (0.0, 0.0, 0.0))
    assert [n(rho) for rho in n.rhos] == pytest.approx(n.sizes, rel=1e-14)
    inside = [n(float(rho)) for rho in np.geomspace(0.1, 10.0, 200)]
    assert (np.diff(inside) > 0.0).all(), "a monotone curve"
    assert n(0.01) == pytest.approx(0.005) and n(1e3) == 0.75


def test_normalised_steps_are_exact_where_noise_is_that_size():
    """eps = n(rho) e with e constant: DEIS-SN of order 0 makes no error, DDIM does."""
    n = Normalizer(tuple(map(float, np.geomspace(0.01, 100.0, 60))), tuple(np.geomspace(0.01, 1.0, 60)), (0.0,) * 60)
    x, e = np.zeros((2, 3)), np.array([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0]])
    options = {"steps": [30.0, 10.0, 2.0, 0.5], "solver": "deis", "order": 0}
    found = sample(lambda z, rho: n(rho) * e, None, x, normalizer=n, **options).x
    exact = [0.5, 30.0]  # n = (rho/100)^(1/2) here, whose integral is known
    wanted = e * (exact[0] ** 1.5 - exact[1] ** 1.5) / 15.0
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    plain = sample(lambda z, rho: n(rho) * e, None, x, **options).x
    assert np.abs(plain - wanted).max() > 0.1


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"model": 3.0}, TypeError, "model must be a prior, a ScoreNetwork or a function"),
        ({"model": lambda z, rho: z[:1]}, ValueError, "model must return .*\\(3, 2\\)"),
        ({"model": lambda z, rho: z.astype(np.float32)}, ValueError, "model must return .*float64"),
        ({"model": lambda z, rho: z * math.nan}, ValueError, "what model returns must be finite"),
        ({"x": np.ones(3)}, ValueError, "x must be floating of shape \\(B, ...\\)"),
        ({"x": np.ones((3, 2), dtype=int)}, ValueError, "x must be floating"),
        ({"x": np.full((3, 2), math.inf)}, ValueError, "x must be finite"),
        ({"x": [[1.0]]}, TypeError, "x must be an array"),
        ({"schedule": 3}, TypeError, "schedule must be an instance of"),
        ({"start": None}, ValueError, "start must be given where there is no schedule"),
        ({"end": 20.0}, ValueError, "rho_max > rho_min"),
        ({"schedule": VP.linear(), "start": None, "end": None}, ValueError, "end must be given for a schedule whose"),
        (
            {"schedule": FlowMatching(), "start": None, "end": 0.1},
            ValueError,
            "start must be given for a schedule whose last level has no signal",
        ),
        ({"steps": 0}, ValueError, "steps must be"),
        ({"steps": [3.0, 1.0]}, ValueError, "start is not for steps that are levels"),
        ({"steps": [1.0, 3.0], "start": None, "end": None}, ValueError, "decrease strictly"),
        ({"spacing": "linear"}, ValueError, "spacing must be one of"),
        ({"spacing": "time"}, ValueError, "schedule belongs to spacing"),
        ({"solver": "euler"}, ValueError, "solver must be one of"),
        ({"solver": lambda levels: 3}, TypeError, "what solver returns must be an instance"),
        (
            {"solver": lambda levels: scheme("ddim", levels), "order": 2},
            ValueError,
            "order is an option of solvers by name",
        ),
        ({"solver": "ddpm"}, ValueError, "seed belongs to stochastic solvers"),
        ({"seed": 0}, ValueError, "seed belongs to stochastic solvers"),
    ],
)
def test_wrong_arguments_are_refused(change, kind, words):
    arguments = {
        "model": gaussian,
        "schedule": None,
        "x": np.ones((3, 2)),
        "start": 10.0,
        "end": 0.1,
        "steps": 4,
    } | change
    with pytest.raises(kind, match=words):
        sample(arguments.pop("model"), arguments.pop("schedule"), arguments.pop("x"), **arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": (1.0,)}, "one length"),
        ({"rhos": (2.0, 1.0)}, "increase"),
        ({"rhos": (0.0, 1.0)}, "positive"),
        ({"sizes": (0.0, 1.0)}, "sizes must be positive"),
        ({"sizes": (math.nan, 1.0)}, "sizes must be positive"),
    ],
)
def test_wrong_normalizers_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Normalizer(**({"rhos": (1.0, 2.0), "sizes": (0.5, 0.6), "standard_errors": (0.0, 0.0)} | change))


def test_point_masses_are_reached():
    points = np.random.default_rng(0).standard_normal((20, 4))
    z = PointMasses(points).diffuse(1.0, 50.0).sample(30, seed=0)
    found = sample(PointMasses(points), None, z, steps=40, start=50.0, end=0.01).x
    distance = np.abs(found[:, None] - points[None]).max(axis=2).min(axis=1)
    assert distance.max() < 1e-6


# Of networks


def test_normalizers_of_networks_are_kept(tmp_path):
    torch = pytest.importorskip("torch")
    from dfmath.integrations.score_normalizer import network_normalizer
    from dfmath.integrations.torch import ScoreNetwork

    class Net(torch.nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.gain, self.calls = torch.nn.Parameter(torch.tensor(gain)), 0

        def forward(self, x, t):
            self.calls += 1
            return self.gain * x / (1.0 + t[:, None])

    net, file = Net(0.8), tmp_path / "normalizer.safetensors"
    network, levels = ScoreNetwork(net, EDM(0.001, 100.0)), noise_levels(20.0, 0.1, 30, "log")
    x = 20.0 * torch.randn((64, 3), generator=torch.Generator().manual_seed(0))
    found = network_normalizer(network, x, levels, cache=file)
    assert found == network_normalizer(network, x, levels)
    before = net.calls
    assert network_normalizer(network, x, levels, cache=file) == found
    assert net.calls == before + 3  # to know it again
    with pytest.raises(ValueError, match=r"must be of this network and run, got another network$"):
        network_normalizer(ScoreNetwork(Net(0.7), EDM(0.001, 100.0)), x, levels, cache=file)
    with pytest.raises(ValueError, match=r"got another prediction$"):
        network_normalizer(ScoreNetwork(net, EDM(0.001, 100.0), "x0"), x, levels, cache=file)
    with pytest.raises(ValueError, match="got another schedule, levels"):
        network_normalizer(ScoreNetwork(net, EDM(0.01, 100.0)), x, levels[1:], cache=file)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="safetensors"):
        network_normalizer(network, x, levels, cache=file)
    normalised = sample(network, None, x, steps=levels[::6], normalizer=found).x
    assert normalised.dtype == torch.float32 and not normalised.requires_grad


def test_normalizers_of_other_networks_are_not_taken(tmp_path):
    """Networks that nothing told of them sets apart: functions, tables of one length, conditions, scales, times."""
    torch = pytest.importorskip("torch")
    from dfmath.integrations.score_normalizer import network_normalizer
    from dfmath.integrations.torch import ScoreNetwork

    def module(x, t, c=1.0):
        return c * x / (1.0 + t[:, None])

    x, levels = 5.0 * torch.randn((8, 3), generator=torch.Generator().manual_seed(0)), [5.0, 2.0, 1.0]
    tables = [np.geomspace(0.999, last, 100) for last in (1e-3, 2e-3)]
    pairs = [
        [ScoreNetwork(module, EDM()), ScoreNetwork(lambda x, t: 0.5 * module(x, t), EDM())],
        [ScoreNetwork(module, Discrete(table)) for table in tables],
        [ScoreNetwork(module, EDM(), conditioning={"c": c}) for c in (1.0, 0.9)],
        [ScoreNetwork(module, EDM(), "edm", sigma_data=size) for size in (0.5, 1.0)],
        [ScoreNetwork(module, EDM(), time=scaled) for scaled in (None, lambda t: 0.5 * t)],
    ]
    for number, (first, second) in enumerate(pairs):
        file = tmp_path / f"{number}.safetensors"
        found = network_normalizer(first, x, levels, cache=file)
        assert network_normalizer(first, x, levels, cache=file) == found
        with pytest.raises(ValueError, match="which answers something else"):
            network_normalizer(second, x, levels, cache=file)
