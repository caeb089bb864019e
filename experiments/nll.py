"""Log-likelihoods of a trained network beside the exact ones, by every way to take the trace."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from dfmath.benchmarks import timing
from dfmath.experiments import output
from dfmath.experiments.truth import LEVELS, RHO, Truth, noised
from dfmath.integrations.likelihood import NetworkLikelihood, network_log_likelihood
from dfmath.integrations.trace_model import Form, TraceModel

Tensor: TypeAlias = torch.Tensor

QUESTION = (
    "How far are log-likelihoods of a trained network from the exact ones, by every way to take the trace [MATH 2.4], "
    "and what do they cost? The mixture that it was trained on knows its density at every state; at the highest noise "
    "the density is the mixture's own, so that the error is that of the change along the flow."
)
NETWORK = "network"  # one evaluation of it, the unit of time
WAYS = ("exact", "local-loss", "paper", "hutchinson, 1 probe", "hutchinson, 8 probes", "i-mmse")
CLAIMED = "claimed standard error"


@dataclass(frozen=True)
class Plan:
    """How much there is of everything."""

    states: int = 128
    steps: int = 40  # of log rho, four evaluations each
    draws: int = 4  # pairs of noises of I-MMSE
    rounds: int = 3  # of timed calls

    @property
    def parts(self) -> int:
        """Of the work."""
        return (len(WAYS) + 1) * self.rounds


FULL = Plan()
QUICK = Plan(states=24, steps=10, draws=2, rounds=2)


def measure(plan: Plan, truth: Truth, models: dict[Form, TraceModel], advance: Callable[[str], None]) -> dict[str, Any]:
    """Likelihoods at the lowest level, carried up to the highest one, where the density is exact."""
    rho, dim = LEVELS[0], truth.samples.shape[1]
    _, x = noised(truth, rho, plan.states, seed=2)
    exact = truth.prior.diffuse(1.0, rho).log_density(x)
    results: dict[str, NetworkLikelihood] = {}

    def carry(name: str, options: dict[str, Any]) -> None:
        results[name] = _likelihood(truth, x, options)

    ways = {name: partial(carry, name, options) for name, options in _ways(plan, models).items()}
    seconds = _seconds(ways | {NETWORK: lambda: truth.network.noise(x, rho)}, plan.rounds, advance)
    rows = {}
    for name, found in results.items():
        off = (found.log_density - exact) / dim
        rows[name] = {
            "mean error": off.mean().item(),
            "median absolute error": off.abs().median().item(),
            "standard deviation": off.std().item(),
            CLAIMED: (found.standard_error / dim).median().item(),
            "evaluations": int(found.evaluations[0]),
            "time of an evaluation": seconds[name] / int(found.evaluations[0]) / seconds[NETWORK],
        }
    nats = (exact / dim).mean().item()
    return {"rho": [rho, RHO[1]], "exact nats per dimension": nats, "ways": rows}


def _ways(plan: Plan, models: dict[Form, TraceModel]) -> dict[str, dict[str, Any]]:
    ways: dict[str, dict[str, Any]] = {
        "exact": {"trace": "exact"},
        **{form: {"trace": model} for form, model in models.items()},
        "hutchinson, 1 probe": {"trace": "hutchinson", "probes": 1},
        "hutchinson, 8 probes": {"trace": "hutchinson", "probes": 8},
    }
    flows = {name: options | {"steps": plan.steps} for name, options in ways.items()}
    return flows | {"i-mmse": {"trace": "i-mmse", "probes": plan.draws}}


def _likelihood(truth: Truth, x: Tensor, options: dict[str, Any]) -> NetworkLikelihood:
    """To the highest level, where the density is taken from the mixture."""
    terminal = truth.prior.diffuse(1.0, RHO[1]).log_density
    return network_log_likelihood(truth.network, x, LEVELS[0], RHO[1], terminal=terminal, **options)


def _seconds(calls: dict[str, Callable[[], Any]], rounds: int, advance: Callable[[str], None]) -> dict[str, float]:
    """Median time of each, by turns, so that a slow spell of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name] += timing.interleaved({name: call}, 1, rest=0.0)[name]
            advance(name)
    return {name: statistics.median(found) for name, found in seconds.items()}


def tables(result: dict[str, Any]) -> list[output.Table]:
    """One row for each way."""
    columns = list(next(iter(result["ways"].values())))
    rho, asked = result["rho"], result["settings"]
    columns[columns.index(CLAIMED)] = f"{CLAIMED} (of the trace alone; one probe tells none)"
    title = (
        f"Log-likelihood less the exact one, nats per dimension, of {asked['states']} states at rho = {rho[0]:g} "
        f"(exact: {result['exact nats per dimension']:.4g}); {asked['steps']} steps to rho = {rho[1]:g}, where the "
        f"density is the mixture's own and not a network's; time in evaluations of the network, median of "
        f"{asked['rounds']} runs"
    )
    return [output.Table(title, ("trace", *columns), [_row(way, row) for way, row in result["ways"].items()])]


def _row(way: str, row: dict[str, float]) -> tuple[Any, ...]:
    return (way, *("unknown" if name == CLAIMED and math.isnan(value) else value for name, value in row.items()))


def seen(result: dict[str, Any]) -> str:
    """Say what the numbers say."""
    rows = result["ways"]
    order = sorted(rows, key=lambda way: rows[way]["median absolute error"])
    said = [f"{rows[way]['median absolute error']:.3g} by {way} ({_cost(rows[way]):.3g})" for way in order]
    return (
        "Median error in nats per dimension, and time in evaluations of the network: "
        f"{'; '.join(said)}. The exact value is {result['exact nats per dimension']:.3f} on average."
    )


def _cost(row: dict[str, float]) -> float:
    """Time in evaluations of the network."""
    return row["time of an evaluation"] * row["evaluations"]


def figure(result: dict[str, Any]) -> Any:
    """Errors against time."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = drawn.subplots()
    for (way, row), colour, marker in zip(result["ways"].items(), output.COLOURS, "os^vDP", strict=False):
        axes.loglog(_cost(row), row["median absolute error"], marker, color=colour, label=way)
    axes.set_xlabel("time, in evaluations of the network")
    axes.set_ylabel("median error, nats per dimension")
    axes.set_title(
        "Likelihoods of a trained network beside the truth,\nthe density at the highest noise known", fontsize="medium"
    )
    axes.legend()
    return drawn
