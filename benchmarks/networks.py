"""What a trace costs beside one evaluation of a network: a riding head, Hutchinson by hand and by dfmath."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from dfmath.benchmarks import timing
from dfmath.benchmarks.places import PLACES
from dfmath.integrations.torch import ScoreNetwork
from dfmath.integrations.trace_model import DataScale, TraceModel

from dfmath.schedules import Discrete

Tensor = torch.Tensor
T, TABLE = 300, np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))  # Ho et al. 2020
DEVICES = {"torch": "cpu", "cuda": "cuda"}  # of each kind of tensors
NAMES = (
    "network alone",
    "noise and trace, riding head",
    "noise and trace, Hutchinson by hand (vjp)",
    "noise and trace, dfmath's Hutchinson (vjp)",
)


def unet() -> Any:
    """A UNet2DModel of about five million parameters for 32 x 32 images; it costs what a trained one does."""
    from diffusers import UNet2DModel

    torch.default_generator.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")}
    blocks |= {"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
    model = UNet2DModel(32, 3, 3, layers_per_block=1, block_out_channels=(64, 96, 160), norm_num_groups=16, **blocks)
    return cast(Any, model).eval()


def calls(batch: int, device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    module = unet().to(device)
    network = ScoreNetwork(
        lambda x, t: module(x, t).sample, Discrete(TABLE), time="discrete", derivative="vjp", wraps=module
    )
    width = module.config.block_out_channels[-1]
    head = TraceModel(
        network, "local-loss", DataScale(0.3, 0.3), features="mid_block", event_shape=(3, 32, 32), width=width
    )
    head.module.to(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((batch, 3, 32, 32), generator=generator).to(device)
    v = (2.0 * torch.randint(0, 2, x.shape, generator=generator) - 1.0).to(x)
    time = torch.full((batch,), T, device=device)

    def by_hand() -> Any:
        state = x.clone().requires_grad_()
        noise = module(state, time).sample
        return noise.detach(), (torch.autograd.grad((noise * v).sum(), state)[0] * v).flatten(1).sum(dim=1)

    def library() -> Any:
        probe = v.flatten(1)[:, :, None]
        score, product = network.fisher(x, T).score_and_products(probe)
        return -score, (probe * product).sum(dim=(1, 2))

    found = (lambda: network.noise(x, T), lambda: head.noise_and_trace(x, T), by_hand, library)
    return dict(zip(NAMES, found, strict=True))


def parameters() -> int:
    """Number of the network's parameters."""
    return sum(p.numel() for p in unet().parameters())


def measure(batch: int, rounds: int, backend: str, advance: Callable[[str], None]) -> dict[str, Any]:
    """Times in one process, peak memory of each in a process of its own."""
    memory, place = {}, PLACES[backend]()
    for name in NAMES:
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            memory[name] = alone.apply(_peak, (name, batch, backend))
        advance(f"memory: {name}")
    ways = {name: place.finished(call) for name, call in calls(batch, DEVICES[backend]).items()}
    for call in ways.values():
        call()
    seconds = timing.interleaved(ways, rounds, patience=120.0, rest=0.0)
    advance("time")
    return {
        "machine": timing.machine(),
        "backend": backend,
        **place.about(),
        "parameters": parameters(),
        "batch": batch,
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "peak memory": memory,
    }


def _peak(name: str, batch: int, backend: str) -> int | None:
    """Bytes that a call adds, at most, to a process that has made the network and called it for one state."""
    calls(1, DEVICES[backend])[name]()
    return PLACES[backend]().peak_memory(calls(batch, DEVICES[backend])[name])


def markdown(result: dict[str, Any]) -> str:
    """One row for each way, as multiples of the network alone and of Hutchinson by hand."""
    time, memory = result["seconds"], result["peak memory"]
    alone, by_hand, machine = NAMES[0], NAMES[2], result["machine"]
    where = result.get("device") or f"{machine['processor']}, {machine['cores']} cores"
    lines = [
        f"UNet2DModel of {result['parameters'] / 1e6:.1f} M parameters, {result['batch']} images of 32 x 32, "
        f"{where}, commit {result['machine']['commit']}",
        "",
        "| what | time / network alone | time / Hutchinson by hand | peak memory, MiB | of Hutchinson by hand |",
        "|---|---|---|---|---|",
    ]
    for name in NAMES:
        mib = (memory[name] or 0) / 2**20
        share = (memory[name] or 0) / max(1, memory[by_hand] or 1)
        lines.append(
            f"| {name} | {time[name] / time[alone]:.3g} | {time[name] / time[by_hand]:.3g} | {mib:.3g} | {share:.3g} |"
        )
    return "\n".join(lines) + "\n"


def save(result: dict[str, Any], folder: Path) -> None:
    """Write network.json and network.md, with the device's kind in their names where it is none of torch's host."""
    stem = "network" if result["backend"] == "torch" else f"network_{result['backend']}"
    timing.write(folder / f"{stem}.json", json.dumps(result, indent=1) + "\n")
    timing.write(folder / f"{stem}.md", markdown(result))
