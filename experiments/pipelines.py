"""The published experiments on Stable Diffusion, on a checkpoint of one's own: likelihoods and guidance of prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from dfmath.experiments import output
from dfmath.integrations.diffusers import colourfulness, guided_generate, network_of, pipeline_levels, saved_pipeline
from dfmath.integrations.diffusers.guided import start_of
from dfmath.integrations.likelihood import network_log_likelihood
from dfmath.integrations.trace_matching import train_trace_model
from dfmath.integrations.training_plan import TrainingPlan

from dfmath.journal import Journal
from dfmath.samplers import sample

Tensor: TypeAlias = torch.Tensor

QUESTION = (
    "What are likelihoods of samples of a saved pipeline, by three ways to take the trace, and what does guidance by "
    "the paper's protocol [MATH 5.3] reach and cost? There is no truth beside a checkpoint: the ways are compared "
    "with each other."
)
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
GUIDANCE = 7.5
LEVELS = (0.05, 12.0)  # noise-to-signal ratios that likelihoods are carried between


@dataclass(frozen=True)
class Protocol:
    """How much of everything there is; the paper's."""

    prompts: tuple[str, ...] = PROMPTS
    steps: int = 50
    window: tuple[int, int] = (15, 35)
    strengths: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    products: tuple[str, ...] = ("none", "paper", "difference", "vjp")
    flow: int = 20  # steps of likelihoods
    head: int = 500  # steps of a trace head

    @property
    def parts(self) -> int:
        """Of the work."""
        return 2 * len(self.prompts) + 1 + len(self.products) * len(self.strengths)


FULL = Protocol()
QUICK = Protocol(PROMPTS[:2], 6, (2, 3), (0.2,), ("none", "vjp"), 2, 20)


def loaded(path: str) -> Any:
    """Return the pipeline of a folder, which reads text."""
    pipe = saved_pipeline(path)
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"model must be a pipeline that reads text, got a {type(pipe).__name__}")
    return pipe


def measure(protocol: Protocol, pipe: Any, journal: Journal, advance: Callable[[str], None]) -> dict[str, Any]:
    """Samples of all prompts, their likelihoods by three traces, and guidance over products and strengths."""

    def kept(name: str, work: Callable[[], Any]) -> Any:
        found = journal.part(name, work)
        advance(name)
        return found

    latents = [
        torch.tensor(kept(f"sample: {prompt}", partial(_generated, pipe, prompt, seed, protocol)))
        for seed, prompt in enumerate(protocol.prompts)
    ]
    head = _Head(pipe, torch.cat(latents), protocol.head)
    likelihoods = [
        kept(f"likelihood: {prompt}", partial(_likelihoods, pipe, prompt, data, head, protocol.flow))
        for prompt, data in zip(protocol.prompts, latents, strict=True)
    ]
    advance("trace head")
    guidance = [
        kept(f"guidance: {product}, {strength:g}", partial(_guidance, pipe, product, strength, protocol))
        for product in protocol.products
        for strength in protocol.strengths
    ]
    return {"likelihoods": likelihoods, "guidance": guidance}


def _generated(pipe: Any, prompt: str, seed: int, protocol: Protocol) -> Any:
    """Latents of one prompt by DDIM, guided as images are made; as lists."""
    network = network_of(pipe, prompt, guidance_scale=GUIDANCE)
    levels = pipeline_levels(pipe, network.schedule, protocol.steps)
    x = start_of(pipe, network, levels[0], 1, None, seed)
    alpha, _ = network.schedule(network.time_of(levels[0]))
    return sample(network, None, x / alpha, solver="ddim", steps=levels).x.tolist()


class _Head:
    """A trace head of its own features, for the network without a prompt, trained on the samples when it is needed."""

    def __init__(self, pipe: Any, latents: Tensor, steps: int) -> None:
        self.pipe, self.latents, self.steps = pipe, latents, steps

    @cached_property
    def model(self) -> Any:
        """The head."""
        plan = TrainingPlan(steps=self.steps, rate=1e-3, every=self.steps)
        return train_trace_model(network_of(self.pipe, ""), self.latents, plan, rho=LEVELS, batch=4).model


def _likelihoods(pipe: Any, prompt: str, data: Tensor, head: _Head, steps: int) -> dict[str, Any]:
    """Nats per dimension of a sample at the lowest level, under the network that is told its prompt."""
    network = network_of(pipe, prompt)
    times = [network.schedule.time(rho) for rho in LEVELS]
    x = float(network.schedule(times[0])[0]) * data.to(network.call.owner.device)
    ways: dict[str, Any] = {"hutchinson": "hutchinson", "local-loss": head.model, "i-mmse": "i-mmse"}
    return {"prompt": prompt, **{name: _likelihood(network, x, times, way, steps) for name, way in ways.items()}}


def _likelihood(network: Any, x: Tensor, times: list[float], trace: Any, count: int) -> dict[str, float]:
    steps = {} if trace == "i-mmse" else {"steps": count}
    begin = time.perf_counter()
    found = network_log_likelihood(network, x, *times, trace=trace, **steps)
    seconds = time.perf_counter() - begin
    return {"nats per dimension": found.log_density.item() / x[0].numel(), "seconds": seconds}


def _guidance(pipe: Any, product: str, strength: float, protocol: Protocol) -> dict[str, Any]:
    """Reward and time of a product at a strength, for the first prompt."""
    begin = time.perf_counter()
    found = guided_generate(
        pipe,
        protocol.prompts[0],
        colourfulness,
        method=product,
        steps=protocol.steps,
        guide_from=protocol.window[0],
        guide_to=protocol.window[1],
        strength=strength,
        guidance_scale=GUIDANCE,
    )
    seconds = time.perf_counter() - begin
    return {"product": product, "strength": strength, "reward": found.rewards.item(), "seconds": seconds}


def tables(result: dict[str, Any]) -> list[output.Table]:
    """Likelihoods by prompt, and guidance by product and strength."""
    ways = [name for name in result["likelihoods"][0] if name != "prompt"]
    asked = result["settings"]
    first, last = asked["window"]
    likelihoods = output.Table(
        f"Log-likelihood of samples at rho = {LEVELS[0]:g}, nats per dimension (seconds)",
        ("prompt", *ways),
        [(row["prompt"], *(_cell(row[way]) for way in ways)) for row in result["likelihoods"]],
    )
    slowest = statistics.median(row["seconds"] for row in result["guidance"] if row["product"] == "vjp")
    guidance = output.Table(
        f"Colourfulness reached, {asked['steps']} steps, guided from {first} to {last}; time in that of vjp",
        ("product", "strength", "reward", "time"),
        [(r["product"], r["strength"], r["reward"], r["seconds"] / slowest) for r in result["guidance"]],
    )
    return [likelihoods, guidance]


def _cell(found: dict[str, float]) -> str:
    return f"{found['nats per dimension']:.4g} ({found['seconds']:.2g} s)"


def seen(result: dict[str, Any]) -> str:
    """Say what the numbers say."""
    best = max(result["guidance"], key=lambda row: row["reward"])
    ways = [name for name in result["likelihoods"][0] if name != "prompt"]
    mean = {way: statistics.fmean(row[way]["nats per dimension"] for row in result["likelihoods"]) for way in ways}
    said = ", ".join(f"{value:.3g} by {way}" for way, value in mean.items())
    return (
        f"Mean log-likelihood in nats per dimension: {said}. The highest reward, {best['reward']:.3g}, is that of "
        f"{best['product']} at strength {best['strength']:g}."
    )


def figure(result: dict[str, Any]) -> Any:
    """Reward against strength for each product."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = drawn.subplots()
    for product in result["settings"]["products"]:
        rows = [row for row in result["guidance"] if row["product"] == product]
        axes.plot([row["strength"] for row in rows], [row["reward"] for row in rows], marker="o", label=product)
    axes.set_xlabel("strength")
    axes.set_ylabel("colourfulness")
    axes.set_title("Guidance of a pipeline")
    axes.legend()
    return drawn
