"""Guidance inside a pipeline's own run, through its callback at the end of steps [MATH 5.3]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from dfmath.integrations.diffusers.conventions import convention_of
from dfmath.integrations.diffusers.guided import Reward, pipeline_levels
from dfmath.integrations.diffusers.latents import decoded
from dfmath.integrations.guidance import Guide, Normalisation
from dfmath.integrations.products import Product
from dfmath.integrations.torch import ScoreNetwork

from dfmath import _checks
from dfmath.solvers import Solver

__all__ = ["guidance_callback"]

Tensor: TypeAlias = torch.Tensor
Callback: TypeAlias = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def guidance_callback(
    pipe: Any,
    network: ScoreNetwork,
    reward: Reward,
    *,
    steps: int,
    method: Product | str = "vjp",
    guide_from: int = 15,
    guide_to: int = 35,
    strength: float = 0.2,
    normalisation: Normalisation = "rms",
    rollout_steps: int | None = None,
    solver: Solver = "ddim",
) -> Callback:
    """Return a ``callback_on_step_end`` that guides a pipeline's run, with its own scheduler, towards a reward.

    Before every step from `guide_from` to `guide_to` the latents are moved as in `guided_generate`; the steps are the
    pipeline's. Step 0 has nothing before it and cannot be guided.

    Parameters
    ----------
    pipe
        Whose scheduler takes one evaluation for each step, and whose latents are not packed.
    network
        From `network_of`, with the run's prompt and guidance.
    reward
        Of images (B, 3, H, W), about [0, 1]; returns one number for each, (B,), and differentiates.
    steps
        That the pipeline will be called with.
    method, guide_from, guide_to, strength, normalisation, rollout_steps, solver
        As of `dfmath.integrations.guidance.guided_sample`; the solver is that of rollouts.

    Raises
    ------
    TypeError, ValueError
        If something does not fit.
    """
    if type(pipe).__name__.startswith("Flux"):
        raise ValueError("pipe must not pack its latents, as Flux does: use guided_generate")
    if pipe.scheduler.order != 1:
        raise ValueError(f"pipe's scheduler must take one evaluation for each step, got {pipe.scheduler.order}")
    convention, levels = convention_of(pipe.scheduler), pipeline_levels(pipe, network.schedule, steps)
    last = len(levels) - 2
    if not 1 <= _checks.index("guide_from", guide_from, last + 1) <= _checks.index("guide_to", guide_to, last + 1):
        raise ValueError(f"guide_from must be from 1 and not after guide_to, got {guide_from} and {guide_to}")
    guide = Guide(network, lambda z: -reward(decoded(pipe, z)), solver, method, strength, normalisation, rollout_steps)

    def callback(running: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        k = step + 1
        if guide_from <= k <= guide_to:
            latents: Tensor = given["latents"]
            z = convention.states(latents.to(torch.float32), levels[k])
            moved, _ = guide(z.flatten(1), levels[k:], tuple(latents.shape))
            given["latents"] = convention.tensor(moved.reshape(latents.shape), levels[k]).to(latents.dtype)
        return given

    return callback
