"""How fast samplers converge, on Gaussians, whose flow has a closed form [MATH 2.2]."""

from __future__ import annotations

from typing import Any

import numpy as np
from dfmath.experiments import output

from dfmath.samplers import sample
from dfmath.solvers import noise_levels

VARIANCES = np.asarray([0.01, 0.1, 0.5, 1.0, 4.0])
START, END = 1e4, 0.2  # from noise so high that first steps, of lower order, cost nothing
STEPS = (20, 40, 80, 160, 320)
EXACT = 1e-12  # errors below which rounding shows


def measure(ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Largest relative error of every sampler over step numbers, and the order that its last halving shows."""
    start = np.sqrt(VARIANCES + START**2)
    exact = np.sqrt(VARIANCES + END**2)
    errors = {name: [_error(options, steps, start, exact) for steps in STEPS] for name, options in ways.items()}
    return {name: {"errors": found, "order": _order(found)} for name, found in errors.items()}


def _noise(z: Any, rho: float) -> Any:
    return rho * z / (VARIANCES + rho**2)


def _error(options: dict[str, Any], steps: int, start: Any, exact: Any) -> float:
    levels = noise_levels(START, END, steps, "log")
    found = sample(_noise, None, start[None], steps=levels, **options).x[0]
    return float(np.abs(found / exact - 1.0).max())


def _order(errors: list[float]) -> float:
    """Of the last two step numbers at which rounding does not show."""
    clear = [error for error in errors if error > EXACT]
    return float(np.log2(clear[-2] / clear[-1]))


def table(result: dict[str, Any]) -> output.Table:
    """One row for each sampler."""
    title = f"Largest relative error on Gaussians, from rho = {START:g} to {END:g} in even steps of log rho"
    columns = ("sampler", *(f"{n} steps" for n in STEPS), "order")
    return output.Table(title, columns, [(name, *row["errors"], row["order"]) for name, row in result.items()])


def draw(axes: Any, result: dict[str, Any], styles: dict[str, dict[str, Any]]) -> None:
    """Errors against steps, in the styles that these names have."""
    for name, row in result.items():
        axes.loglog(STEPS, row["errors"], label=f"{name}: {row['order']:.2f}", **styles[name])
    axes.set_xticks(STEPS, [str(n) for n in STEPS])
    axes.minorticks_off()
    axes.set_xlabel("steps")
    axes.set_ylabel("relative error")
    axes.set_title("error on Gaussians")
    axes.legend(fontsize="x-small", title="measured order", title_fontsize="x-small")
