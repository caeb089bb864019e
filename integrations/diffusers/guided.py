"""Images from a pipeline's network, guided by a reward through the adjoint of the sampler [MATH 5.3]."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from dfmath.integrations.diffusers.latents import decoded
from dfmath.integrations.diffusers.pipelines import Prompt, network_of
from dfmath.integrations.guidance import Normalisation, guided_sample
from dfmath.integrations.products import Product
from dfmath.integrations.torch import ScoreNetwork

from dfmath import _checks
from dfmath.schedules import FlowMatching, Schedule
from dfmath.solvers import Solver

__all__ = ["Generated", "guided_generate", "pipeline_levels"]

Tensor: TypeAlias = torch.Tensor
Reward: TypeAlias = Callable[[Tensor], Tensor]
LATEST = 0.999  # of flow matching: at time 1 there is no signal, and no noise-to-signal ratio


@dataclass(frozen=True)
class Generated:
    """Images and what guided them.

    Attributes
    ----------
    images
        (B, 3, H, W), clipped to [0, 1].
    latents
        What the pipeline would decode.
    rewards
        (B,) of the images before clipping.
    before
        (G, B) rewards at the end of the rollout of each guidance, before it.
    network_evaluations, products
        What it took, see `dfmath.integrations.guidance.GuidedResult`.
    """

    images: Tensor
    latents: Tensor
    rewards: Tensor
    before: Tensor
    network_evaluations: int
    products: int


def guided_generate(
    pipe: Any,
    prompt: Prompt,
    reward: Reward,
    *,
    method: Product | str = "vjp",
    steps: int = 50,
    guide_from: int = 15,
    guide_to: int = 35,
    strength: float = 0.2,
    normalisation: Normalisation = "rms",
    rollout_steps: int | None = None,
    solver: Solver = "ddim",
    negative_prompt: Prompt = "",
    class_labels: Any = None,
    guidance_scale: float = 7.5,
    count: int = 1,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """Sample images from a pipeline's network towards a reward, with the paper's protocol.

    Parameters
    ----------
    pipe
        A diffusers pipeline that `network_of` knows; neither its scheduler nor its modules are changed.
    prompt, negative_prompt, class_labels, guidance_scale
        As of `network_of`.
    reward
        Of images (B, 3, H, W), about [0, 1]; returns one number for each, (B,), and differentiates.
    method
        How F v is made: a name or a function, see `dfmath.integrations.products`, or ``unrolled``.
    steps, guide_from, guide_to, strength, normalisation, rollout_steps, solver, progress
        As of `dfmath.integrations.guidance.guided_sample`; noise levels are those of the pipeline's scheduler for this
        many steps, and 0.
    count
        Images, where there is one prompt.
    size
        (height, width) of latents; the network's own sample size if not given.
    seed
        Of the noise that is started from.

    Returns
    -------
    Generated

    Raises
    ------
    TypeError, ValueError
        If something does not fit; in the run, if the reward does not return (B,) finite numbers with a graph.
    """
    network = network_of(
        pipe,
        prompt,
        negative_prompt=negative_prompt,
        class_labels=class_labels,
        guidance_scale=guidance_scale,
    )
    rhos = pipeline_levels(pipe, network.schedule, steps)
    with torch.no_grad():
        start = start_of(pipe, network, rhos[0], _rows(prompt, class_labels, count), size, seed)
    found = guided_sample(
        network,
        lambda z: -reward(decoded(pipe, z)),
        start,
        rhos,
        solver=solver,
        product=method,
        guide_from=guide_from,
        guide_to=guide_to,
        strength=strength,
        normalisation=normalisation,
        rollout_steps=rollout_steps,
        progress=progress,
    )
    with torch.no_grad():
        images = decoded(pipe, found.x).clamp(0.0, 1.0)
    return Generated(images, found.x, -found.loss, -found.losses, found.network_evaluations, found.products)


def pipeline_levels(pipe: Any, schedule: Schedule, steps: int) -> tuple[float, ...]:
    """Return the noise levels that a pipeline's scheduler steps through, and 0; the scheduler is left as it was.

    They are the scheduler's own sigmas where it has some, those of its timesteps elsewhere. Flow matching begins at
    time 0.999 instead of 1, where there is no signal.
    """
    count, scheduler = _checks.positive_integer("steps", steps), copy.deepcopy(pipe.scheduler)
    shifting = {"mu": 1.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
    scheduler.set_timesteps(count, **shifting)
    if getattr(scheduler, "sigmas", None) is None:
        rhos = [float(schedule.rho(float(t))) for t in scheduler.timesteps if t >= 0]  # trailing grids may name -1
    elif isinstance(schedule, FlowMatching):
        rhos = [float(schedule.rho(min(float(s), LATEST))) for s in scheduler.sigmas]
    else:
        alpha, sigma = schedule(schedule.domain[1])
        highest = sigma / alpha if alpha > 0.0 else math.inf  # float32 tables may round beyond it
        rhos = [min(float(sigma), highest) for sigma in scheduler.sigmas]
    return (*dict.fromkeys(rho for rho in rhos if rho > 0.0), 0.0)  # Heun's and PNDM's name some levels twice


def start_of(
    pipe: Any, network: ScoreNetwork, rho: float, rows: int, size: tuple[int, int] | None, seed: int
) -> Tensor:
    """Noise at the first level, as the network takes it."""
    module = getattr(pipe, "unet", None) or pipe.transformer
    channels = module.config.in_channels
    if type(pipe).__name__.startswith("Flux"):
        channels //= 4  # of packed latents
    height, width = _size(module) if size is None else size
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(_checks.random_seed(seed))
    noise = torch.randn((rows, channels, height, width), generator=generator).to(device)
    _, sigma = network.schedule(network.time_of(rho))
    return sigma * noise


def _size(module: Any) -> tuple[int, int]:
    side = getattr(module.config, "sample_size", None)
    if side is None:
        raise ValueError("size must be given for a network without a sample size of its own")
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _rows(prompt: Prompt, labels: Any, count: int) -> int:
    """How many images: one for each prompt or label where there are several."""
    given = prompt if prompt is not None else labels
    several = 1 if given is None or isinstance(given, str | int) else len(given)
    if several > 1 and count not in (1, several):
        raise ValueError(f"count must be that of prompts, {several}, where there are several, got {count}")
    return max(several, _checks.positive_integer("count", count))
