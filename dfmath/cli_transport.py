"""``dfmath ot-test``: is the flow a transport map?"""

from __future__ import annotations

import math
import sys
import warnings
from typing import Annotated, Any

import typer

from dfmath import _checks
from dfmath.cli_options import Limit, PlaneData, Plot, RhoMax, RhoMin, Seed, points_of
from dfmath.console import Json, progress, save


def ot_test(
    data: PlaneData = None,
    rho_max: RhoMax = 80.0,
    rho_min: RhoMin = 0.02,
    starts: Annotated[int, typer.Option(help="Number of trajectories.")] = 50,
    tolerance: Annotated[float, typer.Option(help="Largest asymmetry of a transport map.")] = 1e-6,
    plot: Plot = None,
    limit: Limit = 20_000,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Is the probability-flow map an optimal transport map?

    The published experiment, or your own data. Every schedule is integrated in its own time and coordinates. Exit
    code 1 if one differs from the canonical value by more than the tolerance.
    """
    from dfmath import plots, report

    seed, starts = _checks.random_seed(seed), _checks.positive_integer("starts", starts)
    if plot is not None:
        plots.destination(plot)
    priors = _planes(data, limit, seed)
    if plot is not None and any(prior.dim != 2 for prior in priors.values()):
        raise ValueError(f"plot needs data of dimension 2, got {max(prior.dim for prior in priors.values())}")
    rows, canonical = _flows(priors, rho_max, rho_min, starts, seed, tolerance)
    number = report.plural(starts, "start")
    title = f"Flow maps from rho = {rho_max:g} to {rho_min:g}, {number}, tolerance {tolerance:g}"
    if json:
        report.print_json({"rho_max": rho_max, "rho_min": rho_min, "tolerance": tolerance, "checks": _plain(rows)})
    else:
        report.console().print(report.transport_table(rows, title))
        for label, found in canonical.items():
            print(_verdict(label, found))
    if plot is not None:
        cases = [(f"{label}: asymmetry {r.asymmetry.mean:.3f}", priors[label], r) for label, r in canonical.items()]
        save(plots.trajectories(cases, rho_max, rho_min), plot, json)
    return 1 if max(row[3] for row in rows) > tolerance else 0


def _verdict(label: str, found: Any) -> str:
    what = "is" if found.is_transport else "is not"
    error = found.asymmetry.standard_error
    asymmetry = f"{found.asymmetry.mean:.3g}" + (f" ± {error:.1g}" if math.isfinite(error) else "")
    return f"{label}: the flow {what} an optimal transport map (asymmetry {asymmetry}, allowed {found.tolerance:g})"


def _planes(data: str | None, limit: int, seed: int) -> dict[str, Any]:
    """The priors to test, by name: the published ones, or the one of a file."""
    from dfmath.priors import PointMasses
    from dfmath.transport import official_points

    if data is None:
        return {"three points": official_points(), "three on a line": official_points(collinear=True)}
    points, name = points_of(data, limit, seed)
    return {name: PointMasses(points)}


def _flows(
    priors: dict[str, Any], rho_max: float, rho_min: float, starts: int, seed: int, tolerance: float
) -> tuple[list[tuple[str, str, Any, float]], dict[str, Any]]:
    """One row for each prior and schedule, and the canonical report of each prior."""
    from dfmath.transport import official_schedules, ot_check, range_note

    schedules: dict[str, Any] = {"canonical": None, **official_schedules()}
    rows: list[tuple[str, str, Any, float]] = []
    canonical: dict[str, Any] = {}
    for prior in priors.values():
        if (note := range_note(prior, rho_max, rho_min)) is not None:
            print(f"note: {note}", file=sys.stderr)
    with progress("flows", len(priors) * len(schedules)) as advance, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "noise from rho")  # is said above
        for label, prior in priors.items():
            for name, schedule in schedules.items():
                found = ot_check(prior, rho_max, rho_min, starts, seed, schedule, start="gaussian", tolerance=tolerance)
                canonical.setdefault(label, found)
                rows.append((label, name, found, _difference(found, canonical[label])))
                advance(f"{label}, {name}")
    return rows, canonical


def _difference(found: Any, canonical: Any) -> float:
    """The largest difference of either index at any start."""
    return max(
        float(abs(found.asymmetry.values - canonical.asymmetry.values).max()),
        float(abs(found.asymmetry_offdiagonal.values - canonical.asymmetry_offdiagonal.values).max()),
    )


def _plain(rows: list[tuple[str, str, Any, float]]) -> list[dict[str, Any]]:
    def estimate(value: Any) -> dict[str, float]:
        return {"mean": value.mean, "standard_error": value.standard_error}

    return [
        {
            "data": data,
            "schedule": schedule,
            "asymmetry": estimate(r.asymmetry),
            "asymmetry_offdiagonal": estimate(r.asymmetry_offdiagonal),
            "min_eigenvalue": float(r.min_eigenvalue.values.min()),
            "transport_gap": r.transport_gap,
            "is_transport": r.is_transport,
            "evaluations": r.evaluations,
            "differs_from_canonical": difference,
        }
        for data, schedule, r, difference in rows
    ]
