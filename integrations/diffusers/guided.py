"""Images from a pipeline's network, guided by a reward through the adjoint of the sampler [MATH 5.3]."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from dfmath.integrations.diffusers.conventions import convention_of
from dfmath.integrations.diffusers.latents import decoded
from dfmath.integrations.diffusers.pipelines import Prompt, network_of
from dfmath.integrations.guidance import Normalisation, guided_sample
from dfmath.integrations.module_call import one_for_each
from dfmath.integrations.products import Product
from dfmath.integrations.torch import ScoreNetwork

from dfmath import _checks
from dfmath.schedules import FlowMatching, Schedule
from dfmath.solvers import Solver

__all__ = ["Generated", "guided_generate", "pipeline_levels"]

Tensor: TypeAlias = torch.Tensor
Reward: TypeAlias = Callable[[Tensor], Tensor]
LATEST = 0.999  # of flow matching: at time 1 there is no signal, and no noise-to-signal ratio
ROUNDED = 1e-5  # relative, of noise levels from tables in float32
UNSTEPPED = ("IPNDM", "SCM")  # whose runs begin where there is no signal


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
    guide_from: int | None = None,
    guide_to: int | None = None,
    strength: float = 0.2,
    normalisation: Normalisation = "rms",
    rollout_steps: int | None = None,
    solver: Solver = "ddim",
    negative_prompt: Prompt = None,
    class_labels: Any = None,
    guidance_scale: float | None = None,
    count: int = 1,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """Sample images from a pipeline's network towards a reward, with the paper's protocol.

    Every guided step runs the steps that remain: with 50 steps and the default window that is 50 + 21 rollouts of 15 to
    35 evaluations, and as many products. `rollout_steps` shortens them.

    Parameters
    ----------
    pipe
        A diffusers pipeline that `network_of` knows; neither its scheduler nor its modules are changed.
    prompt, negative_prompt, class_labels
        As of `network_of`; a prompt of None for pipelines that read no text.
    guidance_scale
        As of `network_of`; 7.5 if not given, 3.5 for a Flux network that is told it, and 1 where there is no guidance.
    reward
        Of images (B, 3, H, W), about [0, 1]; returns one number for each, (B,), and differentiates.
    method
        How F v is made: a name or a function, see `dfmath.integrations.products`, or ``unrolled``.
    steps
        Noise levels are those of the pipeline's scheduler for this many steps (its ``num_inference_steps``), and 0.
    guide_from, guide_to
        First and last guided step; from 0.3 to 0.7 of all if not given, 15 to 35 of 50.
    strength, normalisation, rollout_steps, solver, progress
        As of `dfmath.integrations.guidance.guided_sample`.
    count
        Images, where there is one prompt (``num_images_per_prompt``).
    size
        (height, width) of latents, not of images; the network's own sample size if not given.
    seed
        Of the noise that is started from (``generator``).

    Returns
    -------
    Generated

    Raises
    ------
    TypeError, ValueError
        If something does not fit; in the run, if the reward does not return (B,) finite numbers with a graph.
    """
    scale, loss = _guidance(pipe) if guidance_scale is None else guidance_scale, loss_of(pipe, reward)
    conditions = {"negative_prompt": negative_prompt, "class_labels": class_labels, "guidance_scale": scale}
    network = network_of(pipe, prompt, **conditions)
    rhos, window = pipeline_levels(pipe, network.schedule, steps, size), window_of(steps)
    with torch.no_grad():
        start = start_of(pipe, network, rhos[0], _rows(prompt, class_labels, count), size, seed)
    found = guided_sample(
        network,
        loss,
        start,
        rhos,
        solver=solver,
        product=method,
        guide_from=window[0] if guide_from is None else guide_from,
        guide_to=window[1] if guide_to is None else guide_to,
        strength=strength,
        normalisation=normalisation,
        rollout_steps=rollout_steps,
        progress=progress,
    )
    with torch.no_grad():
        images = decoded(pipe, found.x).clamp(0.0, 1.0)
    return Generated(images, found.x, -found.loss, -found.losses, found.network_evaluations, found.products)


def loss_of(pipe: Any, reward: Any) -> Callable[[Tensor], Tensor]:
    """Minus the reward of the images of latents."""
    if not callable(reward):
        raise TypeError(f"reward must be a function of images (B, 3, H, W), got {_checks.describe(reward)}")
    return lambda z: -one_for_each("reward", reward(decoded(pipe, z)), len(z))


def window_of(steps: int) -> tuple[int, int]:
    """The paper's window, steps 15 to 35 of 50, for another number of steps."""
    count = _checks.positive_integer("steps", steps)
    return round(0.3 * count), min(round(0.7 * count), count - 1)


def _guidance(pipe: Any) -> float:
    """What pipelines take where nothing is said, and 1 for those without guidance."""
    if _is_flux(pipe):
        return 3.5 if pipe.transformer.config.guidance_embeds else 1.0
    return 7.5 if hasattr(pipe, "encode_prompt") or hasattr(pipe, "id2label") or hasattr(pipe, "labels") else 1.0


def pipeline_levels(
    pipe: Any, schedule: Schedule, steps: int, size: tuple[int, int] | None = None
) -> tuple[float, ...]:
    """Return the noise levels that a pipeline's own run steps through, and 0; its scheduler is left as it was.

    They are the scheduler's sigmas where it has some, those of its timesteps elsewhere. Where a run begins without
    signal, which has no noise-to-signal ratio, it begins just below: at time 0.999 of flow matching, and at the last
    time with signal of tables rescaled to zero terminal SNR; not so for networks of noise, which is no use there.

    Parameters
    ----------
    pipe
        A pipeline of diffusers.
    schedule
        Of its network.
    steps
        That the pipeline would be called with.
    size
        (height, width) of latents, which dynamic shifts depend on; the pipeline's default if not given.

    Raises
    ------
    TypeError, ValueError
        If the scheduler would step to levels that its network does not know, or steps are not positive.
    """
    scheduler = run_of(pipe, steps, size)
    if getattr(scheduler, "sigmas", None) is None:
        last = schedule.domain[1] if convention_of(scheduler).prediction != "eps" else math.inf
        rhos = [float(schedule.rho(min(float(t), last))) for t in scheduler.timesteps if t >= 0]  # trailing: -1
    elif isinstance(schedule, FlowMatching):
        rhos = [float(schedule.rho(min(float(s), LATEST))) for s in scheduler.sigmas]
    else:
        rhos = [_known(schedule, float(sigma)) for sigma in scheduler.sigmas]
    return (*dict.fromkeys(rho for rho in rhos if rho > 0.0), 0.0)  # Heun's and PNDM's name some levels twice


def run_of(pipe: Any, steps: int, size: tuple[int, int] | None = None) -> Any:
    """Return a copy of a pipeline's scheduler, set for a run of so many steps as the pipeline would set it."""
    count, scheduler = _checks.positive_integer("steps", steps), copy.deepcopy(pipe.scheduler)
    name = type(scheduler).__name__.removesuffix("Scheduler")
    if name in UNSTEPPED:
        raise ValueError(f"pipe's scheduler must step through levels of its network, which {name}'s first is not")
    if name == "ScoreSdeVe":
        scheduler.set_timesteps(count)
        scheduler.set_sigmas(count)
        return scheduler
    options = _run_options(pipe, scheduler, count, size)
    taken = inspect.signature(scheduler.set_timesteps).parameters
    scheduler.set_timesteps(**{name: value for name, value in options.items() if name in taken})
    return scheduler


def _run_options(pipe: Any, scheduler: Any, count: int, size: tuple[int, int] | None) -> dict[str, Any]:
    """What the pipeline gives its scheduler: Flux sigmas of its own, and shifts by the number of tokens."""
    config, flux = scheduler.config, _is_flux(pipe)
    options: dict[str, Any] = {"num_inference_steps": count}
    if config.get("use_dynamic_shifting", False):
        height, width = latent_size(pipe, size)
        patch = 2 if flux else pipe.transformer.config.patch_size
        options["mu"] = _shift(config, (height // patch) * (width // patch), 1.15 if flux else 1.16)
    if flux and not config.get("use_flow_sigmas", False):
        options["sigmas"] = [1.0 - k / count for k in range(count)]
    return options


def _shift(config: Any, tokens: int, most: float) -> float:
    """The shift mu, linear in the number of tokens, as both pipelines compute it."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", most)
    return float(low + (high - low) * (tokens - few) / (many - few))


def _known(schedule: Schedule, rho: float) -> float:
    """A level of the network nearest to a scheduler's, whose float32 table may round beyond the ends; 0 stays 0."""
    if rho == 0.0:
        return rho
    low, high = ends_of(schedule)
    found = min(max(rho, low), high)
    if abs(found - rho) > ROUNDED * rho:
        raise ValueError(
            f"pipe's scheduler must step through noise levels that its network knows, {low:g} to {high:g}, got {rho:g}"
        )
    return found


def ends_of(schedule: Schedule) -> tuple[float, float]:
    """Lowest and highest noise-to-signal ratio."""
    levels = (schedule(t) for t in schedule.domain)
    low, high = (sigma / alpha if alpha > 0.0 else math.inf for alpha, sigma in levels)
    return low, high


def start_of(
    pipe: Any, network: ScoreNetwork, rho: float, rows: int, size: tuple[int, int] | None, seed: int
) -> Tensor:
    """Noise at the first level, as the network takes it."""
    module = getattr(pipe, "unet", None) or pipe.transformer
    channels = module.config.in_channels
    if _is_flux(pipe):
        channels //= 4  # of packed latents
    height, width = latent_size(pipe, size)
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(_checks.random_seed(seed))
    noise = torch.randn((rows, channels, height, width), generator=generator).to(device)
    _, sigma = network.schedule(network.time_of(rho))
    return sigma * noise


def _is_flux(pipe: Any) -> bool:
    return type(pipe).__name__.startswith("Flux")


def latent_size(pipe: Any, size: Any) -> tuple[int, int]:
    """(height, width) of latents: as given, or the network's own."""
    if size is None:
        module = getattr(pipe, "unet", None) or pipe.transformer
        size = getattr(module.config, "sample_size", None) or getattr(pipe, "default_sample_size", None)
        if size is None:
            raise ValueError("size must be given for a network without a sample size of its own")
        size = (size, size) if isinstance(size, int) else size
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ValueError(f"size must be (height, width) of latents, got {_checks.describe(size)}")
    return _checks.positive_integer("size", size[0]), _checks.positive_integer("size", size[1])


def _rows(prompt: Prompt, labels: Any, count: int) -> int:
    """How many images: one for each prompt or label where there are several."""
    given = prompt if prompt is not None else labels
    several = 1 if given is None or isinstance(given, str | int) else len(given)
    if several > 1 and count not in (1, several):
        raise ValueError(f"count must be that of prompts, {several}, where there are several, got {count}")
    return max(several, _checks.positive_integer("count", count))
