"""How far traces of a trained network's Fisher are from the truth, and what they cost: heads, Hutchinson, autodiff.

Errors are in units of d/sigma^2, the trace of F where data say nothing: sigma^2 |T - tr F|/d.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from dfmath.benchmarks import timing
from dfmath.experiments import output
from dfmath.experiments.truth import RHO, Truth, levels, noised
from dfmath.integrations.adjoint import run
from dfmath.integrations.trace_matching import train_trace_model
from dfmath.integrations.trace_model import Form, TraceModel
from dfmath.integrations.training import TrainingPlan

from dfmath import bounds
from dfmath.approximations import EndpointFisher
from dfmath.solvers import scheme

Tensor: TypeAlias = torch.Tensor

QUESTION = (
    "How far are traces of a trained network's Fisher from the truth, by trace heads [MATH 4.1, 4.3], Hutchinson's "
    "estimator [MATH 4.7] and the exact trace of the network's Jacobian; what do they cost; and how much of the bounds "
    "[MATH 4.2, 4.3, 4.5] do the errors use up? One network and one head of each form, each trained from one seed: how "
    "results vary between trainings is not measured. Hutchinson's estimator is dfmath's own."
)
WAYS = ("local-loss", "paper", "Hutchinson, 1 probe", "Hutchinson, 8 probes", "exact autodiff")


@dataclass(frozen=True)
class Plan:
    """How much there is of everything."""

    states: int = 512  # at each noise level
    dense: int = 64  # of them with dense matrices
    to_the_end: int = 100  # steps of Heun from a state to the end
    levels: int = 10
    rounds: int = 5  # of timed calls

    @property
    def parts(self) -> int:
        """Of the work."""
        return self.levels


FULL = Plan()
QUICK = Plan(states=96, dense=8, to_the_end=15, levels=6, rounds=2)


@dataclass(frozen=True)
class Exact:
    """What the mixture says at noised states (alpha = 1)."""

    trace: Tensor  # tr F, (n,)
    mean: Tensor  # (n, d)
    noise: Tensor  # eps*, (n, d)
    second_moment: Tensor  # E[|x0|^2 given x], (n,)


def exact(truth: Truth, x: Tensor, rho: float) -> Exact:
    """Evaluate the closed forms."""
    q = truth.prior.diffuse(1.0, rho)
    mean, posterior = q.posterior_mean(x), q.fisher(x).posterior_covariance()
    noise = (x - mean) / rho
    return Exact(q.fisher(x).trace(), mean, noise, posterior.trace() + mean.square().sum(dim=1))


def heads(
    truth: Truth, progress: Callable[[str], None] | None = None, forms: tuple[Form, ...] = ("local-loss", "paper")
) -> dict[Form, TraceModel]:
    """Train heads, or load them where they were trained before."""
    plan = head_plan(truth.quick)
    return {
        form: train_trace_model(
            truth.network,
            truth.samples,
            plan,
            form,
            rho=RHO,
            features="norm",
            batch=256,
            checkpoint=truth.cache / f"digits-trace-{form}-{plan.steps}.safetensors",
            progress=progress,
        ).model
        for form in forms
    }


def head_plan(quick: bool) -> TrainingPlan:
    """Of a head."""
    return TrainingPlan(
        steps=200 if quick else 6000, rate=2e-3, warmup=50 if quick else 200, averaging=0.999, every=1000, seed=0
    )


def measure(plan: Plan, truth: Truth, models: dict[Form, TraceModel], advance: Callable[[str], None]) -> dict[str, Any]:
    """Errors and bounds at every level, and what one trace costs."""
    found = [_level(plan, truth, models, rho, advance) for rho in levels(plan.levels)]
    return {"levels": found, "cost": _costs(plan, truth, models)}


def _level(
    plan: Plan, truth: Truth, models: dict[Form, TraceModel], rho: float, advance: Callable[[str], None]
) -> dict[str, Any]:
    _, x = noised(truth, rho, plan.states, seed=0)
    known, dim = exact(truth, x, rho), x.shape[1]
    traces = {name: way(x) for name, way in _ways(truth, models, rho).items()}
    off = {name: rho**2 / dim * (trace - known.trace).abs() for name, trace in traces.items()}
    advance(f"rho = {rho:.3g}")
    return {
        "rho": rho,
        "trace": (rho**2 / dim * known.trace).median().item(),
        "median": {name: part.median().item() for name, part in off.items()},
        "largest": {name: part.max().item() for name, part in off.items()},
        "bounds": _bounds(plan, truth, traces, known, x, rho),
    }


def _ways(truth: Truth, models: dict[Form, TraceModel], rho: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """How each trace is taken at states x."""

    def stochastic(x: Tensor, probes: int) -> Tensor:
        v = rademacher((*x.shape, probes), x)
        return (v * (truth.network.fisher(x, rho) @ v)).sum(dim=1).mean(dim=1)

    return {
        **{form: partial(model, t=rho) for form, model in models.items()},
        "Hutchinson, 1 probe": partial(stochastic, probes=1),
        "Hutchinson, 8 probes": partial(stochastic, probes=8),
        "exact autodiff": lambda x: truth.network.fisher(x, rho).trace(),
    }


def rademacher(shape: tuple[int, ...], like: Tensor, seed: int = 0) -> Tensor:
    """Random signs."""
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randint(0, 2, shape, generator=generator) - 1.0).to(like)


def _bounds(
    plan: Plan, truth: Truth, traces: dict[str, Tensor], known: Exact, x: Tensor, rho: float
) -> dict[str, float]:
    """Largest error over its bound, with d1 and d2 measured at each state; R is that of the posterior there."""
    dim, noise = x.shape[1], truth.network.noise(x, rho)
    d2 = (noise - known.noise).norm(dim=1)
    return {
        "4.2": _share_of_bound_42(traces["paper"], known, (x - rho * noise), d2, rho),
        "4.3": _share_of_bound_43(traces["local-loss"], known, d2, rho, dim),
        "4.5": _share_of_bound_45(plan, truth, known, x, d2, rho),
    }


def _share_of_bound_42(trace: Tensor, known: Exact, mean: Tensor, d2: Tensor, rho: float) -> float:
    dim = mean.shape[1]
    predicted = (rho**2 * dim - rho**4 * trace + mean.square().sum(dim=1)) / dim
    d1 = (predicted - known.second_moment / dim).abs()
    bound = bounds.trace_matching_error(_numpy(d1), _numpy(d2), _numpy(known.mean.norm(dim=1)), 1.0, rho, dim)
    return _largest_share(trace - known.trace, bound)


def _share_of_bound_43(trace: Tensor, known: Exact, d2: Tensor, rho: float, dim: int) -> float:
    loss = dim - rho**2 * known.trace + d2.square()  # E[|eps - eps_th|^2 given x]
    d1 = (dim - rho**2 * trace - loss).abs() / dim
    return _largest_share(trace - known.trace, bounds.local_loss_error(_numpy(d1), _numpy(d2), rho, dim))


def _share_of_bound_45(plan: Plan, truth: Truth, known: Exact, x: Tensor, d2: Tensor, rho: float) -> float:
    some = slice(0, plan.dense)
    grid = scheme("heun", np.geomspace(rho, RHO[0], 1 + plan.to_the_end).tolist())
    end = run(truth.network, grid, x[some]).end
    claimed = EndpointFisher(end, truth.network.posterior_mean(x[some], rho), 1.0, rho, "paper").to_dense()
    off = (claimed - truth.prior.diffuse(1.0, rho).fisher(x[some]).to_dense()).norm(dim=(1, 2))
    # The proof needs |xh|^2 <= R^2 and E[|x0|^2 given x] <= R^2, and no more of the support.
    radius = torch.maximum(end.square().sum(dim=1), known.second_moment[some]).sqrt()
    return _largest_share(off, bounds.endpoint_error(_numpy(radius), _numpy(d2[some]), 1.0, rho))


def _largest_share(off: Tensor, bound: Any) -> float:
    return float((np.abs(_numpy(off)) / bound).max())


def _numpy(values: Tensor) -> Any:
    return values.detach().numpy()


def _costs(plan: Plan, truth: Truth, models: dict[Form, TraceModel]) -> dict[str, float]:
    """Time of one trace, or of noise and trace where they come together, over that of one evaluation."""
    _, x = noised(truth, 1.0, plan.states, seed=1)
    calls = {"network": lambda: truth.network.noise(x, 1.0)}
    calls |= {name: partial(way, x) for name, way in _ways(truth, models, 1.0).items()}
    seconds = timing.interleaved(calls, plan.rounds, rest=0.0)
    return {name: statistics.median(part) / statistics.median(seconds["network"]) for name, part in seconds.items()}


def tables(result: dict[str, Any]) -> list[output.Table]:
    """Errors, bounds and costs."""
    found = result["levels"]
    errors = output.Table(
        f"Median error of the trace, sigma^2 |T - tr F|/d, {result['settings']['states']} states at each level",
        ("rho", "sigma^2 tr F/d", *WAYS),
        [(level["rho"], level["trace"], *(level["median"][way] for way in WAYS)) for level in found],
    )
    shares = output.Table(
        "Largest error over its bound. d1 and d2 are measured at each state, d1 from the very trace that is bounded: "
        "4.2 and 4.3 are triangle inequalities then, which cannot fail and say nothing of the head",
        ("rho", "4.2 paper", "4.3 local loss", "4.5 DF-EA"),
        [(level["rho"], *(level["bounds"][name] for name in ("4.2", "4.3", "4.5"))) for level in found],
    )
    costs = output.Table(
        "Time, in evaluations of the network (heads: noise and trace together)",
        WAYS,
        [[result["cost"][way] for way in WAYS]],
    )
    return [errors, shares, costs]


def seen(result: dict[str, Any]) -> str:
    """Say what the numbers say."""
    found, cost = result["levels"], result["cost"]
    best = [min(WAYS, key=lambda way, level=level: level["median"][way]) for level in found]  # type: ignore[misc]
    wins = {way: best.count(way) for way in WAYS if way in best}
    nearest = ", ".join(f"{way} at {count} of {len(found)} levels" for way, count in wins.items())
    times = ", ".join(f"{cost[way]:.3g} {way}" for way in WAYS)
    shares = [share for level in found for share in level["bounds"].values()]
    return (
        f"Nearest to the truth: {nearest}. One trace takes, in evaluations of the network: {times}. The largest ratio "
        f"of error to bound is {max(shares):.3g}; that of 4.2 and 4.3 is at most 1 by construction."
    )


def figure(result: dict[str, Any]) -> Any:
    """Errors against the noise level."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = drawn.subplots()
    rho = [level["rho"] for level in result["levels"]]
    for way, colour, marker in zip(WAYS, output.COLOURS, "os^vD", strict=False):
        median = [level["median"][way] for level in result["levels"]]
        axes.loglog(rho, median, color=colour, marker=marker, markersize=4, label=way)
    axes.set_xlabel(r"noise-to-signal ratio $\rho$")
    axes.set_ylabel(r"median $\sigma^2\,|T - \mathrm{tr}F|\,/\,d$")
    axes.set_title("Traces of a trained network beside the truth")
    axes.legend()
    return drawn
