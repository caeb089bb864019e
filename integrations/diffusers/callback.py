"""Guidance inside a pipeline's own run, through its callback at the end of steps [MATH 5.3]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from dfmath.integrations.diffusers.conventions import convention_of
from dfmath.integrations.diffusers.guided import Reward, loss_of, pipeline_levels, run_of, window_of
from dfmath.integrations.guidance import Guide, Normalisation
from dfmath.integrations.products import Product
from dfmath.integrations.torch import ScoreNetwork

from dfmath import _checks
from dfmath.solvers import Solver

__all__ = ["guidance_callback"]

Tensor: TypeAlias = torch.Tensor
Callback: TypeAlias = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
# Steps are from the latents given, and all that is remembered of earlier ones is what the network predicted.
FORGETFUL = (
    "DDIM",
    "DDPM",
    "DDIMParallel",
    "DDPMParallel",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "LMSDiscrete",
    "DPMSolverMultistep",
    "DEISMultistep",
    "DEISSN",
    "FlowMatchEulerDiscrete",
)


def guidance_callback(
    pipe: Any,
    network: ScoreNetwork,
    reward: Reward,
    *,
    steps: int,
    method: Product | str = "vjp",
    guide_from: int | None = None,
    guide_to: int | None = None,
    strength: float = 0.2,
    normalisation: Normalisation = "rms",
    rollout_steps: int | None = None,
    solver: Solver = "ddim",
    size: tuple[int, int] | None = None,
) -> Callback:
    """Return a ``callback_on_step_end`` that guides a pipeline's run, with its own scheduler, towards a reward.

    Before every step from `guide_from` to `guide_to` the latents are moved as in `guided_generate`; the steps are the
    pipeline's. Step 0 has nothing before it and cannot be guided. A run that begins within the grid, from an image,
    begins with a later step.

    Parameters
    ----------
    pipe
        Whose latents are not packed, and whose scheduler goes on from the latents it is given: others keep a state of
        their own, and undo a move or part of it.
    network
        From `network_of`, with the run's prompt and guidance.
    reward
        Of images (B, 3, H, W), about [0, 1]; returns one number for each, (B,), and differentiates.
    steps
        That the pipeline will be called with.
    method, guide_from, guide_to, strength, normalisation, rollout_steps, solver
        As of `dfmath.integrations.guidance.guided_sample`; the solver is that of rollouts.
    size
        (height, width) of latents, as of `pipeline_levels`.

    Raises
    ------
    TypeError, ValueError
        If something does not fit.
    """
    if type(pipe).__name__.startswith("Flux"):
        raise ValueError("pipe must not pack its latents, as Flux does: use guided_generate")
    if type(pipe.scheduler).__name__.removesuffix("Scheduler") not in FORGETFUL:
        raise ValueError(f"pipe's scheduler must be one of {', '.join(FORGETFUL)}, got {type(pipe.scheduler).__name__}")
    convention, levels = convention_of(pipe.scheduler), pipeline_levels(pipe, network.schedule, steps, size)
    times = run_of(pipe, steps, size).timesteps.tolist()
    levels = levels[: len(times) + 1]  # some runs end at the lowest level, which is then taken for the data
    if len(levels) != len(times) + 1:
        raise ValueError(f"pipe's scheduler must step to {len(times)} levels, got {len(levels) - 1} that differ")
    first, last = _window(guide_from, guide_to, len(levels) - 1)
    guide = Guide(network, loss_of(pipe, reward), solver, method, strength, normalisation, rollout_steps)

    def callback(running: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        k = _place(running.scheduler, time, times) + 1
        if first <= k <= last:
            latents: Tensor = given["latents"]
            z = convention.states(latents.to(torch.float32), levels[k])
            moved, _ = guide(z.flatten(1), levels[k:], tuple(latents.shape))
            given["latents"] = convention.tensor(moved.reshape(latents.shape), levels[k]).to(latents.dtype)
        return given

    return callback


def _window(guide_from: int | None, guide_to: int | None, steps: int) -> tuple[int, int]:
    """The guided steps, of which step 0 is none."""
    usual = window_of(steps)
    first = max(1, usual[0]) if guide_from is None else _checks.index("guide_from", guide_from, steps)
    last = usual[1] if guide_to is None else _checks.index("guide_to", guide_to, steps)
    if not 1 <= first <= last:
        raise ValueError(f"guide_from must be from 1 and not after guide_to, got {first} and {last}")
    return first, last


def _place(scheduler: Any, time: Any, times: list[float]) -> int:
    """The number of a step in the grid that levels were made for."""
    if scheduler.timesteps.tolist() != times:
        raise ValueError(
            f"the pipeline must run with the {len(times)} steps that the callback was made for, and with its "
            f"scheduler's own grid, got {len(scheduler.timesteps)} others"
        )
    return times.index(float(time))
