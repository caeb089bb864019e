"""A network and the exact answers: a mixture fitted to the digits, and a score network trained on its samples.

Score, Fisher, posterior moments and log density of a Gaussian mixture are known in closed form, so that the errors of a
network that has only seen samples of it can be measured, and not estimated.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from dfmath.integrations.batches import batches
from dfmath.integrations.torch import ScoreNetwork
from dfmath.integrations.training import TrainingPlan, train
from torch import nn

from dfmath import GaussianMixture
from dfmath.datasets import digits
from dfmath.schedules import EDM

Tensor: TypeAlias = torch.Tensor

COMPONENTS, FLOOR = 10, 1e-3  # of the mixture; what is added to its variances
POOL = 200_000  # samples that the networks are trained on; a tenth of them in a quick run
RHO = (0.02, 30.0)  # noise-to-signal ratios that they are trained for
LEVELS = (0.03, 10.0)  # and those at which they are measured
WAVES, BATCH = 16, 512


class ScoreMLP(nn.Module):
    """A residual network of the noise level: the raw part of EDM's preconditioning for flat data.

    Beside it a linear map whose gains depend on the level: what a Gaussian of the data's covariance asks for.
    """

    def __init__(self, dim: int, width: int = 256, blocks: int = 3, told: int = 64) -> None:
        super().__init__()
        self.register_buffer("waves", torch.exp(torch.linspace(math.log(0.2), math.log(6.0), WAVES)))
        self.first = nn.Linear(dim, width)
        self.level = nn.Sequential(nn.Linear(2 * WAVES, told), nn.SiLU())
        self.down, self.gains, self.up = nn.Linear(dim, dim), nn.Linear(told, dim), nn.Linear(dim, dim)
        self.turns = nn.ModuleList(nn.Linear(told, 2 * width) for _ in range(blocks))
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, dim)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Return F of D = c_skip z + c_out F(c_in z, log(rho)/4)."""
        phase = 4.0 * c_noise[:, None] * self.waves
        level = self.level(torch.cat([torch.sin(phase), torch.cos(phase)], dim=1))
        h = self.first(x)
        for turn, inner, outer in zip(self.turns, self.inner, self.outer, strict=True):
            scale, shift = turn(level).chunk(2, dim=1)
            h = h + outer(nn.functional.silu((1.0 + scale) * inner(nn.functional.silu(h)) + shift))
        found: Tensor = self.last(nn.functional.silu(self.norm(h))) + self.up(self.gains(level) * self.down(x))
        return found


@dataclass(frozen=True)
class Truth:
    """The mixture, the network, and where what is trained is kept."""

    prior: GaussianMixture  # of float64 torch tensors
    network: ScoreNetwork
    samples: Tensor  # (n, d) that the network was trained on
    cache: Path
    quick: bool


def mixture(seed: int = 0) -> GaussianMixture:
    """Fit full covariances to the digits; of float64 torch tensors."""
    from sklearn.mixture import GaussianMixture as Fit

    fit = Fit(COMPONENTS, covariance_type="full", reg_covar=FLOOR, random_state=seed).fit(digits())
    parts = (torch.from_numpy(np.ascontiguousarray(part)) for part in (fit.means_, fit.covariances_, fit.weights_))
    return GaussianMixture(*parts)


def cache_folder() -> Path:
    """Where trained networks are kept: a folder of the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "dfmath"


def truth(cache: Path, quick: bool = False, progress: Callable[[str], None] | None = None) -> Truth:
    """Train the network, or load it where it was trained before: the same from the same seeds on the same machine."""
    prior = mixture()
    samples = prior.sample(pool(quick), seed=1).to(torch.float32)
    sigma_data = float(f"{samples.std().item():.6g}")  # the last digits depend on the machine
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = ScoreMLP(samples.shape[1])
    plan = training_plan(quick)
    cache.mkdir(parents=True, exist_ok=True)
    train(
        module,
        _denoising_loss(module, samples, sigma_data),
        plan,
        checkpoint=cache / f"digits-score-{plan.steps}.safetensors",
        config={"mixture": COMPONENTS, "floor": FLOOR, "rho": list(RHO), "sigma_data": sigma_data},
        progress=progress,
    )
    network = ScoreNetwork(module, EDM(RHO[0] / 2.0, 2.0 * RHO[1]), "edm", sigma_data=sigma_data)
    return Truth(prior, network, samples, cache, quick)


def pool(quick: bool) -> int:
    """Number of samples that the networks are trained on."""
    return POOL // 10 if quick else POOL


def training_plan(quick: bool) -> TrainingPlan:
    """Of the score network."""
    return TrainingPlan(
        steps=300 if quick else 9000, rate=2e-3, warmup=50 if quick else 200, averaging=0.999, every=1000, seed=0
    )


def levels(count: int = 10) -> list[float]:
    """Noise levels to measure at, from low to high."""
    return [float(rho) for rho in np.geomspace(*LEVELS, count)]


def noised(truth: Truth, rho: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Fresh clean samples and noised states of them, float64 (count, d) twice."""
    data = truth.prior.sample(count, seed=1000 + seed)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seed), dtype=data.dtype)
    return data, data + rho * noise


def _denoising_loss(module: nn.Module, samples: Tensor, sigma_data: float) -> Callable[[int, Any], Tensor]:
    """Karras et al. 2022, eq. 8, with more of the low levels, at which there is more to learn."""
    draw = batches(samples, BATCH)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        data = draw(step, generator)
        place = (torch.arange(len(data)) + torch.rand((), generator=generator)) / len(data)
        rho = torch.exp(math.log(RHO[0]) + math.log(RHO[1] / RHO[0]) * place**1.5)[:, None]
        z = data + rho * torch.randn(data.shape, generator=generator)
        size = torch.sqrt(rho**2 + sigma_data**2)
        target = (data - (sigma_data / size) ** 2 * z) * size / (sigma_data * rho)
        return (module(z / size, 0.25 * torch.log(rho[:, 0])) - target).square().mean()

    return loss
