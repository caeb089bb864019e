"""What a sampler adds to the evaluations of its model: dfmath beside diffusers and azula, on a UNet and on a prior."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from dfmath.benchmarks import timing
from dfmath.benchmarks.networks import unet

from dfmath import GaussianMixture
from dfmath.samplers import sample

Tensor: TypeAlias = torch.Tensor
STEPS = 5
STATES, DIM, COMPONENTS = 512, 64, 10  # of the prior


def models(batch: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Ways to take STEPS steps of each model, by name; the first is the evaluations alone."""
    return {f"UNet, {batch} images of 32 x 32": _unet(batch), f"mixture, {STATES} states in {DIM}-d": _prior()}


def _unet(batch: int) -> dict[str, Callable[[], Any]]:
    from dfmath.integrations.diffusers import network_from_model, pipeline_levels
    from diffusers import DDIMPipeline, DDIMScheduler

    module, scheduler = unet(), DDIMScheduler(clip_sample=False)
    network = network_from_model(module, scheduler)
    levels = pipeline_levels(DDIMPipeline(module, scheduler), network.schedule, STEPS)
    x = torch.randn((batch, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    z, time = (1.0 + levels[0] ** 2) ** 0.5 * x, torch.full((batch,), 300)

    @torch.no_grad()
    def alone() -> None:
        for _ in range(STEPS):
            module(x, time)

    @torch.no_grad()
    def theirs() -> Tensor:
        scheduler.set_timesteps(STEPS)
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(module(state, t).sample, t, state).prev_sample
        return state

    ways = {"evaluations alone": alone, "dfmath, DDIM": lambda: sample(network, None, z, solver="ddim", steps=levels)}
    ways |= {"dfmath, DEIS 2": lambda: sample(network, None, z, steps=levels), "diffusers, DDIM": theirs}
    if find_spec("azula") is not None:
        ways["azula, DDIM"] = _azula(network, z)
    return ways


def _prior() -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn((COMPONENTS, DIM), generator=generator)
    prior = GaussianMixture(means, 0.1)
    z = 20.0 * torch.randn((STATES, DIM), generator=generator)
    levels = [20.0, 5.0, 2.0, 0.8, 0.2, 0.0]

    visited = [(rho, prior.diffuse(1.0, rho).sample(STATES, seed=0)) for rho in levels[:-1]]

    def alone() -> None:
        for rho, state in visited:  # states as a run meets them: those far off take longer
            prior.diffuse(1.0, rho).score(state)

    ways: dict[str, Callable[[], Any]] = {"evaluations alone": alone}
    ways["dfmath, DDIM"] = lambda: sample(prior, None, z, solver="ddim", steps=levels)
    ways["dfmath, DEIS 2"] = lambda: sample(prior, None, z, steps=levels)
    if find_spec("azula") is not None:
        ways["azula, DDIM"] = _azula(prior, z)
    return ways


def _azula(model: Any, z: Tensor) -> Callable[[], Any]:
    """azula's DDIM from the level of z = 20 eps, or of a network's first, in a straight schedule."""
    from azula.noise import RectifiedSchedule
    from azula.sample import DDIMSampler
    from dfmath.integrations.azula import AzulaDenoiser

    schedule = RectifiedSchedule(alpha_min=0.05, sigma_min=0.05)
    sampler = DDIMSampler(AzulaDenoiser(model, schedule), steps=STEPS, silent=True)
    return lambda: sampler(0.05 * z)


def measure(batch: int, rounds: int, advance: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of every way of each model, medians over rounds."""
    found = {}
    for name, ways in models(batch).items():
        for call in ways.values():
            call()
        seconds = timing.interleaved(ways, rounds, patience=120.0, rest=0.0)
        found[name] = {way: statistics.median(part) for way, part in seconds.items()}
        advance(name)
    return {"machine": timing.machine(), "steps": STEPS, "seconds": found}


def markdown(result: dict[str, Any]) -> str:
    """One row for each way, as multiples of the evaluations alone."""
    machine = result["machine"]
    title = f"{result['steps']} steps, {machine['processor']}, {machine['cores']} cores, commit {machine['commit']}"
    lines = [title, "", "| model | sampler | time / evaluations alone |", "|---|---|---|"]
    for model, seconds in result["seconds"].items():
        alone = seconds["evaluations alone"]
        lines += [f"| {model} | {way} | {value / alone:.3g} |" for way, value in seconds.items()]
    return "\n".join(lines) + "\n"


def save(result: dict[str, Any], folder: Path) -> None:
    """Write the table and what it is made of."""
    timing.write(folder / "sampling.json", json.dumps(result, indent=1) + "\n")
    timing.write(folder / "sampling.md", markdown(result))
