"""torch score networks: beside exact marginals, whatever they predict; left as found; wrong ones refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dfmath.integrations import network_fisher
from dfmath.integrations.calibration import calibrate
from dfmath.integrations.torch import ScoreNetwork, symmetry_defect
from torch import nn

from dfmath import GaussianMixture
from dfmath.approximations import hutchinson_trace
from dfmath.predictions import convert
from dfmath.schedules import EDM, VE, VP, Discrete, FlowMatching, SubVP

DIM, SHAPE = 6, (2, 3, 1)
SCHEDULES = [VP.linear(), SubVP.linear(), VE(), EDM(), FlowMatching(), Discrete(np.linspace(0.999, 0.01, 50))]
TIMES = {"VP": 0.4, "VPLinear": 0.4, "SubVP": 0.4, "VE": 0.3, "EDM": 0.7, "FlowMatching": 0.5, "Discrete": 20.0}


@pytest.fixture(scope="module")
def prior():
    rng = np.random.default_rng(0)
    roots = 0.3 * rng.standard_normal((3, DIM, DIM))
    means = torch.from_numpy(rng.standard_normal((3, DIM)))
    return GaussianMixture(means, torch.from_numpy(roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(DIM)))


class Ideal(nn.Module):
    """The ideal network of a prior, which predicts what it is told to; its parameter does nothing."""

    def __init__(self, prior, schedule, prediction):
        super().__init__()
        self.prior, self.schedule, self.prediction = prior, schedule, prediction
        self.nothing = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t):
        alpha, sigma = self.schedule(t.to(torch.float64))
        flat = x.reshape(len(x), -1)
        score = self.prior.diffuse(alpha, sigma).score(flat)
        return (convert(score, flat, alpha, sigma, "score", self.prediction) + self.nothing).reshape(x.shape)


class Denoiser(nn.Module):
    """The ideal D(z; rho)."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, z, rho):
        flat = z.reshape(len(z), -1)
        return self.prior.diffuse(torch.ones_like(rho), rho).posterior_mean(flat).reshape(z.shape)


class Raw(nn.Module):
    """What EDM's preconditioning makes the ideal denoiser of."""

    def __init__(self, prior, sigma_data):
        super().__init__()
        self.denoiser, self.sigma_data = Denoiser(prior), sigma_data

    def forward(self, scaled, noise):
        rho = torch.exp(4.0 * noise)
        size = torch.sqrt(rho**2 + self.sigma_data**2).reshape(-1, 1)
        z = size * scaled
        skip, out = (self.sigma_data / size) ** 2, self.sigma_data * rho.reshape(-1, 1) / size
        return (self.denoiser(z, rho) - skip * z) / out


def states(prior, schedule, t, count=4):
    return prior.diffuse(*schedule(t)).sample(count, seed=1)


def compare(network, prior, t, x):
    """Beside the closed forms, in every method."""
    alpha, sigma = network.schedule(t)
    truth, flat = prior.diffuse(alpha, sigma), x.reshape(len(x), -1)
    torch.testing.assert_close(network.score(x, t), truth.score(flat).reshape(x.shape), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(network.noise(x, t), -sigma * truth.score(flat).reshape(x.shape), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        network.posterior_mean(x, t), truth.posterior_mean(flat).reshape(x.shape), rtol=1e-9, atol=1e-9
    )
    half = 0.5 * network.schedule.diffusion_squared(t)
    drift = network.schedule.drift(t) * x - half * truth.score(flat).reshape(x.shape)
    torch.testing.assert_close(network.velocity(x, t), drift, rtol=1e-9, atol=1e-9)
    found, wanted = network.at(t).fisher(x), truth.fisher(flat)
    v = torch.from_numpy(np.random.default_rng(2).standard_normal((len(x), DIM, 3)))
    for name in ("trace", "diagonal", "to_dense", "eigvalsh", "logdet"):
        torch.testing.assert_close(
            getattr(found, name)(), getattr(wanted, name)(), rtol=1e-7, atol=1e-8, equal_nan=True
        )
    torch.testing.assert_close(found @ v, wanted @ v, rtol=1e-7, atol=1e-8)
    score, product = found.score_and_products(v)
    torch.testing.assert_close(score, truth.score(flat), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(product, wanted @ v, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.matvec(v[:, :, 0]), wanted.matvec(v[:, :, 0]), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.row(1).trace(), wanted.trace()[1:2], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("prediction", ["eps", "score", "x0", "v", "flow"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_every_prediction_is_the_exact_marginal(prior, schedule, prediction):
    t = TIMES[type(schedule).__name__]
    time = "discrete" if isinstance(schedule, Discrete) else "continuous"
    network = ScoreNetwork(Ideal(prior, schedule, prediction), schedule, prediction, time=time)
    compare(network, prior, t, states(prior, schedule, t))


@pytest.mark.parametrize("derivative", ["jvp", "vjp", "double-backward"])
@pytest.mark.parametrize("at_once", [1, 2**18])
def test_every_derivative_is_the_exact_fisher(prior, derivative, at_once, monkeypatch):
    """Images come in and go out as images; columns are taken one by one or together."""
    monkeypatch.setattr(network_fisher, "AT_ONCE", at_once)
    schedule = VP.linear()
    x = states(prior, schedule, 0.3).reshape(-1, *SHAPE)
    network = ScoreNetwork(Ideal(prior, schedule, "v"), schedule, "v", derivative=derivative)
    compare(network, prior, 0.3, x)


@pytest.mark.parametrize("schedule", [VP.linear(), EDM(), FlowMatching()], ids=lambda s: type(s).__name__)
def test_denoisers_see_canonical_states(prior, schedule):
    t = TIMES[type(schedule).__name__]
    x = states(prior, schedule, t)
    compare(ScoreNetwork(Denoiser(prior), schedule, "denoiser"), prior, t, x)
    compare(ScoreNetwork(Raw(prior, 0.7), schedule, "edm", sigma_data=0.7), prior, t, x)


def test_flattened_states_and_times_of_their_own(prior):
    """A network of images takes flattened states where it is told their shape, and a time for each."""
    schedule, t = VP.linear(), torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)

    def images(x, time):
        assert x.shape[1:] == SHAPE
        return Ideal(prior, schedule, "eps")(x, time)

    network, x = ScoreNetwork(images, schedule, event_shape=SHAPE), torch.randn(3, DIM, dtype=torch.float64)
    truth = prior.diffuse(*schedule(t))
    torch.testing.assert_close(network.score(x, t), truth.score(x))
    torch.testing.assert_close(network.fisher(x, t).trace(), truth.fisher(x).trace())
    assert network.score(x.reshape(3, *SHAPE), t).shape == (3, *SHAPE)


def test_what_discrete_networks_and_functions_of_time_are_told(prior):
    seen = []

    def module(x, time):
        seen.append(time)
        return x

    x = torch.randn(2, DIM)
    ScoreNetwork(module, SCHEDULES[-1], time="discrete").score(x, 7)
    ScoreNetwork(module, VP.linear(), time=lambda t: 999.0 * t).score(x, 0.5)
    ScoreNetwork(module, VP.linear()).score(x, torch.tensor([0.25, 0.5]))
    assert seen[0].dtype == torch.int64 and seen[0].tolist() == [7, 7]
    assert seen[1].tolist() == [499.5, 499.5] and seen[2].tolist() == [0.25, 0.5]


def test_guidance_and_conditioning_belong_to_rows():
    """Predictions are u + w (c - u), and products know which row a condition belongs to."""
    x, t = torch.randn(3, 4, dtype=torch.float64), 0.5
    label, none = torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3)
    module = lambda x, t, label, scale: scale * label[:, None].to(x) * x**2 + x  # noqa: E731
    network = ScoreNetwork(
        module,
        VP.linear(),
        conditioning={"label": label, "scale": 0.5},
        unconditional={"label": none},
        guidance=3.0,
    )
    assert network.guided
    torch.testing.assert_close(network.noise(x, t), x + 1.5 * label[:, None] * x**2)
    slope = (1.0 + 3.0 * label[:, None] * x) / network.schedule(t)[1]
    torch.testing.assert_close(network.fisher(x, t).diagonal(), slope)
    torch.testing.assert_close(network.fisher(x, t).row(2).diagonal(), slope[2:])


def test_everything_is_left_as_it_was_found():
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 4)))
    net[2].eval()
    net[0].bias.requires_grad_(False)
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    network = ScoreNetwork(lambda x, t: net(x), VP.linear(), wraps=net)
    direct = ScoreNetwork(_WithTime(net), VP.linear())
    x, before = torch.randn(5, 4), torch.get_rng_state()
    for found in (direct, network):
        results = [found.score(x, 0.5), found.fisher(x, 0.5).trace(), found.fisher(x, 0.5, "vjp") @ x[:, :, None]]
        assert not any(r.requires_grad for r in results)
        with torch.no_grad():
            wanted = net[2][1](net[0](x))
        torch.testing.assert_close(found.noise(x, 0.5), wanted, msg="dropout was on")
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == flags and all(p.grad is None for p in net.parameters())


class _WithTime(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x)


def test_modules_may_draw_random_numbers():
    network, before = ScoreNetwork(lambda x, t: torch.randn_like(x), VP.linear()), torch.get_rng_state()
    network.score(torch.zeros(3, 2), 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_are_put_back_after_errors():
    class Broken(nn.Module):
        def forward(self, x, t):
            raise ZeroDivisionError

    module = Broken()
    with pytest.raises(ZeroDivisionError):
        ScoreNetwork(module, VP.linear()).score(torch.zeros(1, 2), 0.5)
    assert module.training


def test_scores_differentiate_where_states_require_grad(prior):
    schedule = VP.linear()
    network = ScoreNetwork(Ideal(prior, schedule, "x0"), schedule, "x0")
    x = states(prior, schedule, 0.3).requires_grad_()
    v = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((network.score(x, 0.3) * v).sum(), x)
    torch.testing.assert_close(gradient, -prior.diffuse(*schedule(0.3)).fisher(x.detach()).matvec(v))


def test_half_precision_weights_and_single_precision_conversions():
    """Results are float32, and only the module itself is rounded to its dtype."""
    net = nn.Linear(8, 8).to(torch.bfloat16)
    wide = nn.Linear(8, 8).to(torch.float64)
    wide.load_state_dict(net.state_dict())
    x, t = torch.randn(16, 8), 0.01
    found = ScoreNetwork(_WithTime(net), VP.linear(), "x0")
    wanted = ScoreNetwork(_WithTime(wide), VP.linear(), "x0")
    assert found.score(x, t).dtype == torch.float32
    alpha, sigma = VP.linear()(t)
    error = found.score(x, t).double() - wanted.score(x.double(), t)
    module = (found.posterior_mean(x, t).double() - wanted.posterior_mean(x.double(), t)).abs().max()
    assert error.abs().max() <= 1.01 * alpha / sigma**2 * module + 1e-3
    assert found.fisher(x, t).trace().dtype == torch.float32


def test_attention_without_forward_mode_names_the_remedy():
    class Attention(nn.Module):
        def forward(self, x, t):
            q = x.reshape(len(x), 1, 4, 16)
            return nn.functional.scaled_dot_product_attention(q, q, q).reshape(x.shape)

    network, x = ScoreNetwork(Attention(), VP.linear()), torch.randn(2, 64)
    reverse = network.fisher(x, 0.5, "vjp").to_dense()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        forward = network.fisher(x, 0.5, "jvp").to_dense()
    torch.testing.assert_close(forward, reverse.mT, rtol=1e-4, atol=1e-4)
    try:
        network.fisher(x, 0.5, "jvp").trace()
    except RuntimeError as error:
        assert "vjp" in str(error) and "sdpa_kernel" in str(error)


def test_symmetry_defect():
    """Of x -> M x it is |M - M^T|/(2 |M|); of a gradient, zero."""
    matrix = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(2, 5, dtype=torch.float64)
    wanted = (matrix - matrix.T).norm() / (2.0 * matrix.norm())
    for derivative in ("jvp", "vjp", "double-backward"):
        network = ScoreNetwork(lambda x, t: x @ matrix.T, VP.linear(), derivative=derivative)
        found = symmetry_defect(network.fisher(x, 0.5), probes=4000, seed=0)
        torch.testing.assert_close(found, wanted.expand(2), rtol=0.05, atol=0.0)
        torch.testing.assert_close(
            network.fisher(x, 0.5).eigvalsh()[0],
            torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)) / network.schedule(0.5)[1],
        )
    network = ScoreNetwork(lambda x, t: x @ (matrix + matrix.T), VP.linear())
    assert symmetry_defect(network.fisher(x, 0.5), probes=3, seed=0).max() < 1e-14


def test_stochastic_traces_take_networks(prior):
    schedule = VP.linear()
    network = ScoreNetwork(Ideal(prior, schedule, "eps"), schedule)
    x = states(prior, schedule, 0.5)
    fisher = network.fisher(x, 0.5)
    found = hutchinson_trace(fisher, x, probes=400, seed=0)
    assert ((found.value - fisher.trace()).abs() < 5.0 * found.standard_error).all()


def test_calibration_of_ideal_networks_and_of_wrong_ones(prior):
    schedule, times = VP.linear(), (0.8, 0.1, 0.3, 0.5)
    data = prior.sample(4000, seed=0)
    found = calibrate(ScoreNetwork(Ideal(prior, schedule, "eps"), schedule), data, times, seed=0)
    assert found.t == tuple(sorted(times)) and math.isnan(found.martingale[0])
    for value, error in zip(found.martingale[1:], found.martingale_error[1:], strict=True):
        assert abs(value) < 5.0 * error < 0.5
    for value, noise in zip(found.mean_score, found.mean_score_noise, strict=True):
        assert value < 3.0 * noise
    for i, t in enumerate(found.t):
        sigma, q = schedule(t)[1], prior.diffuse(*schedule(t))
        wanted = 1.0 - (sigma**2 * q.fisher(q.sample(2000, seed=3)).trace()).mean().item() / DIM
        assert abs(found.loss[i] - wanted) < 5.0 * found.loss_error[i] + 0.02
    louder = calibrate(ScoreNetwork(lambda x, t: 1.2 * Ideal(prior, schedule, "eps")(x, t), schedule), data, times, 0)
    assert all(loss > ideal for loss, ideal in zip(louder.loss, found.loss, strict=True))
    shifted = calibrate(ScoreNetwork(lambda x, t: 0.3 + Ideal(prior, schedule, "eps")(x, t), schedule), data, times, 0)
    assert min(m / n for m, n in zip(shifted.mean_score, shifted.mean_score_noise, strict=True)) > 5.0
    late = calibrate(
        ScoreNetwork(lambda x, t: (1.0 + t[:, None]) * Ideal(prior, schedule, "eps")(x, t), schedule), data, times, 0
    )
    assert min(abs(m) / e for m, e in zip(late.martingale[1:], late.martingale_error[1:], strict=True)) > 5.0


class _Output:
    sample = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("module", "kind", "words"),
    [
        (lambda x, t: (x, x), TypeError, r"tuple.*module\(x, t, \*\*kw\)\[0\], and wraps"),
        (lambda x, t: _Output(), TypeError, r"_Output.*\.sample"),
        (lambda x, t: None, TypeError, "NoneType"),
        (lambda x, t: x[:, :3], ValueError, r"shape \(2, 4\), got shape \(2, 3\)"),
        (lambda x, t: torch.cat([x, x], dim=1), ValueError, "variance"),
        (lambda x, t: x.long(), TypeError, "int64"),
        (lambda x, t: x * torch.tensor([[1.0], [math.nan]]), ValueError, "output.*row 1"),
    ],
)
def test_wrong_modules_are_refused(module, kind, words):
    with pytest.raises(kind, match=words):
        ScoreNetwork(module, VP.linear()).score(torch.zeros(2, 4), 0.5)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"module": 3}, TypeError, "module"),
        ({"schedule": "vp"}, TypeError, "schedule"),
        ({"prediction": "epsilon"}, ValueError, "did you mean 'eps'"),
        ({"time": "whole"}, ValueError, "time"),
        ({"time": "discrete"}, ValueError, "Discrete"),
        ({"time": "continuous", "prediction": "edm"}, ValueError, "noise level"),
        ({"guidance": 2.0}, ValueError, "unconditional"),
        ({"guidance": math.inf, "unconditional": {}}, ValueError, "finite"),
        ({"derivative": "jacobian"}, ValueError, "derivative"),
        ({"sigma_data": 0.0}, ValueError, "sigma_data"),
        ({"wraps": len}, TypeError, "wraps"),
        ({"event_shape": (0, 3)}, ValueError, "event_shape"),
    ],
)
def test_wrong_options_are_refused(options, kind, words):
    given = {"module": lambda x, t: x, "schedule": VP.linear()} | options
    with pytest.raises(kind, match=words):
        ScoreNetwork(given.pop("module"), given.pop("schedule"), **given)


@pytest.mark.parametrize(
    ("x", "t", "kind", "words"),
    [
        (np.zeros((2, 4)), 0.5, TypeError, "torch tensor"),
        (torch.zeros(2, 4).half(), 0.5, TypeError, "float32 or float64"),
        (torch.zeros(4), 0.5, ValueError, r"\(B, \.\.\.\)"),
        (torch.full((2, 4), math.nan), 0.5, ValueError, "x must be finite"),
        (torch.zeros(2, 4), 1.5, ValueError, "t must lie in"),
        (torch.zeros(2, 4), torch.zeros(3), ValueError, r"shape \(2,\)"),
        (torch.zeros(2, 4, device="meta"), 0.5, ValueError, "device"),
    ],
)
def test_wrong_states_and_times_are_refused(x, t, kind, words):
    network = ScoreNetwork(_WithTime(nn.Linear(4, 4)), VP.linear())
    with pytest.raises(kind, match=words):
        network.score(x, t)


def test_discrete_networks_take_whole_times_of_their_own_table():
    network = ScoreNetwork(lambda x, t: x, SCHEDULES[-1], time="discrete")
    with pytest.raises(ValueError, match="whole"):
        network.score(torch.zeros(2, 4), 3.5)
    with pytest.raises(ValueError, match="t must lie in"):
        network.score(torch.zeros(2, 4), 50)


def test_exact_traces_of_huge_states_are_refused_with_the_remedy():
    network = ScoreNetwork(lambda x, t: x, VP.linear())
    with pytest.raises(ValueError, match=r"1,000,000 dimensions.*hutchinson_trace"):
        network.fisher(torch.zeros(1, 10**6), 0.5).trace()


def test_guided_networks_are_not_calibrated():
    network = ScoreNetwork(lambda x, t, c=0: x, VP.linear(), unconditional={"c": 1}, guidance=2.0)
    with pytest.raises(ValueError, match="guided"):
        calibrate(network, torch.zeros(3, 2), [0.5], seed=0)
