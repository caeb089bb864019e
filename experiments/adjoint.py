"""Adjoint gradients of a trained network's sampler: how far each product is off, and what guidance makes of it.

Products are compared with the closed form of the mixture, gradients with the unrolled sampler. The reward is how near a
sample comes to a real digit seen at a quarter of its resolution.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
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

STATES, STEPS, DIGIT = 64, 50, 3
GRID = (0.1, 0.2, 0.3, 0.4, 0.5)  # the paper's strengths
WAYS = ("none", "paper", "centred", "calibrated", "Gaussian", "Gaussian, traced", "secant", "difference", "vjp")
PARTS = 1 + (len(WAYS) + 1) * len(GRID)


def measure(truth: Truth, trace: TraceModel, advance: Callable[[str], None]) -> dict[str, Any]:
    """Errors along trajectories, and guidance at all strengths."""
    reward, single = _reward(), _ways(truth, trace, torch.float32) | {"unrolled": "unrolled"}
    found = _errors(truth, trace, reward)
    advance("errors along trajectories")
    rows = {}
    for name in (*WAYS, "unrolled"):
        rows[name] = [_guided(truth, reward, single[name], strength) for strength in GRID]
        for _ in GRID:
            advance(name)
    return {"states": STATES, "steps": STEPS, "levels": found, "guidance": rows}


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


def _errors(truth: Truth, trace: TraceModel, reward: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
    """Of products with the gradient that arrives, and of the gradient from each level on."""
    start = RHO[1] * torch.randn((STATES, truth.samples.shape[1]), generator=torch.Generator().manual_seed(3)).double()
    path = run(truth.network, scheme("ddim", _levels()), start)
    end = path.end.requires_grad_()
    gradient = torch.autograd.grad(-reward(end).sum(), end)[0]
    ways, exact = _ways(truth, trace, torch.float64), Exact(truth.prior)
    at = sorted({int(np.argmin([abs(np.log(path.rho(i) / rho)) for i in range(STEPS)])) for rho in levels()})
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
    i = min(i, STEPS - 1)
    shorter = scheme("ddim", path.scheme.rhos[i:])
    parts = path.times[i:], path.states[i:], path.noises[i:], path.end
    return Trajectory(path.network, shorter, path.shape, *parts)


def _moved(product: Product, whole: Trajectory, first: int) -> Product:
    """The product of the whole trajectory, for one that begins later: it knows the states before."""
    return lambda _, i, v: product(whole, first + i, v)


def _off(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).median().item()


def _guided(
    truth: Truth, reward: Callable[[Tensor], Tensor], product: Product | str, strength: float
) -> dict[str, float]:
    """One run of the paper's protocol in single precision [MATH 5.3]; the exact density shows what is forced."""
    start = RHO[1] * torch.randn((STATES, truth.samples.shape[1]), generator=torch.Generator().manual_seed(4))
    options: dict[str, Any] = {"product": product, "strength": strength}
    begin = time.perf_counter()
    try:
        found = guided_sample(truth.network, lambda x: -reward(x), start, _levels(), **options).x
    except ValueError as error:
        if "finite" not in str(error):
            raise
        return {"strength": strength} | dict.fromkeys(("reward", "log density", "seconds"), math.nan)
    seconds = time.perf_counter() - begin
    density = truth.prior.diffuse(1.0, RHO[0]).log_density(found.double()) / start.shape[1]
    numbers = {"reward": reward(found).mean().item(), "log density": density.median().item(), "seconds": seconds}
    return {"strength": strength} | numbers


def _levels() -> tuple[float, ...]:
    """50 steps to the lowest level: a last step to no noise would have no gradient at all where P is left out."""
    return noise_levels(RHO[1], RHO[0], STEPS)


def tables(result: dict[str, Any]) -> list[output.Table]:
    """Products, gradients, and the best strength of each way."""
    found = result["levels"]
    products = output.Table(
        "Median error of F v beside the exact product, v the gradient that arrives (DDIM, 50 steps)",
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


def figure(result: dict[str, Any]) -> Any:
    """Errors of products and gradients against the noise level, and reward against time."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13.8, 4.4), layout="constrained")
    errors, cosines, rewards = drawn.subplots(1, 3)
    rho = [level["rho"] for level in result["levels"]]
    for way in WAYS:
        errors.loglog(rho, [level["products"][way] for level in result["levels"]], marker="o", markersize=3, label=way)
        cosines.semilogx(rho, [level["gradients"][way][1] for level in result["levels"]], marker="o", markersize=3)
    for name, runs in result["guidance"].items():
        finite = [one for one in runs if math.isfinite(one["reward"])]
        if finite:
            rewards.semilogx([_seconds(finite)] * len(finite), [one["reward"] for one in finite], "o", label=name)
    errors.set(xlabel=r"$\rho$", ylabel="median relative error", title="Products F v")
    cosines.set(xlabel=r"$\rho$", ylabel="median cosine", title="Gradient beside the unrolled sampler's")
    rewards.set(xlabel="seconds", ylabel="mean reward", title="Guidance, five strengths each")
    errors.legend(fontsize="small")
    rewards.legend(fontsize="small")
    return drawn
