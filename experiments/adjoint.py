"""Adjoint gradients of a trained network's sampler: how far each product is off, and what guidance makes of it.

Products are compared with the closed form of the mixture, gradients with the unrolled sampler. The reward is how near a
sample comes to a real digit seen at a quarter of its resolution.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from dfmath.experiments import output
from dfmath.experiments.truth import RHO, Truth, levels
from dfmath.integrations.adjoint import Trajectory, adjoint, run
from dfmath.integrations.data_covariance import DataCovariance
from dfmath.integrations.guidance import guided_sample
from dfmath.integrations.products import Calibrated, Exact, Gaussian, Product, Secant, product_of
from dfmath.integrations.trace_model import TraceModel

from dfmath.datasets import digits
from dfmath.solvers import noise_levels, scheme

Tensor: TypeAlias = torch.Tensor

QUESTION = (
    "How far off are adjoint gradients of a trained network's sampler [MATH 5.1, 5.2], by every product with F: "
    "product by product beside the mixture's closed form, from a level to the end beside the unrolled sampler; and "
    "what does guidance by the paper's protocol [MATH 5.3] make of each?"
)
DIGIT = 3  # whose low resolution is aimed at
WAYS = ("none", "paper", "centred", "calibrated", "Gaussian", "Gaussian, traced", "secant", "difference", "vjp")


@dataclass(frozen=True)
class Plan:
    """How much there is of everything; the paper's steps, window of guidance and strengths."""

    states: int = 64
    steps: int = 50
    window: tuple[int, int] = (15, 35)
    grid: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    levels: int = 10

    @property
    def parts(self) -> int:
        """Of the work."""
        return 1 + (len(WAYS) + 1) * len(self.grid)


FULL = Plan()
QUICK = Plan(states=16, steps=15, window=(5, 10), grid=(0.1, 0.3), levels=5)


def measure(plan: Plan, truth: Truth, trace: TraceModel, advance: Callable[[str], None]) -> dict[str, Any]:
    """Errors along trajectories, and guidance at all strengths."""
    reward, single = _reward(), _ways(truth, trace, torch.float32) | {"unrolled": "unrolled"}
    found = _errors(plan, truth, trace, reward)
    advance("errors along trajectories")
    rows = {}
    for name in (*WAYS, "unrolled"):
        rows[name] = [_guided(plan, truth, reward, single[name], strength) for strength in plan.grid]
        for _ in plan.grid:
            advance(name)
    return {"levels": found, "guidance": rows}


def _ways(truth: Truth, trace: TraceModel, dtype: torch.dtype) -> dict[str, Product | str]:
    """The products by name, for states of this dtype."""
    covariance = DataCovariance.from_batches([truth.samples.to(dtype)])
    named: dict[str, Product | str] = {name: name for name in ("none", "paper", "centred", "difference", "vjp")}
    model = {"Gaussian": Gaussian(covariance), "Gaussian, traced": Gaussian(covariance, trace)}
    return named | {"calibrated": Calibrated(trace), "secant": Secant(covariance)} | model


def _reward() -> Callable[[Tensor], Tensor]:
    """Minus the root mean square, over 16 patches of 2 x 2, of what the mean of a patch is off a real digit's, (B,)."""
    target = _patches(torch.from_numpy(digits()[DIGIT : DIGIT + 1]))

    def reward(x: Tensor) -> Tensor:
        return -(_patches(x) - target.to(x)).square().mean(dim=1).sqrt()

    return reward


def _patches(x: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(x.reshape(-1, 1, 8, 8), 2).flatten(1)


def _errors(plan: Plan, truth: Truth, trace: TraceModel, reward: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
    """Of products with the gradient that arrives, and of the gradient from each level on."""
    start = _start(plan, truth, seed=3).double()
    path = run(truth.network, scheme("ddim", _levels(plan)), start)
    end = path.end.requires_grad_()
    gradient = torch.autograd.grad(-reward(end).sum(), end)[0]
    ways, exact = _ways(truth, trace, torch.float64), Exact(truth.prior)
    at = sorted(
        {int(np.argmin([abs(np.log(path.rho(i) / rho)) for i in range(plan.steps)])) for rho in levels(plan.levels)}
    )
    return [_errors_at(path, i, gradient, ways, exact) for i in at]


def _errors_at(
    path: Trajectory, i: int, gradient: Tensor, ways: dict[str, Product | str], exact: Product
) -> dict[str, Any]:
    rest = _rest(path, i)
    true, v = adjoint(rest, gradient, "vjp"), adjoint(_rest(path, i + 1), gradient, "vjp")
    wanted, products, gradients = exact(path, i, v), {}, {}
    for name in WAYS:
        found = product_of(ways[name])(path, i, v)
        products[name] = _off(found, wanted)
        whole = adjoint(rest, gradient, _moved(product_of(ways[name]), path, i))
        gradients[name] = (_off(whole, true), torch.cosine_similarity(whole, true, dim=1).median().item())
    return {"rho": path.rho(i), "products": products, "gradients": gradients}


def _rest(path: Trajectory, i: int) -> Trajectory:
    """The trajectory from evaluation i on; where nothing is left, the last step."""
    i = min(i, len(path.states) - 1)
    shorter = scheme("ddim", path.scheme.rhos[i:])
    parts = path.times[i:], path.states[i:], path.noises[i:], path.end
    return Trajectory(path.network, shorter, path.shape, *parts)


def _moved(product: Product, whole: Trajectory, first: int) -> Product:
    """The product of the whole trajectory, for one that begins later: it knows the states before."""
    return lambda _, i, v: product(whole, first + i, v)


def _off(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).median().item()


def _guided(
    plan: Plan, truth: Truth, reward: Callable[[Tensor], Tensor], product: Product | str, strength: float
) -> dict[str, float]:
    """One run of the paper's protocol in single precision [MATH 5.3]; the exact density shows what is forced."""
    start, (first, last) = _start(plan, truth, seed=4), plan.window
    options: dict[str, Any] = {"product": product, "strength": strength, "guide_from": first, "guide_to": last}
    begin = time.perf_counter()
    try:
        found = guided_sample(truth.network, lambda x: -reward(x), start, _levels(plan), **options).x
    except ValueError as error:
        if "finite" not in str(error):
            raise
        return {"strength": strength} | dict.fromkeys(("reward", "log density", "seconds"), math.nan)
    seconds = time.perf_counter() - begin
    density = truth.prior.diffuse(1.0, RHO[0]).log_density(found.double()) / start.shape[1]
    numbers = {"reward": reward(found).mean().item(), "log density": density.median().item(), "seconds": seconds}
    return {"strength": strength} | numbers


def _start(plan: Plan, truth: Truth, seed: int) -> Tensor:
    """Noise at the highest level, in single precision, (states, d)."""
    shape = (plan.states, truth.samples.shape[1])
    return RHO[1] * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _levels(plan: Plan) -> tuple[float, ...]:
    """Steps to the lowest level: a last step to no noise would have no gradient at all where P is left out."""
    return noise_levels(RHO[1], RHO[0], plan.steps)


def tables(result: dict[str, Any]) -> list[output.Table]:
    """Products, gradients, and the best strength of each way."""
    found = result["levels"]
    products = output.Table(
        "Median error of F v beside the exact product, v the gradient that arrives (DDIM, "
        f"{result['settings']['steps']} steps)",
        ("rho", *WAYS),
        [(level["rho"], *(level["products"][way] for way in WAYS)) for level in found],
    )
    gradients = output.Table(
        "Gradient from a level to the end beside the unrolled sampler's: median relative error, cosine",
        ("rho", *WAYS),
        [(level["rho"], *(_pair(level["gradients"][way]) for way in WAYS)) for level in found],
    )
    rows = [_best(name, runs, result) for name, runs in result["guidance"].items()]
    title = (
        "Guidance towards a digit at low resolution, at the best of the paper's strengths: mean reward, median exact "
        "log density per dimension, time in that of vjp"
    )
    return [products, gradients, output.Table(title, ("product", "strength", "reward", "log density", "time"), rows)]


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:.2g}, {values[1]:.3f}"


def _best(name: str, runs: list[dict[str, float]], result: dict[str, Any]) -> tuple[Any, ...]:
    finite = [one for one in runs if math.isfinite(one["reward"])]
    if not finite:
        return (name, "none finite", "", "", "")
    best = max(finite, key=lambda one: one["reward"])
    time_of = _seconds(finite) / _seconds(result["guidance"]["vjp"])
    return (name, best["strength"], best["reward"], best["log density"], time_of)


def _seconds(runs: list[dict[str, float]]) -> float:
    return statistics.median(one["seconds"] for one in runs if math.isfinite(one["seconds"]))


def seen(result: dict[str, Any]) -> str:
    """Say what the numbers say."""
    highest = max(result["levels"], key=lambda level: level["rho"])
    cosines = {way: highest["gradients"][way][1] for way in WAYS}
    said = ", ".join(f"{cosines[way]:.2f} {way}" for way in sorted(WAYS, key=lambda way: -cosines[way]))
    best = {name: max((run["reward"] for run in runs), key=_or_lowest) for name, runs in result["guidance"].items()}
    rewards = ", ".join(f"{best[name]:.3f} {name}" for name in sorted(best, key=lambda name: -_or_lowest(best[name])))
    return (
        f"Median cosine of the gradient from rho = {highest['rho']:.3g} on with the unrolled sampler's: {said}. Best "
        f"mean reward of guidance: {rewards}."
    )


def _or_lowest(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def figure(result: dict[str, Any]) -> Any:
    """Errors of products and gradients against the noise level, and reward against time."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13.8, 4.4), layout="constrained")
    panels = errors, cosines, rewards = drawn.subplots(1, 3)
    for axes in panels:
        axes.set_prop_cycle(color=[*output.COLOURS, "0.5", "0.75"], marker=list("os^vDPX<>*"))
    rho = [level["rho"] for level in result["levels"]]
    for way in WAYS:
        errors.loglog(rho, [level["products"][way] for level in result["levels"]], markersize=4, label=way)
        cosines.semilogx(rho, [level["gradients"][way][1] for level in result["levels"]], markersize=4)
    for name, runs in result["guidance"].items():
        finite = [one for one in runs if math.isfinite(one["reward"])]
        if finite:
            rewards.semilogx(
                [_seconds(finite)] * len(finite), [one["reward"] for one in finite], linestyle="", label=name
            )
    errors.set(xlabel=r"noise-to-signal ratio $\rho$", ylabel="median relative error", title="Products F v")
    cosines.set(
        xlabel=r"noise-to-signal ratio $\rho$", ylabel="median cosine", title="Gradient beside the unrolled sampler's"
    )
    rewards.set(
        xlabel="seconds", ylabel="mean reward", title=f"Guidance, {len(result['settings']['grid'])} strengths each"
    )
    drawn.legend(*rewards.get_legend_handles_labels(), fontsize="small", loc="outside right center")
    return drawn
