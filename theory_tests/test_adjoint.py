"""Adjoints of samplers beside automatic differentiation, products beside formulas, guidance beside a plain loop."""

from __future__ import annotations

import gc
import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from dfmath.integrations.adjoint import adjoint, run
from dfmath.integrations.guidance import guided_sample
from dfmath.integrations.products import (
    PRODUCTS,
    Calibrated,
    DataCovariance,
    Exact,
    Gaussian,
    Secant,
    product_of,
)
from dfmath.integrations.secant import mean_slope
from dfmath.integrations.torch import ScoreNetwork
from scipy.fft import dctn
from torch import nn

from dfmath import GaussianMixture
from dfmath.schedules import EDM, VP, Discrete
from dfmath.solvers import noise_levels, scheme

DIM, SHAPE, ROWS = 6, (1, 2, 3), 3
LEVELS = noise_levels(40.0, 0.05, 7)
SOLVERS = [("ddim", {}), *(("deis", {"order": q}) for q in (1, 2, 3)), ("heun", {}), ("dpm++2m", {})]
NAMES = [name + str(options.get("order", "")) for name, options in SOLVERS]


@pytest.fixture(scope="module")
def prior():
    rng = np.random.default_rng(0)
    roots = 0.3 * rng.standard_normal((3, DIM, DIM))
    means = torch.from_numpy(rng.standard_normal((3, DIM)))
    return GaussianMixture(means, torch.from_numpy(roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(DIM)))


def ideal(prior, schedule, **options):
    """The ideal network of a prior, in float64, for states of any shape."""

    def module(x, t):
        return prior.diffuse(*schedule(t)).score(x.flatten(1)).reshape(x.shape)

    return ScoreNetwork(module, schedule, "score", **options)


class Perceptron(nn.Module):
    """A field that is no gradient: its Jacobian is not symmetric."""

    def __init__(self, dtype=torch.float64, labels=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"first": (DIM + 1, 16), "second": (16, DIM)}.items():
            setattr(self, name, nn.Parameter((0.4 * torch.randn(shape, generator=generator)).to(dtype)))
        self.labels = labels

    def forward(self, x, t, label=None):
        hidden = torch.tanh(torch.cat([0.2 * x.flatten(1), torch.log(t)[:, None]], dim=1) @ self.first)
        if label is not None:
            hidden = hidden * label[:, None]
        return (hidden @ self.second).reshape(x.shape)


def begin(network, levels, shape=SHAPE, dtype=torch.float64, seed=0):
    """States x at the first level."""
    alpha, sigma = network.schedule(network.schedule.time(levels[0]))
    generator = torch.Generator().manual_seed(seed)
    return (sigma * torch.randn((ROWS, *shape), generator=generator, dtype=torch.float64) + 0.3 * alpha).to(dtype)


def target_loss(x):
    """A quadratic loss that tells coordinates apart."""
    goal = torch.linspace(-1.0, 1.0, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
    return 0.5 * (x - goal).square().flatten(1).sum(dim=1)


def unrolled(network, steps, x, loss):
    """Gradient by x of the loss at the end, by differentiating a plain loop over the stages in x."""
    x = x.clone().requires_grad_()
    times = [network.schedule.time(rho) for rho in steps.rhos[:-1]]
    times = [round(t) for t in times] if network.call.time == "discrete" else times
    alphas = [network.schedule(t)[0] for t in times]
    states, noises = [x / alphas[0]], []
    for k, stage in enumerate(steps.stages):
        noises.append(network.noise(alphas[k] * states[k], times[k]))
        carried = states[stage.start] + sum(a * states[i] for i, a in stage.states.items())
        states.append(carried + sum(w * noises[i] for i, w in stage.weights.items()))
    (gradient,) = torch.autograd.grad(loss(states[-1]).sum(), x)
    return states[-1].detach(), gradient


def compare(network, steps, x, products):
    """Ends and gradients, beside the plain loop."""
    end, wanted = unrolled(network, steps, x, target_loss)
    path = run(network, steps, x)
    torch.testing.assert_close(path.end.reshape(x.shape), end, rtol=1e-10, atol=1e-10)
    leaf = path.end.reshape(x.shape).requires_grad_()
    (gradient,) = torch.autograd.grad(target_loss(leaf).sum(), leaf)
    alpha, _ = network.schedule(network.schedule.time(steps.rhos[0]))
    for product in products:
        found = adjoint(path, gradient, product) / alpha
        assert found.shape == x.shape
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())
        flat = adjoint(path, gradient.flatten(1), product)
        assert torch.equal(flat.reshape(x.shape), alpha * found) or torch.allclose(flat.reshape(x.shape), alpha * found)


@pytest.mark.parametrize("schedule", [VP.linear(), EDM()], ids=["VP", "EDM"])
@pytest.mark.parametrize("levels", [LEVELS, (*LEVELS, 0.0)], ids=["to noise", "to data"])
@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=NAMES)
def test_adjoint_is_the_gradient_of_the_sampler(prior, solver, options, levels, schedule):
    network = ideal(prior, schedule)
    compare(network, scheme(solver, levels, **options), begin(network, levels), ["vjp", Exact(prior)])


@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=NAMES)
def test_adjoint_of_a_network_whose_jacobian_is_not_symmetric(solver, options):
    network = ScoreNetwork(Perceptron(), VP.linear())
    compare(network, scheme(solver, (*LEVELS, 0.0), **options), begin(network, LEVELS, (DIM,)), ["vjp"])


def test_adjoint_of_a_guided_network_with_conditions_of_rows():
    labels = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    conditions = {"conditioning": {"label": labels}, "unconditional": {"label": torch.ones_like(labels)}}
    network = ScoreNetwork(Perceptron(), VP.linear(), guidance=3.0, **conditions)
    compare(network, scheme("deis", LEVELS), begin(network, LEVELS), ["vjp"])


def test_adjoint_of_discrete_times(prior):
    schedule = Discrete(np.linspace(0.9999, 0.001, 100))
    levels = [schedule.rho(t) for t in (99.0, 73.0, 50.0, 20.0, 0.0)]
    network = ScoreNetwork(lambda x, t: network_score(prior, schedule, x, t), schedule, "score", time="discrete")
    compare(network, scheme("heun", levels), begin(network, levels), ["vjp", Exact(prior)])
    with pytest.raises(ValueError, match="whole times for a network of discrete times, got 1"):
        run(network, scheme("ddim", [1.5, levels[-1]]), begin(network, levels))


def network_score(prior, schedule, x, t):
    assert t.dtype == torch.int64
    return prior.diffuse(*schedule(t.to(torch.float64))).score(x.flatten(1)).reshape(x.shape)


# Products, densely and from the formulas.


def path_of(prior, schedule=None, solver="heun", levels=(*LEVELS, 0.0)):
    network = ideal(prior, VP.linear() if schedule is None else schedule)
    return run(network, scheme(solver, levels), begin(network, levels))


def vectors(seed=3):
    return torch.randn((ROWS, DIM), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(product, path, i):
    """The matrix (B, d, d) that a product applies."""
    columns = [product(path, i, e.expand(ROWS, DIM)) for e in torch.eye(DIM, dtype=torch.float64)]
    return torch.stack(columns, dim=2)


def fisher_of(spread, rho):
    """(I - P/rho^2)/rho^2."""
    return (torch.eye(DIM, dtype=torch.float64) - spread / rho**2) / rho**2


def told_trace(prior, schedule):
    """tr F of (x, t)."""
    return lambda x, t: prior.diffuse(*schedule(t)).fisher(x.flatten(1)).trace()


@pytest.mark.parametrize("i", [0, 3, 8, 13])
def test_endpoint_products_are_their_formulas(prior, i):
    """MATH 4.4 and 4.6, at alpha = 1 and sigma = rho."""
    schedule = VP.linear()
    path = path_of(prior, schedule)
    rho, end = path.scheme.rhos[i], path.end
    q = prior.diffuse(1.0, rho)
    mean, fisher = q.posterior_mean(path.states[i]), q.fisher(path.states[i])
    trace = rho**2 * (DIM - rho**2 * fisher.trace())
    line = (end - mean)[:, :, None] * (end - mean)[:, None, :]
    spreads = {
        "none": torch.zeros((ROWS, DIM, DIM), dtype=torch.float64),
        "paper": end[:, :, None] * end[:, None, :] - mean[:, :, None] * mean[:, None, :],
        "centred": line,
        "vjp": q.fisher(path.states[i]).posterior_covariance().to_dense(),
    }
    for name, spread in spreads.items():
        wanted = fisher_of(spread, rho)
        torch.testing.assert_close(
            dense(product_of(name), path, i), wanted, rtol=1e-8, atol=1e-8 * wanted.abs().max().item()
        )
    wanted = fisher_of(line * (trace / (end - mean).square().sum(dim=1))[:, None, None], rho)
    found = dense(Calibrated(told_trace(prior, schedule)), path, i)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7 * wanted.abs().max().item())
    found, wanted = product_of("difference")(path, i, vectors()), fisher.matvec(vectors())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


def test_traces_are_at_the_states_of_the_network(prior):
    """tr P does not depend on alpha: the same product with schedules that scale states differently."""
    found = []
    for schedule in (VP.linear(), EDM()):
        path = path_of(prior, schedule, levels=LEVELS)
        path = run(
            path.network, path.scheme, path.network.schedule(path.times[0])[0] * vectors(5).reshape(ROWS, *SHAPE)
        )
        found.append(Calibrated(told_trace(prior, schedule))(path, 5, vectors()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-7)


def data(count=200, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((DIM, DIM)) * np.geomspace(2.0, 0.1, DIM)
    return torch.from_numpy(rng.standard_normal((count, DIM)) @ mixing.T + offset)


def population(points):
    return torch.from_numpy(np.cov(points.numpy().T, bias=True))


def test_principal_covariance_streams():
    points = data(offset=1e4)
    wanted = population(points)
    for batches in ([points], points.split(7), [points.reshape(-1, *SHAPE)[:50], points.reshape(-1, *SHAPE)[50:]]):
        found = DataCovariance.from_batches(iter(batches))
        matrix = found.backward(found.eigenvalues * found.forward(torch.eye(DIM, dtype=torch.float64)))
        torch.testing.assert_close(matrix, wanted, rtol=1e-9, atol=1e-9)
        v = vectors()
        torch.testing.assert_close(found.backward(found.forward(v)), v)
    single = DataCovariance.from_batches(points.float().split(50))
    assert single.eigenvalues.dtype == torch.float32
    torch.testing.assert_close(
        single.eigenvalues.double(),
        torch.linalg.eigvalsh(population(points.float().double())).clamp(min=0.0),
        rtol=1e-5,
        atol=1e-6,
    )
    some = DataCovariance.from_batches([points], components=2)
    torch.testing.assert_close(some.eigenvalues, torch.linalg.eigvalsh(wanted)[-2:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (1, 1, 6)])
def test_cosine_covariance_is_the_transform_of_scipy(shape):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((30, *shape)).cumsum(axis=-1) + 100.0
    found = DataCovariance.from_batches(torch.from_numpy(images).split(7), "cosine")
    waves = dctn(images, axes=(-2, -1), norm="ortho").reshape(30, -1)
    np.testing.assert_allclose(found.eigenvalues, waves.var(axis=0), rtol=1e-8)
    flat = torch.from_numpy(images.reshape(30, -1))
    np.testing.assert_allclose(found.forward(flat), waves, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.backward(found.forward(flat)), flat)


def gaussian_prior(points):
    return GaussianMixture(points.mean(dim=0, keepdim=True), population(points)[None])


@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=NAMES)
def test_gaussian_product_is_exact_on_gaussian_data(solver, options):
    points = data()
    prior = gaussian_prior(points)
    network = ideal(prior, VP.linear())
    covariance = DataCovariance.from_batches(points.split(60))
    products = [Gaussian(covariance), Gaussian(covariance, told_trace(prior, VP.linear()))]
    compare(network, scheme(solver, (*LEVELS, 0.0), **options), begin(network, LEVELS), products)


@pytest.mark.parametrize("i", [0, 4, 10])
@pytest.mark.parametrize("components", [None, 3])
def test_gaussian_product_is_its_formula(prior, components, i):
    """MATH 4.6b, with the clip of kappa; without variance beyond the components."""
    path, schedule = path_of(prior), VP.linear()
    points, rho = data(), path.scheme.rhos[i]
    values, vectors_ = torch.linalg.eigh(population(points))
    values = values if components is None else torch.cat([torch.zeros(DIM - components), values[-components:]])
    spread = (vectors_ * (rho**2 * values / (values + rho**2))) @ vectors_.mT
    covariance = DataCovariance.from_batches([points], components=components)
    wanted = fisher_of(spread, rho).expand(ROWS, DIM, DIM)
    torch.testing.assert_close(dense(Gaussian(covariance), path, i), wanted, rtol=1e-8, atol=1e-8 / rho**2)
    trace = rho**2 * (DIM - rho**2 * prior.diffuse(1.0, rho).fisher(path.states[i]).trace())
    kappa = torch.clamp(trace / spread.trace(), max=1.0 + rho**2 / values.max().item())
    wanted = fisher_of(kappa[:, None, None] * spread, rho)
    found = dense(Gaussian(covariance, told_trace(prior, schedule)), path, i)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 / rho**2)


def test_cosine_product_is_its_formula():
    """Where the covariance is diagonal in the transform, and states are images."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.standard_normal((40, *SHAPE)) * np.array([2.0, 0.5, 1.0]))
    covariance = DataCovariance.from_batches([images], "cosine")
    waves = torch.from_numpy(dctn(np.eye(DIM).reshape(DIM, *SHAPE), axes=(-2, -1), norm="ortho").reshape(DIM, DIM))
    matrix = (waves * covariance.eigenvalues) @ waves.mT
    prior = GaussianMixture(torch.zeros((1, DIM), dtype=torch.float64), matrix[None])
    path = path_of(prior)
    for i in (0, 5, 12):
        wanted = prior.diffuse(1.0, path.scheme.rhos[i]).fisher(path.states[i]).to_dense()
        torch.testing.assert_close(dense(Gaussian(covariance), path, i), wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("components", [None, 3])
def test_secant_product_is_its_formula(prior, components, solver):
    """The update of C densely; it fulfils the secant equation, with F between 0 and I/rho^2."""
    covariance = DataCovariance.from_batches([data()], components=components)
    path = path_of(prior, solver=solver, levels=noise_levels(40.0, 0.05, 12))
    eye, updated = torch.eye(DIM, dtype=torch.float64), 0
    start = covariance.apply(eye).expand(ROWS, DIM, DIM)
    for i, rho in enumerate(path.scheme.rhos[:-1]):
        y, noise = -mean_slope(path, i), path.noises[i]
        p, q = (noise - y)[:, :, None], (rho**2 * y)[:, :, None]
        cp = start @ p
        new = start - cp @ cp.mT / (p.mT @ cp) + q @ q.mT / (p.mT @ q)
        good = (p.mT @ q)[:, 0, 0] > 0.0
        wanted = torch.linalg.inv(torch.where(good[:, None, None], new, start) + rho**2 * eye)
        found = dense(Secant(covariance), path, i)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7 / rho**2)
        assert torch.linalg.eigvalsh(found).min() > -1e-9 and torch.linalg.eigvalsh(found).max() < (1.0 + 1e-9) / rho**2
        explained = noise - rho**2 * (found @ noise[:, :, None])[:, :, 0]
        torch.testing.assert_close(explained[good], y[good], rtol=1e-6, atol=1e-7)
        updated += int(good.sum())
    assert updated > 0.7 * ROWS * len(path.states)


def test_slopes_of_means_are_those_of_the_flow():
    """On Gaussian data dm/drho = -S eps, to second order in the steps; Heun's predictors do not count as neighbours."""
    points = data()
    prior = gaussian_prior(points)
    for solver in ("ddim", "heun"):
        errors = []
        for steps in (50, 100):
            path = path_of(prior, solver=solver, levels=noise_levels(40.0, 0.05, steps, "log"))
            i = next(j for j in path.scheme.ends if path.rho(j) <= 1.0 + 1e-9)
            shrinkage = prior.diffuse(1.0, path.rho(i)).fisher(path.states[i]).posterior_covariance()
            wanted = -shrinkage.matvec(path.noises[i]) / path.rho(i) ** 2
            errors.append((mean_slope(path, i) - wanted).abs().max().item())
        assert errors[1] < 0.1 * wanted.abs().max() and errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_slopes_of_parabolas_are_exact(prior, solver):
    """Of means that are parabolas in log rho, between levels at uneven distances; lines at the two ends."""
    path = path_of(prior, solver=solver, levels=(30.0, 11.0, 2.0, 1.5, 0.2, 0.0))
    rhos = path.scheme.rhos[:-1]
    a, b, c = vectors(1), vectors(2), vectors(3)
    means = [a + b * math.log(rho) + c * math.log(rho) ** 2 for rho in rhos]
    states = tuple(mean + rho * noise for mean, rho, noise in zip(means, rhos, path.noises, strict=True))
    path = replace(path, states=states)
    for i, rho in enumerate(rhos):
        if rhos[0] > rho > rhos[-1]:
            torch.testing.assert_close(mean_slope(path, i), (b + 2.0 * c * math.log(rho)) / rho, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean_slope(path, 0), (b + c * math.log(30.0 * 11.0)) / 30.0, rtol=1e-9, atol=1e-9)
    last = len(rhos) - 1
    torch.testing.assert_close(mean_slope(path, last), (b + c * math.log(1.5 * 0.2)) / 0.2, rtol=1e-9, atol=1e-9)


def test_secant_of_gaussian_data_is_nearly_exact_and_alone_is_the_gaussian_model():
    points = data()
    prior, covariance = gaussian_prior(points), DataCovariance.from_batches([points])
    path = path_of(prior, levels=noise_levels(40.0, 0.05, 60, "log"))
    exact = adjoint(path, vectors(), Exact(prior))
    assert ((adjoint(path, vectors(), Secant(covariance)) - exact).norm() < 1e-2 * exact.norm()).all()
    short = path_of(prior, solver="ddim", levels=(2.0, 1.0))
    assert mean_slope(short, 0) is None
    assert torch.equal(adjoint(short, vectors(), Secant(covariance)), adjoint(short, vectors(), Gaussian(covariance)))


def test_products_of_ones_own_are_taken(prior):
    path = path_of(prior)
    gradient = vectors()
    found = adjoint(path, gradient, lambda path, i, v: v / path.scheme.rhos[i] ** 2)
    torch.testing.assert_close(found, adjoint(path, gradient, "none"))


# Memory and precision.


def test_no_graph_is_kept(prior):
    """Cheap products save nothing for a backward pass; products by differentiation give back what they took."""
    network = ScoreNetwork(Perceptron(), VP.linear())
    covariance = DataCovariance.from_batches([data()])
    x, gradient = begin(network, LEVELS, (DIM,)).requires_grad_(), vectors()

    def saved(steps, product):
        count = 0

        def pack(tensor):
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            path = run(network, scheme("ddim", noise_levels(40.0, 0.05, steps)), x)
            adjoint(path, gradient, product)
        return path, count

    for product in ("none", "paper", "centred", "difference", Gaussian(covariance), Secant(covariance)):
        path, count = saved(10, product)
        assert count == 0
        assert not any(t.requires_grad for t in (*path.states, *path.noises, path.end))
    path = run(network, scheme("ddim", noise_levels(40.0, 0.05, 10)), x)

    def live():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = []
    for _ in range(3):
        found = adjoint(path, gradient, "vjp")
        counts.append(live())
    assert not found.requires_grad and counts[1] == counts[2]
    assert len(path.states) == len(path.noises) == 10 and all(p.grad is None for p in network.call.owner.parameters())


def test_single_precision(prior):
    """States, gradients and products stay float32, and are near those of float64."""
    double, single = (ScoreNetwork(Perceptron(dtype), VP.linear()) for dtype in (torch.float64, torch.float32))
    steps = scheme("heun", LEVELS)
    x, gradient = begin(double, LEVELS, (DIM,)), vectors()
    covariance = DataCovariance.from_batches([data().float()])
    for product, wide in (("vjp", "vjp"), (Gaussian(covariance), Gaussian(DataCovariance.from_batches([data()])))):
        path = run(single, steps, x.float())
        found = adjoint(path, gradient.float(), product)
        assert found.dtype == path.end.dtype == torch.float32
        wanted = adjoint(run(double, steps, x), gradient, wide)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


class Rounded(nn.Module):
    """The ideal network of a prior, whose input and output are rounded to a dtype."""

    def __init__(self, prior, schedule, dtype):
        super().__init__()
        self.prior, self.schedule, self.nothing = prior, schedule, nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, x, t):
        alpha, sigma = self.schedule(t.to(torch.float64))
        noise = -sigma[:, None] * self.prior.diffuse(alpha, sigma).score(x.to(torch.float64))
        return noise.to(self.nothing.dtype)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-3), (torch.bfloat16, 0.2)])
def test_differences_know_the_precision_of_the_network(prior, dtype, error):
    network = ScoreNetwork(Rounded(prior, VP.linear(), dtype), VP.linear())
    path = run(network, scheme("ddim", (30.0, 5.0, 1.0, 0.5, 0.1)), begin(network, (30.0,), (DIM,)).float())
    for i in range(3):
        wanted = prior.diffuse(1.0, path.rho(i)).fisher(path.states[i].double()).matvec(vectors())
        found = product_of("difference")(path, i, vectors().float()).double()
        assert (found - wanted).norm() < error * wanted.norm()
    still = product_of("difference")(path, 0, torch.zeros((ROWS, DIM)))
    assert torch.equal(still, torch.zeros_like(still))


# Guidance.

GUIDED, COARSE = noise_levels(40.0, 0.05, 10), (*noise_levels(40.0, 0.05, 7), 0.0)


def products_for(prior, schedule, solver):
    """Every one; without those from the end point where steps reach further than these approximations hold."""
    covariance, trace = DataCovariance.from_batches([prior.sample(500, seed=0)]), told_trace(prior, schedule)
    sound = ["none", "difference", "vjp", "unrolled", Gaussian(covariance), Secant(covariance), Exact(prior)]
    rest = [*PRODUCTS, Calibrated(trace), Gaussian(covariance, trace)]
    return [*sound, *(product for product in rest if product not in sound and solver == "ddim")]


@pytest.mark.parametrize("solver", ["ddim", partial(scheme, "deis", order=3), "heun"], ids=["ddim", "deis3", "heun"])
def test_guidance_lowers_the_loss_with_every_product(prior, solver):
    """Those that are exact agree with the unrolled sampler."""
    network = ideal(prior, VP.linear())
    scales = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).reshape(-1, 1, 1, 1)
    x, results = begin(network, COARSE).repeat(4, 1, 1, 1) * scales, {}
    options = {"solver": solver, "guide_from": 1, "guide_to": 3, "strength": 0.1}
    plain = guided_sample(network, target_loss, x, COARSE, **options | {"strength": 0.0})
    for product in products_for(prior, network.schedule, solver):
        found = guided_sample(network, target_loss, x, COARSE, product=product, **options)
        assert found.x.shape == x.shape and found.losses.shape == (3, 12) and not found.x.requires_grad
        torch.testing.assert_close(found.loss, target_loss(found.x))
        assert found.loss.mean() < plain.loss.mean(), product
        results[product if isinstance(product, str) else type(product)] = found
    for exact in ("vjp", Exact):
        torch.testing.assert_close(results[exact].x, results["unrolled"].x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(results[exact].losses, results["unrolled"].losses, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plain.x.flatten(1), run_of(network, solver, x).end, rtol=1e-9, atol=1e-9)


def run_of(network, solver, x):
    steps = solver(COARSE) if callable(solver) else scheme(solver, COARSE)
    return run(network, steps, x)


def rms(v):
    return v.flatten(1).square().mean(dim=1).sqrt().reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("normalisation", ["rms", "correction", "none"])
def test_guidance_is_its_protocol(normalisation):
    """A plain loop in x: at every step in the window the gradient through the rest of the sampler, then a DDIM step."""
    labels = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    conditions = {"conditioning": {"label": labels}, "unconditional": {"label": torch.ones_like(labels)}}
    schedule, module = VP.linear(), Perceptron()
    network = ScoreNetwork(module, schedule, guidance=3.0, **conditions)
    levels, x, losses = noise_levels(20.0, 0.05, 6), begin(network, (20.0,)), []
    options = {"guide_from": 1, "guide_to": 3, "strength": 0.07, "normalisation": normalisation}
    found = guided_sample(network, target_loss, x, levels, **options)
    for k, (rho, after) in enumerate(itertools.pairwise(levels)):
        t = schedule.time(rho)
        (alpha, sigma), (alpha_u, sigma_u) = schedule(t), schedule(schedule.time(after))
        if 1 <= k <= 3:
            end, gradient = unrolled(network, scheme("ddim", levels[k:]), x, target_loss)
            losses.append(target_loss(end))
            times = torch.full((ROWS,), t, dtype=torch.float64)
            difference = module(x, times, labels) - module(x, times, torch.ones_like(labels))
            unit = {"rms": sigma, "correction": rms(3.0 * difference), "none": rms(gradient)}[normalisation]
            x = x - 0.07 * unit * gradient / rms(gradient)
        x = alpha_u / alpha * x + (sigma_u - alpha_u * sigma / alpha) * network.noise(x, t)
        x = x.detach()
    torch.testing.assert_close(found.x, x / alpha_u, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.losses, torch.stack(losses), rtol=1e-9, atol=1e-9)
    assert found.products == 5 + 4 + 3
    assert found.network_evaluations == 6 + 5 + 4 + 3 + (6 if normalisation == "correction" else 0)


def two_step_run(denoiser, z, levels, guide=None, window=range(0)):
    """DPM-Solver++(2M) as it is published, in posterior means; `guide` moves the state before some steps."""
    before = None
    for k, (now, after) in enumerate(itertools.pairwise(levels)):
        z = guide(z, levels[k:]) if k in window else z
        mean = denoiser(z, now)
        extrapolated = mean
        if before is not None and after > 0.0:
            ratio = math.log(now / after) / math.log(levels[k - 1] / now)
            extrapolated = mean + 0.5 * ratio * (mean - before)
        z = after / now * z + (1.0 - after / now) * extrapolated
        before = mean
    return z


def test_guided_two_step_runs_are_those_in_posterior_means():
    schedule, spread = EDM(), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def denoiser(z, rho):
        return spread / (spread + rho**2) * z

    def guide(z, levels):
        start = z.detach().requires_grad_()
        end = two_step_run(denoiser, start, levels)
        return z - 0.3 * torch.autograd.grad((end**2).sum(), start)[0]

    levels = (*noise_levels(10.0, 0.1, 6), 0.0)
    network = ScoreNetwork(lambda z, rho: denoiser(z, rho[:, None]), schedule, "denoiser")
    x = 10.0 * torch.ones((2, 3), dtype=torch.float64)
    found = guided_sample(
        network,
        lambda z: (z**2).sum(dim=1),
        x,
        levels,
        solver="dpm++2m",
        product="vjp",
        guide_from=1,
        guide_to=4,
        strength=0.3,
        normalisation="none",
    )
    torch.testing.assert_close(found.x, two_step_run(denoiser, x, levels, guide, range(1, 5)), rtol=1e-9, atol=1e-12)


def test_one_rollout_step_is_the_gradient_at_the_mean(prior):
    """As in diffusion posterior sampling."""
    network, levels = ideal(prior, EDM()), (3.0, 2.0, 1.0, 0.5, 0.0)
    x = begin(network, levels)
    options = {"guide_from": 0, "guide_to": 0, "strength": 0.3, "rollout_steps": 1}
    found = guided_sample(network, target_loss, x, levels, **options)
    leaf = x.clone().requires_grad_()
    loss = target_loss(network.posterior_mean(leaf, 3.0))
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    moved = x - 0.3 * 3.0 * gradient / rms(gradient)
    torch.testing.assert_close(found.x.flatten(1), run(network, scheme("ddim", levels), moved).end)
    torch.testing.assert_close(found.losses[0], loss.detach())
    assert found.products == 1 and found.network_evaluations == 4 + 1


def test_rollouts_leave_out_levels_evenly(prior):
    """All that there are where there are few."""
    seen = []

    def plan(rhos):
        seen.append(tuple(rhos))
        return scheme("ddim", rhos)

    network, levels = ideal(prior, EDM()), (9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0)
    options = {"solver": plan, "guide_from": 0, "guide_to": 5, "rollout_steps": 3}
    guided_sample(network, target_loss, begin(network, levels), levels, **options)
    assert seen[1] == (9.0, 7.0, 5.0, 3.0) and seen[-2:] == [(5.0, 4.0, 3.0), (4.0, 3.0)]
    assert all(s[0] == levels[k] and s[-1] == 3.0 and len(s) <= 4 for k, s in enumerate(seen[1:]))


def test_samples_do_not_depend_on_each_other_and_zero_gradients_do_nothing(prior):
    network = ideal(prior, VP.linear())
    x, options = begin(network, GUIDED), {"guide_from": 2, "guide_to": 4, "product": "vjp"}
    calls = []
    together = guided_sample(network, target_loss, x, GUIDED, progress=lambda *now: calls.append(now), **options)
    alone = guided_sample(network, target_loss, x[1:2], GUIDED, **options)
    torch.testing.assert_close(together.x[1:2], alone.x, rtol=1e-9, atol=1e-9)
    assert calls == [(k, 10) for k in range(1, 11)]
    still = guided_sample(network, lambda x: 0.0 * x.flatten(1).sum(dim=1), x, GUIDED, **options)
    torch.testing.assert_close(still.x.flatten(1), run(network, scheme("ddim", GUIDED), x).end)


# What is refused.


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda x: x.sum(), r"loss must return one number for each state, \(3,\), got .* of shape \(\)"),
        (lambda x: x.flatten(1), "one number for each state"),
        (lambda x: 3.0, "one number for each state.*float"),
        (lambda x: x.detach().flatten(1).sum(dim=1), "differentiable by the states.*without a graph"),
        (lambda x: torch.ones(3, dtype=x.dtype, requires_grad=True), "without a graph to them"),
        (lambda x: x.flatten(1).sum(dim=1) * torch.tensor([1.0, math.nan, 1.0]), "what loss returns.*row 1"),
        (lambda x: (0.0 * x).flatten(1).square().sum(dim=1).sqrt(), "the gradient of loss must be finite"),
    ],
)
@pytest.mark.parametrize("product", ["vjp", "unrolled"])
def test_wrong_losses_are_refused(prior, loss, words, product):
    network = ideal(prior, VP.linear())
    with pytest.raises(ValueError, match=words):
        guided_sample(network, loss, begin(network, GUIDED), GUIDED, guide_from=2, guide_to=3, product=product)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"network": 3}, TypeError, "network must be an instance of dfmath.integrations.torch.ScoreNetwork"),
        ({"loss": 3}, TypeError, "loss must be a function of states"),
        ({"x": np.zeros((3, 6))}, TypeError, "x must be a float32 or float64 torch tensor"),
        ({"x": torch.zeros(6)}, ValueError, r"\(B, \.\.\.\)"),
        ({"rhos": 3.0}, TypeError, "rhos must be a sequence"),
        ({"rhos": (1.0, 2.0, 3.0), "guide_to": 1}, ValueError, "decrease strictly"),
        ({"rhos": (1e9, 1.0, 0.5, 0.1)}, ValueError, "rhos: "),
        ({"solver": "euler"}, ValueError, "solver must be one of"),
        ({"product": "vjps"}, ValueError, "product must be one of .*unrolled.*did you mean 'vjp'"),
        ({"guide_from": 10}, ValueError, "guide_from must be an index from 0 and below 10"),
        ({"guide_to": -1}, ValueError, "guide_to must be an index"),
        ({"guide_from": 4, "guide_to": 3}, ValueError, "guide_from must not be after guide_to, got 4 and 3"),
        ({"strength": math.inf}, ValueError, "strength must be finite, got inf"),
        ({"strength": "much"}, TypeError, "strength"),
        ({"normalisation": "l2"}, ValueError, "normalisation must be one of rms, correction, none"),
        ({"normalisation": "correction"}, ValueError, "needs a guided network"),
        ({"rollout_steps": 0}, ValueError, "rollout_steps must be a positive integer"),
    ],
)
def test_wrong_guidance_is_refused(prior, change, kind, words):
    network = ideal(prior, VP.linear())
    good = {"network": network, "loss": target_loss, "x": begin(network, GUIDED), "rhos": GUIDED}
    arguments = good | {"guide_from": 1, "guide_to": 2} | change
    with pytest.raises(kind, match=words):
        guided_sample(*[arguments.pop(name) for name in good], **arguments)


@pytest.mark.parametrize(
    ("gradient", "product", "kind", "words"),
    [
        (np.zeros((ROWS, DIM)), "vjp", ValueError, r"gradient must have shape \(3, 1, 2, 3\) or \(3, 6\), got numpy"),
        (torch.zeros(2, DIM), "vjp", ValueError, "gradient must have shape"),
        (torch.zeros(ROWS, DIM), "vjp", ValueError, "torch.float64 on cpu as the trajectory, got torch.float32"),
        (torch.full((ROWS, DIM), math.nan).double(), "vjp", ValueError, "gradient must be finite"),
        (vectors(), "unrolled", ValueError, "product must be one of none, paper, centred, difference, vjp"),
        (vectors(), 3, ValueError, "product must be one of"),
        (vectors(), lambda path, i, v: v * math.nan, ValueError, "the adjoint must be finite"),
        (vectors(), Calibrated(lambda x, t: x), ValueError, r"trace must return one number for each state, \(3,\)"),
        (vectors(), Calibrated(lambda x, t: math.nan * t), ValueError, "what trace returns must be finite"),
    ],
)
def test_wrong_gradients_and_products_are_refused(prior, gradient, product, kind, words):
    with pytest.raises(kind, match=words):
        adjoint(path_of(prior), gradient, product)


def test_covariances_of_other_data_are_refused(prior):
    path = path_of(prior)
    for points in (data().float(), data()[:, :4]):
        with pytest.raises(ValueError, match=r"covariance must be .* of 6 dimensions as the states"):
            adjoint(path, vectors(), Gaussian(DataCovariance.from_batches([points])))


@pytest.mark.parametrize(
    ("batches", "options", "kind", "words"),
    [
        ([], {}, ValueError, "at least two points, got 0"),
        ([torch.zeros(1, 3)], {}, ValueError, "at least two points, got 1"),
        ([np.zeros((3, 3))], {}, TypeError, "batch 0 must be a float32 or float64 torch tensor"),
        ([torch.zeros(3)], {}, ValueError, r"batch 0 must have shape \(n, \.\.\.\)"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], {}, ValueError, "batch 1 must be as the first"),
        ([torch.zeros(2, 3), torch.zeros(2, 3).double()], {}, ValueError, "batch 1 must be as the first"),
        ([torch.full((2, 3), math.nan)], {}, ValueError, "batch 0 must be finite"),
        ([torch.zeros(2, 5000)], {}, ValueError, "up to 4096 dimensions, got 5,000; use 'cosine'"),
        ([torch.zeros(2, 3)], {"components": 4}, ValueError, "components must be at most 3"),
        ([torch.zeros(2, 3)], {"basis": "cosine"}, ValueError, r"batch 0 must have shape \(n, \.\.\., height, width\)"),
        ([torch.zeros(2, 3, 3)], {"basis": "cosine", "components": 2}, ValueError, "option of basis 'principal'"),
        ([torch.zeros(2, 3)], {"basis": "fourier"}, ValueError, "basis must be one of principal, cosine"),
    ],
)
def test_wrong_data_are_refused(batches, options, kind, words):
    with pytest.raises(kind, match=words):
        DataCovariance.from_batches(batches, **options)


def test_runs_refuse_levels_that_the_schedule_does_not_have(prior):
    network = ideal(prior, VP.linear())
    with pytest.raises(ValueError, match="rhos: "):
        run(network, scheme("ddim", (1e9, 1.0)), torch.zeros(2, DIM, dtype=torch.float64))
    with pytest.raises(TypeError, match="scheme must be an instance of"):
        run(network, "ddim", torch.zeros(2, DIM, dtype=torch.float64))
