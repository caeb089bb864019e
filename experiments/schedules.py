"""One flow under five schedules: differences of end points, Jacobians, asymmetries and log densities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from dfmath.experiments import output

from dfmath import PointMasses, probability_flow
from dfmath.datasets import digits
from dfmath.flow import FlowResult
from dfmath.schedules import EDM, VE, VP, FlowMatching, Schedule, SubVP
from dfmath.transport import asymmetry, official_points

QUESTION = (
    "Does the map of the probability flow depend on the schedule? In canonical coordinates every schedule is one "
    "equation [MATH 2.2], so end points, Jacobians, their asymmetry and log densities between the same two "
    "noise-to-signal ratios are the same under all [MATH 3.3]. Here each schedule is integrated in its own time and "
    "coordinates, and compared with the canonical integration at the tightest tolerance: what differs must be the "
    "integrator's error, and shrink with it. VE in its own time is no evidence of its own: with alpha = 1 and time log "
    "rho it is the canonical integration itself, step by step."
)
MEASURES = ("end point", "Jacobian", "asymmetry", "log density")


@dataclass(frozen=True)
class Plan:
    """Starts, relative tolerances of the integrator, and the two ends."""

    starts: int = 16
    rtols: tuple[float, ...] = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
    components: int = 6
    rho_max: float = 50.0
    rho_min: float = 0.05
    seed: int = 0

    @property
    def parts(self) -> int:
        """Of the work."""
        return 2 * (1 + len(self.rtols) * (1 + len(schedules())))


FULL = Plan()
QUICK = Plan(starts=4, rtols=(1e-3, 1e-4, 1e-5), components=2)


def schedules() -> dict[str, Schedule]:
    """Return the schedules, all of which reach from rho = 0.02 to 80."""
    return {
        "VP": VP.linear(),
        "sub-VP": SubVP.linear(),
        "VE": VE(sigma_min=0.01, sigma_max=100.0),
        "EDM": EDM(),
        "flow matching": FlowMatching(),
    }


def measure(plan: Plan, advance: Callable[[str], None]) -> dict[str, Any]:
    """Differences of every schedule from the reference, at every tolerance."""
    data = {"three points": official_points(), f"digits, {plan.components} components": _projected(plan)}
    return {"data": {name: _compared(name, prior, plan, advance) for name, prior in data.items()}}


def _projected(plan: Plan) -> PointMasses:
    """The digits along their first principal components, (1797, k)."""
    points = digits() - digits().mean(axis=0)
    return PointMasses(points @ np.linalg.svd(points, full_matrices=False)[2][: plan.components].T)


def _compared(name: str, prior: PointMasses, plan: Plan, advance: Callable[[str], None]) -> dict[str, Any]:
    z = prior.diffuse(1.0, plan.rho_max).sample(plan.starts, plan.seed)
    reference = flow(prior, z, plan, None, min(plan.rtols) / 10.0)
    advance(f"{name}, reference")
    density = prior.diffuse(1.0, plan.rho_max).log_density(z)
    rows: dict[str, Any] = {}
    for label, schedule in {"canonical": None, **schedules()}.items():
        rows[label] = {}
        for rtol in plan.rtols:
            found = flow(prior, z, plan, schedule, rtol)
            exact = prior.diffuse(1.0, plan.rho_min).log_density(found.x) - density
            rows[label][f"{rtol:g}"] = _differences(found, reference, exact)
            advance(f"{name}, {label}, {rtol:g}")
    return {"schedules": rows, "reference error": float(reference.error_estimate.max())}


def flow(prior: PointMasses, z: Any, plan: Plan, schedule: Schedule | None, rtol: float) -> FlowResult:
    """Carry canonical states from rho_max to rho_min, in a schedule's own time and coordinates between the two."""
    options: dict[str, Any] = {"jacobian": True, "log_density": True, "rtol": rtol, "atol": rtol * plan.rho_min}
    if schedule is None:
        return probability_flow(prior, z, plan.rho_max, plan.rho_min, **options)
    high, low = schedule.time(plan.rho_max), schedule.time(plan.rho_min)
    before, after = float(schedule(high)[0]), float(schedule(low)[0])
    found = probability_flow(prior, before * z, high, low, schedule, native=True, **options)
    assert found.jacobian is not None and found.log_density_change is not None
    change = found.log_density_change + prior.dim * np.log(after / before)  # densities of z, not of x
    matrix = found.jacobian * (before / after)
    return FlowResult(found.x / after, matrix, change, found.evaluations, found.error_estimate / after)


def _differences(found: FlowResult, reference: FlowResult, exact: Any) -> dict[str, float]:
    """Largest over the starts; the log density beside its closed form at the end that was found."""
    assert reference.jacobian is not None and found.jacobian is not None and found.log_density_change is not None
    size = np.linalg.norm(reference.jacobian, axis=(1, 2))
    off = {
        "end point": np.linalg.norm(found.x - reference.x, axis=1),
        "Jacobian": np.linalg.norm(found.jacobian - reference.jacobian, axis=(1, 2)) / size,
        "asymmetry": np.abs(asymmetry(found.jacobian) - asymmetry(reference.jacobian)),
        "log density": np.abs(found.log_density_change - exact),
        "estimate": found.error_estimate,
    }
    return {name: float(value.max()) for name, value in off.items()} | {"evaluations": float(found.evaluations.mean())}


def tables(result: dict[str, Any]) -> list[output.Table]:
    """All schedules at the tightest tolerance, for each data set; and the end point over tolerances."""
    return [table(name, found, result) for name, found in result["data"].items() for table in (_tightest, _tolerances)]


def _tightest(name: str, found: dict[str, Any], result: dict[str, Any]) -> output.Table:
    asked = result["settings"]
    key = f"{min(asked['rtols']):g}"
    title = (
        f"{name}: largest difference from the canonical flow over {asked['starts']} starts, rho = "
        f"{asked['rho_max']:g} to {asked['rho_min']:g}, rtol = {key}; log density beside its closed form; Jacobian "
        "relative"
    )
    columns = ("schedule", *MEASURES, "integrator's estimate of the end point's error", "evaluations")
    rows = [
        (label, *(row[key][m] for m in MEASURES), row[key]["estimate"], round(row[key]["evaluations"]))
        for label, row in found["schedules"].items()
    ]
    return output.Table(title, columns, rows)


def _tolerances(name: str, found: dict[str, Any], result: dict[str, Any]) -> output.Table:
    keys = [f"{rtol:g}" for rtol in result["settings"]["rtols"]]
    rows = [
        (label, *(f"{row[key]['end point']:.1e} ({row[key]['estimate']:.0e})" for key in keys))
        for label, row in found["schedules"].items()
    ]
    title = f"{name}: difference of the end point (the integrator's estimate of its error) over rtol"
    return output.Table(title, ("schedule", *keys), rows)


def seen(result: dict[str, Any]) -> str:
    """Say what the numbers say."""
    keys = [f"{rtol:g}" for rtol in result["settings"]["rtols"]]
    loose, tight = keys[0], keys[-1]
    return " ".join(_sentence(name, found, loose, tight) for name, found in result["data"].items())


def _sentence(name: str, found: dict[str, Any], loose: str, tight: str) -> str:
    rows = found["schedules"].values()
    worst = {m: max(row[tight][m] for row in rows) for m in MEASURES}
    start = max(row[loose]["end point"] for row in rows)
    share = max(
        row[key]["end point"] / (row[key]["estimate"] + found["reference error"]) for row in rows for key in row
    )
    numbers = ", ".join(f"{value:.0e} in the {measure}" for measure, value in worst.items())
    return (
        f"{name[0].upper()}{name[1:]}: at rtol = {tight} no schedule (VE is the canonical integration itself) is "
        "off the canonical flow by more than "
        f"{numbers}; end points were off by up to {start:.0e} at rtol = {loose}, and by at most {share:.2f} of what "
        "the integrator estimates."
    )


COLOURS = (output.BLACK, *output.COLOURS[:5])
MARKERS = ("o", "s", "^", "v", "D", "P")


def figure(result: dict[str, Any]) -> Any:
    """Differences against the tolerance, a row for each data set, a panel for each measure."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(14.0, 6.4), layout="constrained")
    grid = drawn.subplots(len(result["data"]), len(MEASURES), sharex=True)
    for row, (name, found) in zip(grid, result["data"].items(), strict=True):
        for axes, measure in zip(row, MEASURES, strict=True):
            _panel(axes, found, measure)
            axes.set(title=f"{name}: {measure}")
            axes.title.set_fontsize("medium")
        row[0].set_ylabel("largest difference")
    for axes in grid[-1]:
        axes.set_xlabel("relative tolerance of the integrator")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return drawn


def _panel(axes: Any, found: dict[str, Any], measure: str) -> None:
    styles = zip(found["schedules"].items(), COLOURS, MARKERS, strict=True)
    for (label, row), colour, marker in styles:
        rtols = [float(key) for key in row]
        axes.loglog(
            rtols,
            [cell[measure] for cell in row.values()],
            color=colour,
            marker=marker,
            markersize=8 if label == "canonical" else 4,
            label=label,
        )
        if measure == "end point":
            axes.loglog(rtols, [cell["estimate"] for cell in row.values()], ":", color=colour)
    if measure == "end point":
        axes.plot([], [], ":", color="0.4", label="the integrator's estimate")
    axes.loglog(rtols, rtols, color="0.7", linewidth=0.8, label="the tolerance itself")
    axes.grid(alpha=0.25)
