"""The published experiments on Stable Diffusion, on a checkpoint of one's own: likelihoods and guidance of prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from dfmath.experiments import output
from dfmath.integrations.diffusers import colourfulness, guided_generate, network_of, pipeline_levels
from dfmath.integrations.diffusers.guided import start_of
from dfmath.integrations.likelihood import network_log_likelihood
from dfmath.integrations.trace_matching import train_trace_model
from dfmath.integrations.training_plan import TrainingPlan

from dfmath import _checks
from dfmath.samplers import sample

Tensor: TypeAlias = torch.Tensor

PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a watercolour of a lighthouse in a storm",
    "a bowl of oranges on a wooden table",
    "a red fox in the snow",
    "a city street at night in the rain",
    "a portrait of an old sailor",
    "a field of sunflowers under a blue sky",
    "a steam locomotive crossing a bridge",
    "a cup of coffee beside an open book",
    "a sailing boat on a calm lake",
)
STEPS, WINDOW, STRENGTHS = 50, (15, 35), (0.1, 0.2, 0.3, 0.4, 0.5)  # the paper's
PRODUCTS = ("none", "paper", "difference", "vjp")
GUIDANCE = 7.5
LEVELS, FLOW = (0.05, 12.0), 20  # noise-to-signal ratios that likelihoods are carried between, and steps between them
HEAD = 500  # steps of a trace head


def loaded(path: str) -> Any:
    """Return the pipeline of a folder; nothing is downloaded, and no pickle is read."""
    from diffusers import DiffusionPipeline

    if not (Path(path) / "model_index.json").is_file():
        raise ValueError(f"model must be a folder that a diffusers pipeline was saved in, got {path!r}")
    with _checks.on_behalf_of("model"):
        pipe = DiffusionPipeline.from_pretrained(path, local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts() -> int:
    """Of the work."""
    return 2 * len(PROMPTS) + 1 + len(PRODUCTS) * len(STRENGTHS)


def measure(pipe: Any, advance: Callable[[str], None]) -> dict[str, Any]:
    """Samples of all prompts, their likelihoods by three traces, and guidance over products and strengths."""
    latents = [_generated(pipe, prompt, seed, advance) for seed, prompt in enumerate(PROMPTS)]
    return {"likelihoods": _likelihoods(pipe, latents, advance), "guidance": _guidance(pipe, advance)}


def _generated(pipe: Any, prompt: str, seed: int, advance: Callable[[str], None]) -> Tensor:
    """Latents of one prompt by DDIM, guided as images are made."""
    network = network_of(pipe, prompt, guidance_scale=GUIDANCE)
    levels = pipeline_levels(pipe, network.schedule, STEPS)
    x = start_of(pipe, network, levels[0], 1, None, seed)
    alpha, _ = network.schedule(network.time_of(levels[0]))
    found: Tensor = sample(network, None, x / alpha, solver="ddim", steps=levels).x
    advance(f"sample: {prompt}")
    return found


def _likelihoods(pipe: Any, latents: list[Tensor], advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """Nats per dimension of each sample at the lowest level, under the network that is told its prompt."""
    head = _head(pipe, torch.cat(latents))
    advance("trace head")
    rows = []
    for prompt, data in zip(PROMPTS, latents, strict=True):
        network = network_of(pipe, prompt)
        times = [network.schedule.time(rho) for rho in LEVELS]
        x = float(network.schedule(times[0])[0]) * data
        ways: dict[str, Any] = {"hutchinson": "hutchinson", "local-loss": head, "i-mmse": "i-mmse"}
        row: dict[str, Any] = {"prompt": prompt}
        for name, trace in ways.items():
            row[name] = _likelihood(network, x, times, trace)
        rows.append(row)
        advance(f"likelihood: {prompt}")
    return rows


def _likelihood(network: Any, x: Tensor, times: list[float], trace: Any) -> dict[str, float]:
    steps = {} if trace == "i-mmse" else {"steps": FLOW}
    begin = time.perf_counter()
    found = network_log_likelihood(network, x, *times, trace=trace, **steps)
    seconds = time.perf_counter() - begin
    return {"nats per dimension": found.log_density.item() / x[0].numel(), "seconds": seconds}


def _head(pipe: Any, latents: Tensor) -> Any:
    """A trace head of its own features, on the samples, for the network without a prompt."""
    plan = TrainingPlan(steps=HEAD, rate=1e-3, every=HEAD)
    return train_trace_model(network_of(pipe, ""), latents, plan, rho=LEVELS, batch=4).model


def _guidance(pipe: Any, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """Reward and time of every product at every strength, for the first prompt."""
    rows = []
    for product in PRODUCTS:
        for strength in STRENGTHS:
            begin = time.perf_counter()
            found = guided_generate(
                pipe,
                PROMPTS[0],
                colourfulness,
                method=product,
                steps=STEPS,
                guide_from=WINDOW[0],
                guide_to=WINDOW[1],
                strength=strength,
                guidance_scale=GUIDANCE,
            )
            seconds = time.perf_counter() - begin
            rows.append({"product": product, "strength": strength, "reward": found.rewards.item(), "seconds": seconds})
            advance(f"guidance: {product}, {strength:g}")
    return rows


def tables(result: dict[str, Any]) -> list[output.Table]:
    """Likelihoods by prompt, and guidance by product and strength."""
    ways = [name for name in result["likelihoods"][0] if name != "prompt"]
    likelihoods = output.Table(
        f"Log-likelihood of samples at rho = {LEVELS[0]:g}, nats per dimension (seconds)",
        ("prompt", *ways),
        [(row["prompt"], *(_cell(row[way]) for way in ways)) for row in result["likelihoods"]],
    )
    slowest = statistics.median(row["seconds"] for row in result["guidance"] if row["product"] == "vjp")
    guidance = output.Table(
        f"Colourfulness reached, {STEPS} steps, guided from {WINDOW[0]} to {WINDOW[1]}; time in that of vjp",
        ("product", "strength", "reward", "time"),
        [(r["product"], r["strength"], r["reward"], r["seconds"] / slowest) for r in result["guidance"]],
    )
    return [likelihoods, guidance]


def _cell(found: dict[str, float]) -> str:
    return f"{found['nats per dimension']:.4g} ({found['seconds']:.2g} s)"


def figure(result: dict[str, Any]) -> Any:
    """Reward against strength for each product."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = drawn.subplots()
    for product in PRODUCTS:
        rows = [row for row in result["guidance"] if row["product"] == product]
        axes.plot([row["strength"] for row in rows], [row["reward"] for row in rows], marker="o", label=product)
    axes.set_xlabel("strength")
    axes.set_ylabel("colourfulness")
    axes.set_title("Guidance of a pipeline")
    axes.legend()
    return drawn
