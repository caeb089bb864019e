"""azula's denoisers as networks and ours as denoisers, where azula is installed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
azula_denoise = pytest.importorskip("azula.denoise")

from azula.linalg.covariance import DiagonalCovariance  # noqa: E402
from azula.noise import CosineSchedule, RectifiedSchedule, VESchedule, VPSchedule  # noqa: E402
from azula.sample import DDIMSampler  # noqa: E402
from dfmath.integrations.azula import AzulaDenoiser, network_from_azula  # noqa: E402
from dfmath.integrations.torch import ScoreNetwork  # noqa: E402

from dfmath import GaussianMixture  # noqa: E402
from dfmath.samplers import sample  # noqa: E402
from dfmath.schedules import EDM, Discrete  # noqa: E402

SCHEDULES = [VESchedule(), VPSchedule(), CosineSchedule(), RectifiedSchedule()]
VARIANCES = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
MEAN = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)


def gaussian(schedule):
    return azula_denoise.GaussianDenoiser(MEAN, DiagonalCovariance(VARIANCES), schedule)


def posterior_mean(z, rho):
    return MEAN + VARIANCES / (VARIANCES + rho**2) * (z - MEAN)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_denoisers_become_networks(schedule):
    """Of a Gaussian, whose posterior mean is known; at every ratio that the schedule has."""
    network = network_from_azula(gaussian(schedule))
    z = torch.randn((4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rho in (0.01, 0.3, 2.0, 40.0):
        torch.testing.assert_close(network.posterior_mean(z, rho), posterior_mean(z, rho), rtol=1e-6, atol=1e-6)
    trace = network.fisher(z, 0.7, "vjp").trace()
    torch.testing.assert_close(trace, (1.0 / (VARIANCES + 0.49)).sum().expand(4), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_networks_and_priors_become_denoisers(schedule):
    network = ScoreNetwork(lambda z, rho: posterior_mean(z, rho[:, None]), EDM(1e-4, 1e4), "denoiser")
    prior = GaussianMixture(MEAN[None], VARIANCES[None])
    x = torch.randn((4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (torch.tensor(0.4, dtype=torch.float64), torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)):
        wanted = gaussian(schedule)
        alpha, sigma = (level.reshape(-1, 1) for level in schedule(t))
        mean = posterior_mean(x / alpha, sigma / alpha)
        if t.ndim == 0:
            torch.testing.assert_close(wanted(x, t).mean, mean)
        for model in (network, prior):
            torch.testing.assert_close(AzulaDenoiser(model, schedule)(x, t).mean, mean, rtol=1e-8, atol=1e-8)
        spread = 1.0 / (1.0 / VARIANCES + (alpha / sigma) ** 2)
        found = AzulaDenoiser(prior, schedule)(x, t).var
        torch.testing.assert_close(found, spread.expand(4, 3), rtol=1e-8, atol=1e-10)


def test_their_sampler_and_ours_agree():
    """azula's DDIM on our prior, and ours on azula's denoiser: the same levels, the same end."""
    schedule = RectifiedSchedule(alpha_min=0.01, sigma_min=0.01)
    prior = GaussianMixture(MEAN[None], VARIANCES[None])
    times = torch.linspace(1.0, 0.0, 9, dtype=torch.float64)
    alpha, sigma = schedule(times)
    rhos = (sigma / alpha).tolist()
    z = rhos[0] * torch.randn((5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = DDIMSampler(AzulaDenoiser(prior, schedule), steps=8, silent=True)(alpha[0] * z)
    ours = sample(network_from_azula(gaussian(schedule)), None, z, solver="ddim", steps=rhos).x
    torch.testing.assert_close(alpha[-1] * ours, theirs.to(ours.dtype), rtol=1e-4, atol=1e-4)


def test_keyword_arguments_are_the_networks_conditioning():
    """Beside its own and in their place, in guided calls, and through azula's samplers; a prior has none."""
    schedule = RectifiedSchedule(alpha_min=0.01, sigma_min=0.01)

    def moved(z, rho, shift=0.0, scale=1.0):
        return scale * posterior_mean(z, rho[:, None]) + shift

    x = torch.randn((4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, shifts = torch.tensor(0.4, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)[:, None]
    alpha, sigma = schedule(t)
    mean = posterior_mean(x / alpha, sigma / alpha)
    plain = AzulaDenoiser(ScoreNetwork(moved, EDM(1e-4, 1e4), "denoiser"), schedule)
    torch.testing.assert_close(plain(x, t, shift=shifts).mean, mean + shifts)
    torch.testing.assert_close(plain(x, t).mean, mean)
    own = {"conditioning": {"shift": 5.0, "scale": 2.0}, "unconditional": {"scale": 1.0}, "guidance": 3.0}
    guided = AzulaDenoiser(ScoreNetwork(moved, EDM(1e-4, 1e4), "denoiser", **own), schedule)
    torch.testing.assert_close(guided(x, t, shift=shifts).mean, mean + 3.0 * mean + shifts)
    torch.testing.assert_close(guided(x, t).mean, mean + 3.0 * mean + 5.0)
    through = network_from_azula(plain, shift=1.0)
    torch.testing.assert_close(through.posterior_mean(x, 0.7), posterior_mean(x, 0.7) + 1.0)
    sampler = DDIMSampler(plain, steps=3, silent=True)
    assert (sampler(x, shift=shifts)[1:] - sampler(x)[1:]).abs().min() > 0.1
    prior = AzulaDenoiser(GaussianMixture(MEAN[None], VARIANCES[None]), schedule)
    with pytest.raises(TypeError, match="a prior takes no keyword arguments, got label, shift"):
        prior(x, t, shift=1.0, label=3)


def test_networks_of_whole_times_take_the_nearest():
    """Between the network's levels its posterior mean is that of the nearest one."""
    table = Discrete(torch.linspace(0.999, 0.01, 50, dtype=torch.float64).tolist())
    levels = table.rho(torch.arange(50, dtype=torch.float64))
    told = []

    def eps(x, k):
        told.append(k)
        rho = levels[k][:, None]
        z = x * torch.sqrt(1.0 + rho**2)
        return (z - posterior_mean(z, rho)) / rho

    network = ScoreNetwork(eps, table, "eps", time="discrete")
    schedule, x = RectifiedSchedule(), torch.ones((3, 3), dtype=torch.float64)
    for part in (0.0, 0.3, -0.3):
        rho = table.rho(torch.tensor([20.0, 30.0, 40.0], dtype=torch.float64) + part)
        t = rho / (1.0 + rho)  # about that of straight lines
        alpha, sigma = schedule(t)
        own = table.time(sigma / alpha).round()
        mean = AzulaDenoiser(network, schedule)(x, t).mean
        assert told[-1].tolist() == own.tolist() == [20, 30, 40]
        wanted = posterior_mean(x / alpha[:, None], table.rho(own)[:, None])
        torch.testing.assert_close(mean, wanted, rtol=1e-8, atol=1e-8)


def test_wrong_things_are_refused():
    with pytest.raises(TypeError, match="denoiser must be an instance of"):
        network_from_azula(lambda x, t: x)
    with pytest.raises(TypeError, match="model must be a ScoreNetwork or a prior"):
        AzulaDenoiser(math.sin, VESchedule())
    with pytest.raises(ValueError, match="must grow from less noise to more"):
        network_from_azula(gaussian(VESchedule(sigma_min=2.0, sigma_max=1.0)))


def test_the_page_on_azula_runs():
    """The last block of docs/howto/pipelines.md, on a Gaussian that both sides know."""
    text = (Path(__file__).parents[1] / "docs" / "howto" / "pipelines.md").read_text()
    names = {"denoiser": gaussian(VPSchedule()), "prior": GaussianMixture(MEAN.float()[None], VARIANCES.float()[None])}
    exec(re.findall(r"```py\n(.*?)```", text, re.DOTALL)[-1], names)
    assert names["x0"].shape == (16, 3)
    z = torch.ones((1, 3), dtype=torch.float64)
    torch.testing.assert_close(names["network"].posterior_mean(z, 0.7), posterior_mean(z, 0.7))
