"""The published transport experiment: converged, and as its discretisation has it, with and without its wrong sign."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from dfmath.experiments import output, published_scheme
from dfmath.experiments.published_scheme import MISTAKEN, PRINTED, SIGNS

from dfmath import PointMasses
from dfmath.schedules import Schedule
from dfmath.transport import OTReport, asymmetry, asymmetry_offdiagonal, official_points, official_schedules, ot_check

QUESTION = (
    "Is the map of the probability flow an optimal transport map? It is exactly where its Jacobian A is symmetric and "
    "positive semidefinite [MATH 3.1]. The paper tests that on three points in the plane, on four schedules. By the "
    "rule of canonical coordinates [MATH 2.2, 3.3] the answer cannot depend on the schedule. The published script "
    "uses the wrong sign of F in the equation of A and first-order steps [MATH 3.5]: which of the two moves its "
    "numbers?"
)
FLOOR = 1e-5  # of the off-diagonal index: below this share of A, off-diagonals are integration error
NAMES = {1: "right", -1: "published"}


@dataclass(frozen=True)
class Plan:
    """Starts, steps of the published discretisation, and the two ends."""

    starts: int = 50
    steps: tuple[int, ...] = (50, 100, 200, 500, 1000, 2000)
    rho_max: float = 80.0
    rho_min: float = 0.02
    rtol: float = 1e-9
    seed: int = 0

    @property
    def parts(self) -> int:
        """Of the work."""
        return 2 * (1 + len(official_schedules()) + len(self.steps)) + 1


FULL = Plan()
QUICK = Plan(starts=12, steps=(50, 100, 200), rtol=1e-6)


def _priors() -> dict[str, PointMasses]:
    """The published points, on and off a line, and points in space, where the sign can be seen."""
    corner = np.array([[0.5, 0.0, 0.0], [0.0, -0.5, 0.0], [0.0, 0.0, 0.4], [0.0, 0.0, 0.0]])
    return {
        "three points": official_points(),
        "three on a line": official_points(collinear=True),
        "four in space": PointMasses(corner),
    }


def measure(plan: Plan, advance: Callable[[str], None]) -> dict[str, Any]:
    """Indices of all data: converged on every schedule, converged with the wrong sign, and from steps."""
    converged, steps = {}, {}
    for name, prior in _priors().items():
        planar = prior.dim == 2
        schedules = {"canonical": None, **(official_schedules() if planar else {})}
        converged[name], starts = _converged(name, prior, schedules, plan, advance)
        if planar:
            steps[name] = _discretised(prior, starts, plan, advance)
    return {"converged": converged, "steps": steps}


def _converged(
    name: str, prior: PointMasses, schedules: dict[str, Schedule | None], plan: Plan, advance: Callable[[str], None]
) -> tuple[dict[str, Any], Any]:
    """One row for each schedule, integrated in its own time, and for each sign by SciPy; and the starts."""
    options: dict[str, Any] = {"start": "gaussian", "rtol": plan.rtol, "tolerance": max(1e-6, 100 * plan.rtol)}
    rows: dict[str, OTReport] = {}
    for label, schedule in schedules.items():
        rows[label] = ot_check(prior, plan.rho_max, plan.rho_min, plan.starts, plan.seed, schedule, **options)
        advance(f"{name}, {label}")
    starts, rtol = rows["canonical"].starts, max(plan.rtol, 1e-8)
    signs = {
        NAMES[sign]: _indices(published_scheme.converged(prior, starts, plan.rho_max, plan.rho_min, sign, rtol))
        for sign in SIGNS
    }
    found = {label: _row(report, rows["canonical"]) for label, report in rows.items()}
    return {"schedules": found, "signs": signs}, starts


def _row(report: OTReport, canonical: OTReport) -> dict[str, Any]:
    return {
        **_indices(report.jacobians),
        "min eigenvalue": float(report.min_eigenvalue.values.min()),
        "is transport": report.is_transport,
        "evaluations": report.evaluations,
        "differs": float(np.abs(report.asymmetry_offdiagonal.values - canonical.asymmetry_offdiagonal.values).max()),
    }


def _indices(matrices: Any) -> dict[str, Any]:
    """Mean and standard error of both indices."""
    both = {"off-diagonal": asymmetry_offdiagonal(matrices, FLOOR), "invariant": asymmetry(matrices)}
    return {name: [float(v.mean()), float(v.std(ddof=1) / np.sqrt(len(v)))] for name, v in both.items()}


def _discretised(prior: PointMasses, starts: Any, plan: Plan, advance: Callable[[str], None]) -> dict[str, Any]:
    """Indices by way, sign and number of steps."""
    ways = published_scheme.ways()
    rows: dict[str, Any] = {name: {NAMES[sign]: {} for sign in SIGNS} for name in ways}
    for steps in plan.steps:
        for name, way in ways.items():
            found = published_scheme.discretised(prior, way, starts, plan.rho_max, plan.rho_min, steps)
            for sign, matrices in found.items():
                rows[name][NAMES[sign]][str(steps)] = _indices(matrices)
        advance(f"{steps} steps")
    return rows


def tables(result: dict[str, Any]) -> list[output.Table]:
    """Converged values, what the sign does, and the published discretisation."""
    return [_converged_table(result), _sign_table(result), *(_steps_table(result, name) for name in result["steps"])]


def _converged_table(result: dict[str, Any]) -> output.Table:
    rows = [
        (data, name, _cell(row["off-diagonal"]), _cell(row["invariant"]), row["min eigenvalue"], row["differs"], how)
        for data, found in result["converged"].items()
        for name, row in found["schedules"].items()
        for how in [_how(name, row)]
    ]
    title = f"Converged asymmetry of the flow's Jacobian from rho = {_ends(result)}, mean and standard error"
    columns = ("data", "schedule", "off-diagonal", "rotation-invariant", "least eigenvalue", "differs by", "what it is")
    return output.Table(title, columns, rows)


def _how(name: str, row: dict[str, Any]) -> str:
    own = "own x and time, which are the canonical ones: the same run" if name == "VE" else "own x and time"
    place = "canonical z and log rho" if name == "canonical" else f"{name}'s {own}"
    return f"{row['evaluations']:.0f} evaluations in {place}: {'a' if row['is transport'] else 'no'} transport map"


def _ends(result: dict[str, Any]) -> str:
    asked = result["settings"]
    return f"{asked['rho_max']:g} to {asked['rho_min']:g}, {asked['starts']} starts"


def _sign_table(result: dict[str, Any]) -> output.Table:
    what = {
        "right": "dA = (f + (g^2/2) F) A dt, the flow's Jacobian",
        "published": "dA = (f - (g^2/2) F) A dt, which is the inverse of the transposed Jacobian, times a number",
    }
    rows = [
        (data, name, _cell(row["off-diagonal"]), _cell(row["invariant"]), what[name])
        for data, found in result["converged"].items()
        for name, row in found["signs"].items()
    ]
    title = "The sign, both equations converged by SciPy's DOP853: in the plane neither index sees it"
    return output.Table(title, ("data", "sign", "off-diagonal", "rotation-invariant", "what it is"), rows)


def _steps_table(result: dict[str, Any], data: str) -> output.Table:
    ways = published_scheme.ways()
    found, counts = result["steps"][data], [str(n) for n in result["settings"]["steps"]]
    rows = [
        (name, sign, *(_cell(row[n]["off-diagonal"]) for n in counts), ways[name].what)
        for name, signs in found.items()
        for sign, row in signs.items()
    ]
    exact = _cell(result["converged"][data]["schedules"]["canonical"]["off-diagonal"])
    title = (
        f"The published discretisation, {data}: off-diagonal asymmetry over numbers of steps, converged {exact}. The "
        f"published script, whose grid is not described, prints {PRINTED[0]:g} to {PRINTED[1]:g} off the line and 0 "
        "on it"
    )
    return output.Table(title, ("schedule", "sign", *(f"{n} steps" for n in counts), "what it is"), rows)


def _cell(value: list[float]) -> str:
    return "0" if value[0] < FLOOR else f"{value[0]:.4f} ± {value[1]:.3f}"


def seen(result: dict[str, Any]) -> str:
    """Say what the numbers say."""
    bent, found = result["converged"]["three points"], result["steps"]["three points"]
    line = result["converged"]["three on a line"]["schedules"]
    value, error = bent["schedules"]["canonical"]["off-diagonal"]
    differs = max(row["differs"] for row in bent["schedules"].values())
    straight = max(row["off-diagonal"][0] for row in line.values())
    own = [signs for name, signs in found.items() if name != MISTAKEN]
    return (
        f"The converged off-diagonal asymmetry of the three points is {value:.4f} ± {error:.3f}, no transport map; no "
        f"start differs between schedules (of which VE is the canonical run itself) by more than {differs:.0e}, and on "
        f"a line it is {_zero(straight)}. "
        f"{_said_of_the_sign(bent, result['converged']['four in space'])} The published discretisation gives "
        f"{_range(own)} on schedules with their own sigma, by its number of steps, and "
        f"{_range([found[MISTAKEN]])} where sub-VP takes VP's. These are not the published digits, whose grid of times "
        "is not described."
    )


def _said_of_the_sign(plane: dict[str, Any], space: dict[str, Any]) -> str:
    """What the wrong sign does to converged indices."""
    flat, flat_wrong = (plane["signs"][name]["off-diagonal"][0] for name in NAMES.values())
    right, wrong = (space["signs"][name]["off-diagonal"][0] for name in NAMES.values())
    return (
        "With the published sign the same equation converges to the inverse of the transposed Jacobian, whose indices "
        f"in the plane are the same (they differ by {abs(flat_wrong - flat):.0e}), while in space they are not "
        f"({right:.3f} and {wrong:.3f}): in the plane the sign shows in the error of the steps alone."
    )


def _range(rows: list[dict[str, Any]]) -> str:
    """Least and largest index over signs and steps."""
    values = [cell["off-diagonal"][0] for signs in rows for row in signs.values() for cell in row.values()]
    return f"{min(values):.2g} to {max(values):.2g}"


def _zero(value: float) -> str:
    return "0" if value < FLOOR else f"{value:.1e}"


STYLES = {"right": "-", "published": "--"}


def figure(result: dict[str, Any]) -> Any:
    """The published discretisation against its number of steps, beside the converged value; and the sign."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11.5, 4.8), layout="constrained")
    axes, bars = drawn.subplots(1, 2, width_ratios=(2.0, 1.0))
    _draw_steps(axes, result)
    _draw_signs(bars, result["converged"])
    return drawn


def _draw_steps(axes: Any, result: dict[str, Any]) -> None:
    exact = result["converged"]["three points"]["schedules"]["canonical"]["off-diagonal"][0]
    axes.axhspan(*PRINTED, color="0.5", alpha=0.2, linewidth=0, label="printed by the published script")
    axes.axhline(exact, color="black", linewidth=1.0, label="converged, every schedule")
    for colour, (name, signs) in zip(output.COLOURS, result["steps"]["three points"].items(), strict=False):
        for sign, row in signs.items():
            label = name if sign == "right" else None
            values = [cell["off-diagonal"][0] for cell in row.values()]
            axes.semilogx(
                [int(n) for n in row], values, STYLES[sign], color=colour, marker="o", markersize=3, label=label
            )
    axes.plot([], [], "--", color="0.4", label="dashed: the published sign")
    counts = result["settings"]["steps"]
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.set(xlabel="steps", ylabel="mean off-diagonal asymmetry", title="Three points, the published discretisation")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_signs(axes: Any, found: dict[str, Any]) -> None:
    for shift, (sign, colour) in zip(
        (-0.2, 0.2), (("right", output.BLUE), ("published", output.VERMILION)), strict=True
    ):
        values, errors = zip(*(row["signs"][sign]["off-diagonal"] for row in found.values()), strict=True)
        places = np.arange(len(found)) + shift
        axes.bar(places, values, 0.38, yerr=errors, capsize=3, color=colour, label=f"{sign} sign")
    axes.set_xticks(range(len(found)), [name.replace(" ", "\n", 1) for name in found])
    axes.set(ylabel="mean off-diagonal asymmetry", title="Converged, by sign")
    axes.margins(y=0.3)  # room for the legend above the error bars
    axes.legend(fontsize="small", loc="upper left")
