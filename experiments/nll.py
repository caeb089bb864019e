"""Log-likelihoods of a trained network beside the exact ones, by every way to take the trace."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from dfmath.experiments import output
from dfmath.experiments.truth import LEVELS, RHO, Truth, noised
from dfmath.integrations.likelihood import NetworkLikelihood, network_log_likelihood
from dfmath.integrations.trace_model import Form, TraceModel

Tensor: TypeAlias = torch.Tensor

QUESTION = (
    "How far are log-likelihoods of a trained network from the exact ones, by every way to take the trace [MATH 2.4], "
    "and what do they cost? The mixture that it was trained on knows its density at every state."
)
WAYS = ("exact", "local-loss", "paper", "hutchinson, 1 probe", "hutchinson, 8 probes", "i-mmse")


@dataclass(frozen=True)
class Plan:
    """How much there is of everything."""

    states: int = 128
    steps: int = 40  # of log rho, four evaluations each
    draws: int = 4  # pairs of noises of I-MMSE

    @property
    def parts(self) -> int:
        """Of the work."""
        return len(WAYS)


FULL = Plan()
QUICK = Plan(states=24, steps=10, draws=2)


def measure(plan: Plan, truth: Truth, models: dict[Form, TraceModel], advance: Callable[[str], None]) -> dict[str, Any]:
    """Likelihoods at the lowest level, carried up to the highest one, where the density is exact."""
    rho, dim = LEVELS[0], truth.samples.shape[1]
    _, x = noised(truth, rho, plan.states, seed=2)
    exact = truth.prior.diffuse(1.0, rho).log_density(x)
    forward = _seconds(lambda: truth.network.noise(x, rho), 20)
    rows = {}
    for name, options in _ways(plan, models).items():
        found, seconds = _timed(truth, x, options)
        off = (found.log_density - exact) / dim
        rows[name] = {
            "mean error": off.mean().item(),
            "median absolute error": off.abs().median().item(),
            "standard deviation": off.std().item(),
            "claimed standard error": (found.standard_error / dim).median().item(),
            "evaluations": int(found.evaluations[0]),
            "time of an evaluation": seconds / int(found.evaluations[0]) / forward,
        }
        advance(name)
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


def _timed(truth: Truth, x: Tensor, options: dict[str, Any]) -> tuple[NetworkLikelihood, float]:
    end = RHO[1]
    terminal = truth.prior.diffuse(1.0, end).log_density
    begin = time.perf_counter()
    found = network_log_likelihood(truth.network, x, LEVELS[0], end, terminal=terminal, **options)
    return found, time.perf_counter() - begin


def _seconds(call: Callable[[], Any], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def tables(result: dict[str, Any]) -> list[output.Table]:
    """One row for each way."""
    columns = list(next(iter(result["ways"].values())))
    rho, asked = result["rho"], result["settings"]
    title = (
        f"Log-likelihood less the exact one, nats per dimension, of {asked['states']} states at rho = {rho[0]:g} "
        f"(exact: {result['exact nats per dimension']:.4g}); {asked['steps']} steps to rho = {rho[1]:g}; time in "
        "evaluations of the network"
    )
    return [output.Table(title, ("trace", *columns), [(way, *row.values()) for way, row in result["ways"].items()])]


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
    axes.set_title("Likelihoods of a trained network beside the truth")
    axes.legend()
    return drawn
