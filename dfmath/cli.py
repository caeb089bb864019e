"""The command line: ``dfmath verify``, ``fisher``, ``ot-test`` and ``info``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Second-order quantities of diffusion models, exact where there is a closed form.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Data = Annotated[Path | None, typer.Option(help="Points (N, d): .npy, or .npz with 'points'. Default: the digits.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
RhoMax = Annotated[float, typer.Option(help="Highest noise-to-signal ratio.")]
RhoMin = Annotated[float, typer.Option(help="Lowest noise-to-signal ratio.")]
Plot = Annotated[Path | None, typer.Option(help="Write a figure (.png, .svg, .pdf).")]
Limit = Annotated[int, typer.Option(help="Use a random subset of at most this many points.")]


def main() -> None:
    """Run the command line; whatever is wrong with the input is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except (ValueError, TypeError, OSError) as error:
        _fail(str(error), 2)
    except Exception as error:
        # Usage errors of the option parser know their own exit code; anything else is a bug and keeps its traceback.
        if hasattr(error, "format_message"):
            _fail(error.format_message(), 2)
        if type(error).__name__ == "Abort":
            _fail("interrupted", 130)
        raise
    sys.exit(code or 0)


def _fail(message: str, code: int) -> None:
    print(f"dfmath: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


@app.command()
def verify(
    data: Data = None,
    mixture: Annotated[int | None, typer.Option(help="Fit a Gaussian mixture with this many components.")] = None,
    backend: Annotated[str, typer.Option(help="numba, array-api, array-api-strict, torch, jax or cupy.")] = "numba",
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    only: Annotated[list[str] | None, typer.Option(help="Theorem number, such as 1.2 or 3; may be repeated.")] = None,
    rho_max: RhoMax = 80.0,
    rho_min: RhoMin = 0.02,
    limit: Limit = 20_000,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Check every theorem on the embedded digits or on your own data; exit code 1 if one fails."""
    from dfmath.theorems import run

    levels, theorems = run.noise_levels(rho_max, rho_min), run.select(only)
    points, name = _points(data, limit, seed)
    subject = run.model(points, mixture, backend, dtype, seed)
    with _progress("verifying", len(theorems)) as advance:
        results = run.verify(
            subject, levels, backend=backend, only=only, seed=seed, progress=lambda t: advance(f"{t.number} {t.title}")
        )
    counts = {v: sum(r.verdict == v for r in results) for v in ("pass", "fail", "not applicable")}
    kind = name if mixture is None else f"a mixture of {mixture} Gaussians fitted to {name}"
    about = {"data": kind, "shape": list(points.shape), "backend": backend, "dtype": dtype, "seed": seed}
    _show_theorems(results, counts, about, levels, json)
    return 1 if counts["fail"] else 0


def _show_theorems(results: list[Any], counts: dict[str, int], about: dict[str, Any], levels: Any, json: bool) -> None:
    from dfmath import report

    if json:
        found = [r.as_dict() for r in results]
        report.print_json({**about, "rho": levels, "versions": report.versions(), **counts, "theorems": found})
        return
    n, d = about["shape"]
    title = f"{about['data']}, {n} x {d}, {about['backend']}, {about['dtype']}, rho {levels[0]:g} to {levels[-1]:g}"
    report.console().print(report.theorem_table(results, title))
    failed = [f"{r.theorem.number} {r.theorem.title}" for r in results if r.verdict == "fail"]
    print(
        f"{len(results)} theorems: {counts['pass']} pass, {counts['not applicable']} not applicable, {len(failed)} fail"
    )
    for line in failed:
        print(f"FAILED {line}")


@app.command()
def fisher(
    data: Data = None,
    rho_max: RhoMax = 80.0,
    rho_min: RhoMin = 0.02,
    levels: Annotated[int, typer.Option(help="Number of noise levels.")] = 18,
    samples: Annotated[int, typer.Option(help="Draws from q at each level.")] = 64,
    spectrum: Annotated[bool, typer.Option(help="Decompose F and P, d x d matrices.")] = True,
    plot: Plot = None,
    limit: Limit = 20_000,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Trace, spectrum and effective rank along the noise levels of a data set."""
    from dfmath import plots, report
    from dfmath.priors import PointMasses
    from dfmath.profile import fisher_profile
    from dfmath.theorems.run import noise_levels

    if plot is not None:
        plots.destination(plot)
    points, name = _points(data, limit, seed)
    prior, rhos, found = PointMasses(points), noise_levels(rho_max, rho_min, levels), []
    with _progress("noise levels", len(rhos)) as advance:
        for rho in rhos:
            found.append(fisher_profile(prior, rho, samples, seed, spectrum))
            advance(f"rho = {rho:.3g}")
    title = f"Diffusion Fisher of {name}, {points.shape[0]} x {points.shape[1]}, {samples} draws at each level"
    if json:
        report.print_json({"data": name, "shape": list(points.shape), "levels": [asdict(level) for level in found]})
    else:
        report.console().print(report.profile_table(found, title))
    if plot is not None:
        path = plots.save(plots.profile(found, title), plot)
        print(f"figure: {path}", file=sys.stderr if json else sys.stdout)
    return 0


@app.command("ot-test")
def ot_test(
    data: Data = None,
    rho_max: RhoMax = 80.0,
    rho_min: RhoMin = 0.02,
    starts: Annotated[int, typer.Option(help="Number of trajectories.")] = 50,
    tolerance: Annotated[float, typer.Option(help="Largest asymmetry of a transport map.")] = 1e-6,
    plot: Plot = None,
    limit: Limit = 20_000,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Is the probability-flow map an optimal transport map? The official experiment, or your own data.

    Every schedule is integrated in its own time and coordinates. Exit code 1 if one differs from the canonical
    value by more than the tolerance.
    """
    from dfmath import plots, report
    from dfmath.priors import PointMasses
    from dfmath.transport import official_points, official_schedules, ot_check

    if plot is not None:
        plots.destination(plot)
    if data is None:
        priors: dict[str, Any] = {"three points": official_points(), "three on a line": official_points(collinear=True)}
    else:
        points, name = _points(data, limit, seed)
        priors = {name: PointMasses(points)}
    if plot is not None and any(prior.dim != 2 for prior in priors.values()):
        raise ValueError(f"plot needs data of dimension 2, got {max(prior.dim for prior in priors.values())}")
    schedules: dict[str, Any] = {"canonical": None, **official_schedules()}
    rows: list[tuple[str, str, Any, float]] = []
    canonical: dict[str, Any] = {}
    with _progress("flows", len(priors) * len(schedules)) as advance:
        for label, prior in priors.items():
            for name, schedule in schedules.items():
                found = ot_check(prior, rho_max, rho_min, starts, seed, schedule, start="gaussian", tolerance=tolerance)
                canonical.setdefault(label, found)
                rows.append((label, name, found, _difference(found, canonical[label])))
                advance(f"{label}, {name}")
    title = f"Flow maps from rho = {rho_max:g} to {rho_min:g}, {starts} starts, tolerance {tolerance:g}"
    if json:
        report.print_json({"rho_max": rho_max, "rho_min": rho_min, "tolerance": tolerance, "checks": _plain(rows)})
    else:
        report.console().print(report.transport_table(rows, title))
    if plot is not None:
        cases = [(f"{label}: asymmetry {r.asymmetry.mean:.3f}", priors[label], r) for label, r in canonical.items()]
        path = plots.save(plots.trajectories(cases, rho_max, rho_min), plot)
        print(f"figure: {path}", file=sys.stderr if json else sys.stdout)
    return 1 if max(row[3] for row in rows) > tolerance else 0


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


@app.command()
def info(json: Json = False) -> int:
    """Versions, backends and devices."""
    import os

    from dfmath import backends, report

    found = {name: version for name, version in report.versions().items() if version is not None}
    missing = [name for name, version in report.versions().items() if version is None]
    machine: dict[str, Any] = {"cpu cores": os.cpu_count(), "gpu": _gpus()}
    if json:
        report.print_json({"versions": found, "not installed": missing, "backends": backends.available(), **machine})
        return 0
    for name, version in found.items():
        print(f"{name:18}{version}")
    print(f"{'not installed':18}{', '.join(missing) or 'nothing is missing'}")
    print(f"{'backends':18}{', '.join(backends.available())}")
    print(f"{'cpu cores':18}{machine['cpu cores']}")
    print(f"{'gpu':18}{', '.join(machine['gpu']) or 'none found'}")
    return 0


def _gpus() -> list[str]:
    """CUDA devices that torch sees, without importing it where it is not installed."""
    try:
        import torch
    except ImportError:
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _points(data: Path | None, limit: int, seed: int) -> tuple[Any, str]:
    """The data to work on and what to call them."""
    import numpy as np

    from dfmath import datasets
    from dfmath._checks import positive_integer

    points = datasets.digits() if data is None else datasets.load_points(data)
    name = "the digits" if data is None else data.name
    if len(points) > positive_integer("limit", limit):
        chosen = np.sort(np.random.default_rng(seed).choice(len(points), limit, replace=False))
        print(f"note: a random {limit} of {len(points)} points; --limit changes that", file=sys.stderr)
        points = points[chosen]
    return points, name


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal, silence in a pipe."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    screen = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda description: bar.update(task, advance=1, description=description)
