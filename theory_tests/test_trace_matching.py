"""Trace heads: beside exact traces, in one evaluation with the score, kept in files; wrong ones refused."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from dfmath.integrations import trace_model
from dfmath.integrations.likelihood import network_log_likelihood
from dfmath.integrations.torch import ScoreNetwork
from dfmath.integrations.trace_heads import pooled
from dfmath.integrations.trace_matching import compare_with_hutchinson, load_trace_model, train_trace_model
from dfmath.integrations.trace_model import DataScale, TraceModel
from dfmath.integrations.training import TrainingPlan
from torch import nn

from dfmath import GaussianMixture
from dfmath.schedules import EDM, VP, Discrete

DIM = 6


class Ideal(nn.Module):
    """The ideal network of a prior, with a layer on the way whose output is worth reading; it counts its calls."""

    def __init__(self, prior, schedule):
        super().__init__()
        self.prior, self.schedule, self.calls = prior, schedule, 0
        self.look = nn.Identity()
        self.nothing = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t):
        self.calls += 1
        flat = x.reshape(len(x), -1)
        q = self.prior.diffuse(*self.schedule(t))
        score = q.score(flat)
        self.look(torch.cat([score, flat], dim=1))
        return score.reshape(x.shape) + self.nothing


def isotropic(variance=0.7):
    return GaussianMixture(torch.zeros((1, DIM), dtype=torch.float64), variance)


@pytest.fixture(scope="module")
def mixture():
    """Two clusters whose posterior changes much with the state."""
    rng = np.random.default_rng(0)
    means = torch.from_numpy(2.0 * rng.standard_normal((2, DIM)))
    roots = 0.4 * rng.standard_normal((2, DIM, DIM))
    return GaussianMixture(means, torch.from_numpy(roots @ roots.transpose(0, 2, 1) + 0.01 * np.eye(DIM)))


def network_of(prior, schedule=None, **options):
    schedule = schedule or EDM(0.01, 50.0)
    return ScoreNetwork(Ideal(prior, schedule), schedule, "score", **options)


def untrained(network, form, scale, **options):
    return TraceModel(network, form, scale, event_shape=(DIM,), **{"features": None} | options)


@pytest.mark.parametrize("schedule", [EDM(0.01, 50.0), VP.linear()], ids=["edm", "vp"])
@pytest.mark.parametrize("features", [None, "look"])
def test_known_limits_are_exact_for_isotropic_gaussian_data(schedule, features):
    """There v/(v + rho^2) is the loss itself, whatever the state, before any training [MATH 4.3]."""
    prior = isotropic()
    network = network_of(prior, schedule)
    model = untrained(network, "local-loss", DataScale(0.7, 0.7), features=features, width=2 * DIM if features else 16)
    for t in (0.05, 0.3, 0.9):
        q = prior.diffuse(*schedule(t))
        x = q.sample(5, seed=0)
        noise, trace = model.noise_and_trace(x, t)
        torch.testing.assert_close(trace, q.fisher(x).trace(), rtol=1e-11, atol=0)
        torch.testing.assert_close(noise, network.noise(x, t), rtol=0, atol=0)
        torch.testing.assert_close(model(x, t), trace, rtol=0, atol=0)


def test_the_papers_form_is_its_formula(mixture):
    """With t = M: T = d/sigma^2 - (alpha^2/sigma^4) (d M - |m|^2), written out [MATH 4.1]."""
    schedule = VP.linear()
    model = untrained(network_of(mixture, schedule), "paper", DataScale(1.3, 0.5))
    alpha, sigma = schedule(0.4)
    q = mixture.diffuse(alpha, sigma)
    x = q.sample(5, seed=0)
    mean = (x + sigma**2 * q.score(x)) / alpha
    wanted = DIM / sigma**2 - alpha**2 / sigma**4 * (1.3 * DIM - mean.square().sum(dim=1))
    torch.testing.assert_close(model(x, 0.4), wanted, rtol=1e-11, atol=1e-11)


class TwoClusters(nn.Module):
    """The ideal eps of two clusters of variance v, in two lines; and a layer on the way."""

    def __init__(self, means, variance):
        super().__init__()
        self.register_buffer("means", means)
        self.variance, self.look = variance, nn.Identity()

    def forward(self, z, rho):
        spread = (self.variance + rho**2)[:, None]
        share = torch.softmax(-0.5 * torch.cdist(z, self.means).square() / spread, dim=1)
        noise = rho[:, None] * (z - share @ self.means) / spread
        self.look(torch.cat([share, noise], dim=1))
        return noise


@pytest.mark.parametrize("form", ["local-loss", "paper"])
@pytest.mark.parametrize("features", [None, "look"])
def test_training_finds_the_trace(form, features):
    """A trained head is several times nearer to the exact trace than its limits are."""
    means = 1.5 * torch.randn((2, DIM), generator=torch.Generator().manual_seed(0))
    network = ScoreNetwork(TwoClusters(means, 0.3), EDM(0.01, 50.0))
    prior = GaussianMixture(means.double(), 0.3)
    data = prior.sample(20_000, seed=1).float()
    plan = TrainingPlan(steps=300, rate=5e-3, warmup=20, averaging=0.98)
    trained = train_trace_model(network, data, plan, form, rho=(0.2, 4.0), features=features).model
    before = untrained(network, form, trained.scale, features=features, width=trained.width)
    better = []
    for rho in (0.5, 1.0, 2.0) if form == "local-loss" else (2.0, 3.0):
        q = prior.diffuse(1.0, rho)
        x = q.sample(400, seed=2)
        off = [(model(x.float(), rho) - q.fisher(x).trace()).abs().median().item() for model in (trained, before)]
        better.append(off[0] / off[1])
    assert max(better) < 0.4, better
    assert trained.module.training and network.call.owner.training


def test_data_may_come_from_a_loader_or_a_prior(mixture):
    plan, network = TrainingPlan(steps=3), network_of(mixture)
    data = mixture.sample(64, seed=0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data, torch.arange(64)), batch_size=16)
    for source in (loader, mixture, data):
        found = train_trace_model(network, source, plan, rho=(0.1, 3.0), batch=16)
        assert found.training.steps == 3 and found.model.event_shape == (DIM,)


def test_one_evaluation_gives_both(mixture):
    network = network_of(mixture)
    model = untrained(network, "local-loss", DataScale(1.0, 1.0), features="look", width=2 * DIM)
    x = mixture.sample(4, seed=0)
    module = network.call.owner
    before = module.calls
    model.noise_and_trace(x, 0.5)
    assert module.calls == before + 1
    assert not module.look._forward_hooks, "the hook is still there"
    flow = network_log_likelihood(network, x, 0.1, 20.0, trace=model, steps=5)
    assert module.calls == before + 1 + 20 and (flow.evaluations == 20).all()


def test_likelihood_with_a_head_is_exact_where_the_head_is():
    prior = isotropic()
    network = network_of(prior)
    q = prior.diffuse(1.0, 0.05)
    x = q.sample(5, seed=0)
    model = untrained(network, "local-loss", DataScale(0.7, 0.7))
    end = prior.diffuse(1.0, 30.0).log_density
    found = network_log_likelihood(network, x, 0.05, 30.0, trace=model, terminal=end, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.log_density, q.log_density(x), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="TraceModel of this network"):
        network_log_likelihood(network_of(prior), x, 0.05, 30.0, trace=model)


def test_fixed_grids_converge_with_order_four(mixture):
    network, x = network_of(mixture), mixture.diffuse(1.0, 0.3).sample(6, seed=0)
    exact, end = mixture.diffuse(1.0, 0.3).log_density(x), mixture.diffuse(1.0, 20.0).log_density
    off = []
    for steps in (20, 40):
        found = network_log_likelihood(network, x, 0.3, 20.0, terminal=end, steps=steps)
        assert (found.evaluations == 4 * steps).all() and found.error_estimate.isnan().all()
        off.append((found.log_density - exact).abs().median().item())
    assert 8.0 < off[0] / off[1] < 40.0, off


@pytest.mark.parametrize("schedule", [EDM(0.01, 50.0), VP.linear()], ids=["edm", "vp"])
def test_losses_alone_give_the_likelihood(mixture, schedule):
    """The I-MMSE identity beside the closed form; pairs of noises at rows are those of the rows."""
    start, end = (0.2, 20.0) if isinstance(schedule, EDM) else (0.1, 0.999)
    q = mixture.diffuse(*schedule(start))
    x, options = q.sample(6, seed=3), {"trace": "i-mmse", "terminal": mixture.diffuse(*schedule(end)).log_density}
    network = network_of(mixture, schedule)
    found = network_log_likelihood(network, x, start, end, probes=100, seed=0, **options)
    off = (found.log_density - q.log_density(x)).abs()
    assert (off < 5.0 * found.standard_error).all() and (found.standard_error < 0.5).all(), (off, found)
    some = network_log_likelihood(network, x[:2], start, end, probes=100, seed=0, **options)
    torch.testing.assert_close(some.log_density, found.log_density[:2], rtol=1e-9, atol=1e-9)
    assert (found.evaluations == 8000).all()
    with pytest.raises(ValueError, match="end must be a time of more noise"):
        network_log_likelihood(network, x, end, start, **options)
    with pytest.raises(ValueError, match="steps are of the flow"):
        network_log_likelihood(network, x, start, end, steps=5, **options)


def test_heads_beside_hutchinson():
    """An exact head differs from stochastic traces by their noise alone, one that is off by more."""
    prior = isotropic()
    data, network = prior.sample(300, seed=0), network_of(prior)
    right = untrained(network, "local-loss", DataScale(0.7, 0.7))
    found = compare_with_hutchinson(right, data, (0.1, 1.0), seed=0)
    assert all(abs(d) <= 5.0 * e + 1e-6 for d, e in zip(found.difference, found.standard_error, strict=True))
    wrong = untrained(network, "local-loss", DataScale(0.7, 0.2))
    off = compare_with_hutchinson(wrong, data, (2.0,), seed=0)
    assert abs(off.difference[0] - (0.7 / 4.7 - 0.2 / 4.2)) < 1e-4 and off.rho == (2.0,)
    assert abs(off.mean[0] - (1.0 - 0.2 / 4.2)) < 1e-4


def test_features_of_any_shape_are_one_vector_for_each_state():
    maps, tokens = torch.rand(2, 3, 4, 5), torch.rand(2, 7, 3)
    torch.testing.assert_close(pooled(maps, 2), maps.mean(dim=(2, 3)))
    torch.testing.assert_close(pooled(tokens, 2), tokens.mean(dim=1))
    for wrong in ((maps,), torch.rand(2), torch.rand(3, 4)):
        with pytest.raises(ValueError, match="row for each of 2 states"):
            pooled(wrong, 2)


def test_images_have_convolutions_of_their_own():
    """The noise of white images: their head's limit is exact, and training keeps shapes."""
    schedule = EDM(0.01, 50.0)
    network = ScoreNetwork(lambda x, t: -x / (0.7 + t**2).reshape(-1, 1, 1, 1), schedule, "score")
    data = math.sqrt(0.7) * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = train_trace_model(network, data, TrainingPlan(steps=2), rho=(0.1, 3.0), batch=8, width=16)
    assert found.model.module["own"].width == 16
    trace = found.model(data[:3], 0.5)
    torch.testing.assert_close(trace, torch.full((3,), 192 / (0.7 + 0.25)), rtol=0.1, atol=0)


def test_training_can_be_watched_beside_hutchinson():
    """The difference in standard errors falls while a head learns, and is what an independent sum says it is."""
    means = 1.5 * torch.randn((2, DIM), generator=torch.Generator().manual_seed(0))
    network = ScoreNetwork(TwoClusters(means, 0.3), EDM(0.01, 50.0), derivative="vjp")
    data = GaussianMixture(means.double(), 0.3).sample(2000, seed=1).float()
    plan = TrainingPlan(steps=200, rate=5e-3, warmup=20, averaging=0.9, every=100)
    found = train_trace_model(network, data, plan, rho=(0.2, 4.0), validation=data[:300])
    steps, values = zip(*found.training.validations, strict=True)
    before = untrained(network, "local-loss", DataScale.of(lambda step, generator: data))
    times = tuple(0.2 * 20.0**share for share in (0.125, 0.375, 0.625, 0.875))

    def in_errors(model):
        seen = compare_with_hutchinson(model, data[:300], times, seed=0)
        return np.sqrt(np.mean((np.array(seen.difference) / np.array(seen.standard_error)) ** 2))

    assert steps == (100, 200) and values[1] < 0.5 * in_errors(before)
    assert values[1] == pytest.approx(in_errors(found.model), rel=1e-3)


def broken_off(model, network, folder):
    """A file of the head, written before the network changed."""
    with torch.no_grad():
        network.call.owner.nothing -= 1.0
        model.save(folder / "before.safetensors")
        network.call.owner.nothing += 1.0
    return folder / "before.safetensors"


def test_files_bring_the_same_head_back(mixture, tmp_path):
    network = network_of(mixture)
    data = mixture.sample(100, seed=0)
    model = train_trace_model(
        network, data, TrainingPlan(steps=5, rate=0.01), rho=(0.1, 3.0), features="look", batch=16
    ).model
    path = tmp_path / "head.safetensors"
    model.save(path)
    again = load_trace_model(path, network)
    torch.testing.assert_close(again(data, 0.5), model(data, 0.5), rtol=0, atol=0)
    assert again.config == model.config and repr(again) == repr(model)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"head\.safetensors"):
        load_trace_model(path, network)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="pickle"):
        load_trace_model(path, network)
    other = tmp_path / "training.safetensors"
    train_trace_model(network, data, TrainingPlan(steps=2), rho=(0.1, 3.0), batch=16, checkpoint=other)
    with pytest.raises(ValueError, match="must hold a trace model"):
        load_trace_model(other, network)
    with torch.no_grad():
        network.call.owner.nothing += 1.0
    with pytest.raises(ValueError, match="of other weights"):
        load_trace_model(broken_off(model, network, tmp_path), network)
    with pytest.raises(ValueError, match="must be of this training"):
        train_trace_model(network, data, TrainingPlan(steps=2), rho=(0.1, 3.0), batch=16, checkpoint=other)
    model.width, broken = 3, tmp_path / "broken.safetensors"
    model.save(broken)
    with pytest.raises(ValueError, match=r"head\.layers"):
        load_trace_model(broken, network)


def test_bad_input_is_refused(mixture):
    network, plan, data = network_of(mixture), TrainingPlan(steps=1), mixture.sample(8, seed=0)
    guided = ScoreNetwork(lambda x, t, c=0: x, EDM(), unconditional={"c": 1}, guidance=2.0)
    options = {"rho": (0.1, 3.0), "batch": 4}
    for change, words in (
        ({"network": guided}, "guided"),
        ({"form": "local_loss"}, "did you mean 'local-loss'"),
        ({"features": "loook"}, "features must name a submodule, such as look"),
        ({"rho": (3.0, 0.1)}, "ascending"),
        ({"rho": (0.1, 1e9)}, "rho"),
        ({"batch": 0}, "size|batch"),
        ({"hidden": 0}, "hidden"),
    ):
        given = {"network": network, "data": data, "plan": plan} | options | change
        with pytest.raises(ValueError, match=words):
            train_trace_model(**given)
    with pytest.raises(TypeError, match="wraps=module"):
        train_trace_model(ScoreNetwork(lambda x, t: x, EDM()), data, plan, features="look", **options)
    with pytest.raises(TypeError, match="rho must be the lowest"):
        train_trace_model(network, data, plan, rho=0.1)
    idle = Ideal(mixture, EDM())
    idle.idle = nn.Identity()
    with pytest.raises(ValueError, match="which was not"):
        train_trace_model(ScoreNetwork(idle, EDM(), "score"), data, plan, features="idle", **options)
    with pytest.raises(ValueError, match="at least two"):
        compare_with_hutchinson(untrained(network, "paper", DataScale(1.0, 1.0)), data[:1], (0.5,), 0)


def test_networks_of_whole_times_have_heads():
    """Levels of the training are those of the nearest whole times."""
    schedule, seen = Discrete(np.linspace(0.999, 0.01, 50)), []

    def module(x, t):
        seen.append(t)
        return 0.1 * x

    network = ScoreNetwork(module, schedule, time="discrete")
    data = isotropic().sample(64, seed=0)
    found = train_trace_model(network, data, TrainingPlan(steps=2, every=1), rho=(0.1, 3.0), batch=16, validation=data)
    assert found.training.steps == 2 and all(t.dtype == torch.int64 for t in seen)


def test_heads_are_asked_for_what_they_were_trained_for():
    """Levels and rows; and they need no derivative of the network, not even for the error estimate."""
    network = ScoreNetwork(TwoClusters(torch.zeros(1, DIM), 0.7), EDM(0.01, 50.0))  # which has no forward mode
    data = isotropic().sample(64, seed=0).float()
    model = train_trace_model(network, data, TrainingPlan(steps=1, rate=1e-9), rho=(0.1, 30.0), batch=16).model
    found = network_log_likelihood(network, data[:4], 0.1, 30.0, trace=model)
    exact = isotropic().diffuse(1.0, 0.1).log_density(data[:4].double())
    torch.testing.assert_close(found.log_density.double(), exact, rtol=0, atol=0.2)
    assert (found.error_estimate < 0.1).all()
    for start, end in ((0.05, 30.0), (0.1, 40.0)):
        with pytest.raises(ValueError, match=r"rho must lie in \[0.1, 30\]"):
            network_log_likelihood(network, data[:4], start, end, trace=model)
    rows = ScoreNetwork(lambda x, t, y: x, EDM(), conditioning={"y": torch.arange(16)})
    with pytest.raises(ValueError, match="conditioning 'y' must be shared"):
        train_trace_model(rows, data, TrainingPlan(steps=1), rho=(0.1, 3.0), batch=16)


def test_nothing_is_trained_but_the_head(mixture):
    network = network_of(mixture)
    module = network.call.owner
    module.nothing.requires_grad_(True)
    train_trace_model(network, mixture.sample(64, seed=0), TrainingPlan(steps=3), rho=(0.1, 3.0), batch=16)
    assert module.nothing.grad is None and module.nothing.item() == 0.0 and module.nothing.requires_grad


def test_scale_is_that_of_the_data(mixture):
    data = mixture.sample(5000, seed=0)
    wanted = DataScale.of(lambda step, generator: data)
    assert wanted.second_moment == pytest.approx(data.square().mean().item(), rel=1e-5)
    assert wanted.variance == pytest.approx(data.var(dim=0, correction=0).mean().item(), rel=1e-5)
    far = DataScale.of(lambda step, generator: data[100 * step : 100 * step + 100] + 1e8)
    assert far.variance == pytest.approx(data[:1600].var(dim=0, correction=0).mean().item(), rel=1e-4)
    assert trace_model.FORMS == ("local-loss", "paper")
