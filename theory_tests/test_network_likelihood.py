"""Likelihoods under networks, beside the exact log density of the prior that the network is ideal for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dfmath.integrations.images import dequantise
from dfmath.integrations.likelihood import NetworkLikelihood, network_log_likelihood
from dfmath.integrations.torch import ScoreNetwork

from dfmath import GaussianMixture
from dfmath.schedules import EDM, VP, Discrete, FlowMatching

ENDS = {"VPLinear": (0.05, 1.0), "EDM": (0.1, 60.0), "FlowMatching": (0.05, 0.995)}


@pytest.fixture(scope="module")
def prior():
    rng = np.random.default_rng(0)
    roots = 0.3 * rng.standard_normal((3, 4, 4))
    means = torch.from_numpy(rng.standard_normal((3, 4)))
    return GaussianMixture(means, torch.from_numpy(roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(4)))


def ideal(prior, schedule, **options):
    def module(x, t):
        flat = x.reshape(len(x), -1)
        return prior.diffuse(*schedule(t)).score(flat).reshape(x.shape)

    return ScoreNetwork(module, schedule, "score", **options)


def exact_end(prior, schedule, t):
    return lambda x: prior.diffuse(*schedule(t)).log_density(x.reshape(len(x), -1))


@pytest.mark.parametrize("schedule", [VP.linear(), EDM(), FlowMatching()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("derivative", ["jvp", "vjp"])
def test_ideal_networks_have_the_exact_likelihood(prior, schedule, derivative):
    start, end = ENDS.get(type(schedule).__name__, (0.05, 1.0))
    q = prior.diffuse(*schedule(start))
    x = q.sample(5, seed=0)
    network = ideal(prior, schedule, derivative=derivative)
    found = network_log_likelihood(
        network, x.reshape(5, 2, 2), start, end, rtol=1e-8, atol=1e-9, terminal=exact_end(prior, schedule, end)
    )
    torch.testing.assert_close(found.log_density, q.log_density(x), rtol=0, atol=1e-6)
    assert (found.standard_error == 0).all() and (found.evaluations > 0).all() and (found.error_estimate < 1e-2).all()


def test_backwards_is_the_same_change(prior):
    """From high noise to low one, as samplers go, with the low level's density as the terminal one."""
    schedule = VP.linear()
    x = prior.diffuse(*schedule(0.9)).sample(3, seed=1)
    end = exact_end(prior, schedule, 0.1)
    found = network_log_likelihood(ideal(prior, schedule), x, 0.9, 0.1, rtol=1e-8, atol=1e-9, terminal=end)
    torch.testing.assert_close(found.log_density, prior.diffuse(*schedule(0.9)).log_density(x), rtol=0, atol=1e-6)


def test_hutchinson_is_unbiased_and_knows_its_error(prior):
    schedule = VP.linear()
    q = prior.diffuse(*schedule(0.05))
    x, end = q.sample(4, seed=0), exact_end(prior, schedule, 1.0)
    options = {"trace": "hutchinson", "rtol": 1e-4, "atol": 1e-5, "terminal": end}  # far below the estimate's own error
    found = network_log_likelihood(ideal(prior, schedule), x, 0.05, 1.0, probes=300, seed=0, **options)
    off = (found.log_density - q.log_density(x)).abs()
    assert (off < 5.0 * found.standard_error).all() and (found.standard_error < 0.3).all()
    again = network_log_likelihood(ideal(prior, schedule), x, 0.05, 1.0, probes=300, seed=0, **options)
    other = network_log_likelihood(ideal(prior, schedule), x, 0.05, 1.0, probes=300, seed=1, **options)
    assert torch.equal(found.log_density, again.log_density) and not torch.equal(found.log_density, other.log_density)
    some = network_log_likelihood(ideal(prior, schedule), x[:2], 0.05, 1.0, probes=300, seed=0, **options)
    torch.testing.assert_close(some.log_density, found.log_density[:2], rtol=1e-9, atol=1e-9)  # probes stay with rows
    single = network_log_likelihood(ideal(prior, schedule), x, 0.05, 1.0, **options)
    assert single.standard_error.isnan().all()


def test_traces_of_ones_own(prior):
    schedule = VP.linear()
    x = prior.diffuse(*schedule(0.1)).sample(3, seed=2)

    def trace(x, t):
        return prior.diffuse(*schedule(t)).fisher(x).trace()

    end = exact_end(prior, schedule, 1.0)
    options = {"rtol": 1e-8, "atol": 1e-9, "terminal": end}
    found = network_log_likelihood(ideal(prior, schedule), x, 0.1, 1.0, trace=trace, **options)
    torch.testing.assert_close(found.log_density, prior.diffuse(*schedule(0.1)).log_density(x), rtol=0, atol=1e-6)


def test_traces_with_parameters_leave_no_graph(prior):
    """And what they return is looked at."""
    schedule, weight = VP.linear(), torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    x = prior.diffuse(*schedule(0.1)).sample(3, seed=2)
    graphs = []

    def module(x, t):
        graphs.append(x.requires_grad)
        return prior.diffuse(*schedule(t)).score(x)

    network = ScoreNetwork(module, schedule, "score")
    found = network_log_likelihood(network, x, 0.1, 1.0, trace=lambda x, t: weight * x.sum(dim=1), steps=3)
    assert not found.log_density.requires_grad and not any(graphs)
    with pytest.raises(ValueError, match="one number for each state"):
        network_log_likelihood(network, x, 0.1, 1.0, trace=lambda x, t: x, steps=3)
    with pytest.raises(ValueError, match="unless terminal gives the density"):
        network_log_likelihood(network, x, 1.0, 0.1)


def test_rows_do_not_depend_on_each_other_and_keep_their_conditions(prior):
    """Rows finish at different times; conditions and probes stay with theirs."""
    schedule, scale = VP.linear(), torch.tensor([1.0, 0.2, 1.5, 0.7], dtype=torch.float64)
    x = torch.tensor([[0.3, -1.0], [4.0, 4.0], [0.0, 0.1], [-2.0, 9.0]], dtype=torch.float64)

    def module(x, t, scale):
        alpha, sigma = schedule(t)
        return -x / (alpha**2 * scale**2 + sigma**2)[:, None]  # data are N(0, scale^2 I), one scale for each row

    def normal(x, t, scale):
        alpha, sigma = schedule(t)
        variance = alpha**2 * scale**2 + sigma**2
        return -0.5 * (x.square().sum(dim=1) / variance + 2.0 * torch.log(2.0 * math.pi * variance))

    def likelihood(x, scale, trace):
        network = ScoreNetwork(module, schedule, "score", conditioning={"scale": scale})
        options = {"trace": trace, "probes": 2, "rtol": 1e-8, "atol": 1e-9, "terminal": lambda x: normal(x, 1.0, scale)}
        return network_log_likelihood(network, x, 0.1, 1.0, **options)

    for trace in ("exact", "hutchinson"):  # F is a multiple of the identity: every probe has its trace
        together = likelihood(x, scale, trace)
        assert len(set(together.evaluations.tolist())) > 1, "all rows took the same steps: this test would show little"
        torch.testing.assert_close(together.log_density, normal(x, 0.1, scale), rtol=0, atol=1e-6)
        for row in range(4):
            one = slice(row, row + 1)
            alone = likelihood(x[one], scale[one], trace)
            assert alone.evaluations[0] == together.evaluations[row]
            torch.testing.assert_close(alone.log_density, together.log_density[one], rtol=1e-12, atol=1e-12)


def test_bits_per_dimension():
    """A uniform density over 256 bins of width 2/256 has 8 bits for each dimension."""
    uniform = NetworkLikelihood(torch.tensor([12 * math.log(0.5)]), *(torch.zeros(1),) * 3)
    torch.testing.assert_close(uniform.bits_per_dimension(12, 2 / 256), torch.tensor([8.0]))
    with pytest.raises(ValueError, match="bin_width"):
        uniform.bits_per_dimension(12, 0.0)


def test_pixels_become_continuous_within_their_bins():
    """Evenly, reproducibly, and so that a flat density has as many bits as pixels have."""
    pixels = torch.arange(256, dtype=torch.uint8).repeat(400, 1)
    found = dequantise(pixels, seed=0, dtype=torch.float64)
    place = (found.x + 1.0) / found.bin_width - pixels.double()
    assert found.bin_width == 2 / 255 and place.min() >= -0.5 and place.max() < 0.5
    assert abs(place.mean().item()) < 5e-3 and abs(place.var().item() - 1.0 / 12.0) < 1e-3
    assert torch.equal(found.x, dequantise(pixels, seed=0, dtype=torch.float64).x)
    for wrong, words in ((pixels.float(), "integer dtype"), (pixels.long() + 1, "0 to 255")):
        with pytest.raises((TypeError, ValueError), match=words):
            dequantise(wrong, seed=0)
    with pytest.raises(ValueError, match="low below high"):
        dequantise(pixels, seed=0, low=1.0, high=0.0)
    with pytest.raises(TypeError, match=r"torch\.float32"):
        dequantise(pixels, seed=0, dtype=torch.float16)


def test_guided_fields_warn_and_bad_input_is_refused(prior):
    schedule, x = VP.linear(), torch.zeros(2, 4, dtype=torch.float64)
    guided = ScoreNetwork(lambda x, t, c=0: x, schedule, unconditional={"c": 1}, guidance=2.0)
    with pytest.warns(UserWarning, match="guided"):
        network_log_likelihood(guided, x, 0.5, 0.6)
    network = ideal(prior, schedule)
    for change, words in (
        ({"trace": "hutch"}, "did you mean 'hutchinson'"),
        ({"probes": 0}, "probes"),
        ({"seed": -1}, "seed"),
        ({"rtol": 2.0}, "rtol"),
        ({"start": 0.0}, "start|positive"),
        ({"end": 3.0}, "t must lie in"),
    ):
        given = {"start": 0.5, "end": 0.6} | change
        with pytest.raises(ValueError, match=words):
            network_log_likelihood(network, x, **given)
    discrete = ScoreNetwork(lambda x, t: x, Discrete([0.9, 0.5, 0.1]), time="discrete")
    with pytest.raises(ValueError, match="continuous"):
        network_log_likelihood(discrete, x, 0, 2)
