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
    "what does guidance by the paper's protocol [MATH 5.3] make of each? Every product's strength is chosen on some "
    "starts, from a grid that reaches far below the paper's 0.1 to 0.5, and what it reaches is reported on others."
)
DIGIT = 3  # whose low resolution is aimed at
TUNED, FRESH = 4, 5  # seeds of the starts that strengths are chosen on, and of those that are reported
WAYS = ("none", "paper", "centred", "calibrated", "Gaussian", "Gaussian, traced", "secant", "difference", "vjp")


@dataclass(frozen=True)
class Plan:
    """How much there is of everything; the paper's steps and window of guidance."""

    states: int = 64
    steps: int = 50
    window: tuple[int, int] = (15, 35)
    grid: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of strengths
    levels: int = 10

    @property
    def parts(self) -> int:
        """Of the work."""
        return 1 + (len(WAYS) + 1) * (len(self.grid) + 1)


FULL = Plan()
QUICK = Plan(states=16, steps=15, window=(5, 10), grid=(0.02, 0.1), levels=5)


def measure(plan: Plan, truth: Truth, trace: TraceModel, advance: Callable[[str], None]) -> dict[str, Any]:
    """Errors along trajectories, and guidance at all strengths."""
    reward, single = _reward(), _ways(truth, trace, torch.float32) | {"unrolled": "unrolled"}
    found = _errors(plan, truth, trace, reward)
    advance("errors along trajectories")
    named = {name: single[name] for name in (*WAYS, "unrolled")}
    return {"levels": found, "guidance": _guidance(plan, truth, reward, named, advance)}


def _guidance(
    plan: Plan,
    truth: Truth,
    reward: Callable[[Tensor], Tensor],
    ways: dict[str, Product | str],
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """Runs at all strengths from some starts, by turns of the products; then at the best of each from fresh starts."""
    tuned: dict[str, list[Run]] = {name: [] for name in ways}
    for strength in plan.grid:
        for name, product in ways.items():
            tuned[name].append(_guided(plan, truth, reward, product, strength, TUNED))
            advance(f"{name}, {strength:g}")
    fresh = {name: _fresh(plan, truth, reward, product, tuned[name]) for name, product in ways.items()}
    for name in ways:
        advance(f"{name}, fresh starts")
    unguided = _guided(plan, truth, reward, "none", 0.0, FRESH)
    return {
        "unguided": _told(unguided, fresh["vjp"]),
        "ways": {
            name: {"tuned": [_told(run) for run in runs], "fresh": _told(fresh[name], fresh["vjp"])}
            for name, runs in tuned.items()
        },
    }


def _fresh(
    plan: Plan, truth: Truth, reward: Callable[[Tensor], Tensor], product: Product | str, tuned: list[Run]
) -> Run:
    """One more run at the strength whose mean reward was best; none where no strength gave finite states."""
    best = max(tuned, key=lambda run: _or_lowest(run.mean))
    if not math.isfinite(best.mean):
        return best
    return _guided(plan, truth, reward, product, best.strength, FRESH)


def _told(run: Run, other: Run | None = None) -> dict[str, float]:
    """Means with standard errors over the starts; with another run's also those of differences, start by start."""
    found = {"strength": run.strength, "log density": run.density, "seconds": run.seconds}
    found |= dict(zip(("reward", "error"), _mean(run.rewards), strict=True))
    if other is not None:
        found |= dict(zip(("less vjp's", "error of less"), _mean(run.rewards - other.rewards), strict=True))
    return found


def _mean(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


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


@dataclass(frozen=True)
class Run:
    """Guidance of all starts at one strength; NaN where it left the finite numbers."""

    strength: float
    rewards: Tensor  # (states,)
    density: float  # median exact log density per dimension: what is forced shows in it
    seconds: float

    @property
    def mean(self) -> float:
        """Mean reward."""
        return self.rewards.mean().item()


def _guided(
    plan: Plan,
    truth: Truth,
    reward: Callable[[Tensor], Tensor],
    product: Product | str,
    strength: float,
    seed: int,
) -> Run:
    """One run of the paper's protocol in single precision [MATH 5.3]."""
    start, (first, last) = _start(plan, truth, seed), plan.window
    options: dict[str, Any] = {"product": product, "strength": strength, "guide_from": first, "guide_to": last}
    begin = time.perf_counter()
    try:
        found = guided_sample(truth.network, lambda x: -reward(x), start, _levels(plan), **options).x
    except ValueError as error:
        if "finite" not in str(error):
            raise
        return Run(strength, torch.full((plan.states,), math.nan), math.nan, math.nan)
    seconds = time.perf_counter() - begin
    density = truth.prior.diffuse(1.0, RHO[0]).log_density(found.double()) / start.shape[1]
    return Run(strength, reward(found), density.median().item(), seconds)


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
    return [products, gradients, _chosen(result), _tuning(result)]


def _chosen(result: dict[str, Any]) -> output.Table:
    """What every product reaches from fresh starts."""
    guidance, states = result["guidance"], result["settings"]["states"]
    unguided = guidance["unguided"]
    rows = [("no guidance", "", *_reached(unguided), unguided["log density"], "")]
    rows += [_best(name, way, result) for name, way in guidance["ways"].items()]
    title = (
        f"Guidance towards a digit at low resolution from {states} fresh starts, at the strength best on {states} "
        "others: mean reward, the same less vjp's from the same starts (± standard errors), median exact log density "
        f"per dimension, and median time of {len(result['settings']['grid'])} runs in that of vjp"
    )
    return output.Table(title, ("product", "strength", "reward", "less vjp's", "log density", "time"), rows)


def _tuning(result: dict[str, Any]) -> output.Table:
    """Rewards at all strengths, on which the best were chosen."""
    rows = [
        (name, *(_estimate(run["reward"], run["error"]) for run in way["tuned"]))
        for name, way in result["guidance"]["ways"].items()
    ]
    title = "Mean reward at every strength, from the starts that strengths were chosen on"
    return output.Table(title, ("product", *(f"{strength:g}" for strength in result["settings"]["grid"])), rows)


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:.2g}, {values[1]:.3f}"


def _best(name: str, way: dict[str, Any], result: dict[str, Any]) -> tuple[Any, ...]:
    found = way["fresh"]
    if not math.isfinite(found["reward"]):
        return (name, "none finite", "", "", "", "")
    vjp = result["guidance"]["ways"]["vjp"]["tuned"]
    time_of = _seconds(way["tuned"]) / _seconds(vjp)
    strength = f"{found['strength']:g}{_at_the_edge(found['strength'], result)}"
    return (name, strength, *_reached(found), found["log density"], time_of)


def _at_the_edge(strength: float, result: dict[str, Any]) -> str:
    """A best strength at an end of the grid says that a better one may lie beyond."""
    grid = result["settings"]["grid"]
    return {min(grid): ", the least tried", max(grid): ", the most tried"}.get(strength, "")


def _reached(run: dict[str, float]) -> tuple[str, str]:
    return _estimate(run["reward"], run["error"]), _estimate(run["less vjp's"], run["error of less"])


def _estimate(mean: float, error: float) -> str:
    return f"{mean:.4f} ± {error:.4f}" if math.isfinite(mean) else "not finite"


def _seconds(runs: list[dict[str, float]]) -> float:
    return statistics.median(run["seconds"] for run in runs if math.isfinite(run["seconds"]))


def seen(result: dict[str, Any]) -> str:
    """Say what the numbers say."""
    highest = max(result["levels"], key=lambda level: level["rho"])
    cosines = {way: highest["gradients"][way][1] for way in WAYS}
    said = ", ".join(f"{cosines[way]:.2f} {way}" for way in sorted(WAYS, key=lambda way: -cosines[way]))
    runs = {name: way["fresh"] for name, way in result["guidance"]["ways"].items()}
    order = sorted(runs, key=lambda name: -_or_lowest(runs[name]["reward"]))
    rewards = ", ".join(f"{_estimate(runs[name]['reward'], runs[name]['error'])} {name}" for name in order)
    edge = [name for name in order if _at_the_edge(runs[name]["strength"], result)]
    beyond = f" Best at an end of the grid, so that others may be better: {', '.join(edge)}." if edge else ""
    return (
        f"Median cosine of the gradient from rho = {highest['rho']:.3g} on with the unrolled sampler's: {said}. Mean "
        f"reward of guidance from fresh starts, at the strengths chosen on others: {rewards}; without guidance "
        f"{result['guidance']['unguided']['reward']:.4f}.{beyond} One network and one target: this does not "
        "say how products compare elsewhere."
    )


def _or_lowest(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def figure(result: dict[str, Any]) -> Any:
    """Errors of products and gradients against the noise level, and reward against strength."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13.8, 4.4), layout="constrained")
    panels = errors, cosines, rewards = drawn.subplots(1, 3)
    for axes in panels:
        axes.set_prop_cycle(color=[*output.COLOURS, "0.5", "0.75"], marker=list("os^vDPX<>*"))
    rho = [level["rho"] for level in result["levels"]]
    for way in WAYS:
        errors.loglog(rho, [level["products"][way] for level in result["levels"]], markersize=4, label=way)
        cosines.semilogx(rho, [level["gradients"][way][1] for level in result["levels"]], markersize=4, label=way)
    _draw_rewards(rewards, result["guidance"])
    errors.set(xlabel=r"noise-to-signal ratio $\rho$", ylabel="median relative error", title="Products F v")
    cosines.set(
        xlabel=r"noise-to-signal ratio $\rho$", ylabel="median cosine", title="Gradient beside the unrolled sampler's"
    )
    drawn.legend(*rewards.get_legend_handles_labels(), fontsize="small", loc="outside right center")
    return drawn


def _draw_rewards(axes: Any, guidance: dict[str, Any]) -> None:
    """Rewards are negative: what is left to the target, on a logarithmic scale."""
    for name, way in guidance["ways"].items():
        strengths, left = ([run[key] for run in way["tuned"]] for key in ("strength", "reward"))
        axes.loglog(strengths, [-reward for reward in left], markersize=4, label=name)
    axes.axhline(-guidance["unguided"]["reward"], color="0.6", linestyle=":", label="no guidance")
    axes.set(xlabel="strength", ylabel="mean of minus the reward", title="Guidance, where strengths are chosen")
