"""The command line: ``dfmath verify``, ``fisher``, ``ot-test``, ``look``, ``bench`` and ``info``."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from dfmath import _checks

INTERRUPTED = 130


def _fail(message: str, code: int) -> None:
    print(f"dfmath: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _interrupted() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would end the shutdown in a traceback
    _fail("interrupted", INTERRUPTED)


try:
    import typer

    from dfmath.cli_bench import bench
    from dfmath.cli_reproduce import reproduce
    from dfmath.console import Json, needs, progress, save, wrote
except KeyboardInterrupt:
    _interrupted()

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

_POINTS = "Points (N, d): .npy, or .npz with 'points'. Default: "
Data = Annotated[str | None, typer.Option(metavar="FILE", help=f"{_POINTS}the digits.")]
PlaneData = Annotated[str | None, typer.Option("--data", metavar="FILE", help=f"{_POINTS}the published three points.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
RhoMax = Annotated[float, typer.Option(help="Highest noise-to-signal ratio.")]
RhoMin = Annotated[float, typer.Option(help="Lowest noise-to-signal ratio.")]
Plot = Annotated[str | None, typer.Option(metavar="FILE", help="Write a figure (.png, .svg, .pdf).")]
Limit = Annotated[int, typer.Option(help="Use a random subset of at most this many points.")]
Cluster = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Dask scheduler to compute on, such as tcp://host:8786, or 'local'."),
]
Mixture = Annotated[int | None, typer.Option(help="Fit a Gaussian mixture with this many components.")]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="NUMBER", help="Theorem number, such as 1.2 or 3; repeat it, or separate by commas."),
]


def main() -> None:
    """Run the command line; whatever is wrong with the input is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        _interrupted()
    except (ValueError, TypeError, OSError) as error:
        _fail(str(error), 2)
    except Exception as error:
        # Usage errors of the option parser know their own text; anything else is a bug and keeps its traceback.
        if hasattr(error, "format_message"):
            _fail(error.format_message() + _usage_hint(error), 2)
        if type(error).__name__ == "Abort":
            _interrupted()
        raise
    if code == INTERRUPTED:  # the option parser turns an interruption into its exit code, without a word
        _interrupted()
    sys.exit(code or 0)


def _usage_hint(error: Any) -> str:
    """What to do about a file given without its option."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    takes_data = any(parameter.name == "data" for parameter in getattr(command, "params", ()))
    return "; name a file of points with --data FILE" if takes_data and "extra argument" in str(error) else ""


def _print_version(wanted: bool) -> None:
    if wanted:
        from dfmath import __version__

        print(f"dfmath {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Second-order quantities of diffusion models, exact where there is a closed form."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def verify(
    data: Data = None,
    mixture: Mixture = None,
    backend: Annotated[
        str, typer.Option(help="numba, array-api, array-api-strict, torch, jax, cupy or dask.")
    ] = "numba",
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    only: Only = None,
    rho_max: RhoMax = 80.0,
    rho_min: RhoMin = 0.02,
    limit: Limit = 20_000,
    seed: Seed = 0,
    cluster: Cluster = None,
    page_file: Annotated[
        str | None, typer.Option("--report", metavar="FILE", help="Write a page with all of it (.html).")
    ] = None,
    json: Json = False,
) -> int:
    """Check every theorem on the digits, or on your own data.

    Exit code 1 if one fails.
    """
    if cluster is not None and backend != "dask":
        raise ValueError(f"--cluster belongs to --backend dask, got it beside {backend!r}")
    from dfmath import page
    from dfmath.theorems import run

    if page_file is not None:
        page.destination(page_file, "report")
    seed, numbers = _checks.random_seed(seed), _numbers(only)
    levels, theorems = run.noise_levels(rho_max, rho_min), run.select(numbers)
    run.builder(_array_backend(backend), dtype)
    points, name = _points(data, limit, seed)
    begun = time.perf_counter()
    with _on(cluster), progress("verifying", len(theorems)) as advance:
        subject = run.model(points, mixture, backend, dtype, seed)
        results = run.verify(
            subject,
            levels,
            backend=backend,
            only=numbers,
            seed=seed,
            progress=lambda t: advance(f"{t.number} {t.title}"),
        )
    counts = {v: sum(r.verdict == v for r in results) for v in ("pass", "fail", "not applicable")}
    about = {
        "data": _called(name, mixture),
        "shape": list(points.shape),
        "backend": backend,
        "dtype": dtype,
        "seed": seed,
    }
    seconds = time.perf_counter() - begun
    _show_theorems(results, counts, about, levels, json)
    if page_file is not None:
        _write_page(page_file, results, {**about, "rho": f"{rho_max:g} to {rho_min:g}"}, seconds, json)
    return 1 if counts["fail"] else 0


def _called(name: str, mixture: int | None) -> str:
    """What the data, or a mixture fitted to them, are called."""
    from dfmath.report import plural

    return name if mixture is None else f"a mixture of {plural(mixture, 'Gaussian')} fitted to {name}"


def _numbers(only: list[str] | None) -> list[str] | None:
    """The theorem numbers asked for, one by one; None for all."""
    if not only:
        return None
    return [number.strip() for entry in only for number in entry.split(",") if number.strip()] or [""]


def _array_backend(backend: str) -> str:
    """Refuse the one name that people try and that could mean either of two."""
    if backend.lower() == "numpy":
        raise ValueError(f"backend must be 'numba' or 'array-api' for NumPy arrays, got {backend!r}")
    return backend


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
    total = report.plural(len(results), "theorem")
    print(f"{total}: {counts['pass']} pass, {counts['not applicable']} not applicable, {len(failed)} fail")
    for line in failed:
        print(f"FAILED {line}")


def _write_page(path: str, results: list[Any], about: dict[str, Any], seconds: float, json: bool) -> None:
    from dfmath import page
    from dfmath.verification_page import verification_page

    about = {"command": shlex.join(["dfmath", *sys.argv[1:]]), **about}
    wrote("report", page.save(verification_page(results, about, seconds), path, "report"), json)


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
    whole: Annotated[
        bool, typer.Option("--whole", help="Use all points of the file, which may be larger than memory.")
    ] = False,
    cluster: Cluster = None,
    keep: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keep finished noise levels in this file (JSON).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the levels that --keep holds.")] = False,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Trace, spectrum and effective rank of F along the noise levels.

    With --cluster all points are held by the workers of a Dask cluster, which read the file themselves.
    """
    from dfmath import plots, report
    from dfmath.profile import LevelProfile
    from dfmath.theorems.run import noise_levels

    seed, samples = _checks.random_seed(seed), _checks.positive_integer("samples", samples)
    rhos = noise_levels(rho_max, rho_min, _checks.positive_integer("levels", levels))
    if plot is not None:
        plots.destination(plot)
    if resume and keep is None:
        raise ValueError("--resume needs --keep FILE, which finished levels are in")
    about = {"data": data, "limit": None if whole or cluster else limit, "samples": samples, "spectrum": spectrum}
    found = []
    with _on(cluster), progress("noise levels", len(rhos)) as advance:
        prior, name = _prior(data, limit, seed, whole, cluster is not None)
        kept = _kept(keep, {**about, "seed": seed, "shape": [prior.count, prior.dim]}, resume)
        for rho in rhos:
            work = partial(_level, prior, rho, samples, seed, spectrum)
            found.append(LevelProfile(**kept(f"{rho:.17g}", work)))
            advance(f"rho = {rho:.3g}")
    draws, shape = report.plural(samples, "draw"), (prior.count, prior.dim)
    title = f"Diffusion Fisher of {name}, {shape[0]} x {shape[1]}, {draws} at each level"
    if json:
        report.print_json({"data": name, "shape": list(shape), "levels": [asdict(level) for level in found]})
    else:
        report.console().print(report.profile_table(found, title))
    if plot is not None:
        save(plots.profile(found, title), plot, json)
    return 0


def _level(*options: Any) -> dict[str, Any]:
    """The profile of one level, as JSON can hold it."""
    from dfmath.profile import fisher_profile

    return asdict(fisher_profile(*options))


def _prior(data: str | None, limit: int, seed: int, whole: bool, scattered: bool) -> tuple[Any, str]:
    """Point masses of a subset, of a whole file, or of one that the workers of a cluster read."""
    from dfmath.priors import PointMasses

    if data is None and (whole or scattered):
        raise ValueError("--whole and --cluster need --data FILE")
    if scattered:
        from dfmath.row_files import dask_points

        return PointMasses(dask_points(str(data))), Path(str(data)).name
    if whole:
        return PointMasses.from_file(str(data)), Path(str(data)).name
    points, name = _points(data, limit, seed)
    return PointMasses(points), name


def _kept(file: str | None, about: dict[str, Any], resume: bool) -> Callable[[str, Callable[[], Any]], Any]:
    """How parts of the work are done: from the file where they are there, and kept in it, if there is one."""
    if file is None:
        return lambda name, work: work()
    from dfmath.journal import Journal

    path = Path(file)
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"keep must name a file in a folder that exists, got {file!r}")
    return Journal(path, about, resume).part


@contextmanager
def _on(address: str | None) -> Iterator[None]:
    """Compute on a Dask cluster; nothing happens without an address."""
    if address is None:
        yield
        return
    needs("--cluster", "dask", "dask", "distributed")
    from distributed import Client

    where = {} if address == "local" else {"address": address}
    try:
        client = Client(**where, timeout="10s", set_as_default=True)
    except (OSError, ValueError, TimeoutError) as error:
        raise ValueError(
            f"cluster must be the address of a Dask scheduler, or 'local', got {address!r}: {error}"
        ) from None
    with client:
        yield


@app.command("ot-test")
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
    if plot is not None:
        cases = [(f"{label}: asymmetry {r.asymmetry.mean:.3f}", priors[label], r) for label, r in canonical.items()]
        save(plots.trajectories(cases, rho_max, rho_min), plot, json)
    return 1 if max(row[3] for row in rows) > tolerance else 0


def _planes(data: str | None, limit: int, seed: int) -> dict[str, Any]:
    """The priors to test, by name: the published ones, or the one of a file."""
    from dfmath.priors import PointMasses
    from dfmath.transport import official_points

    if data is None:
        return {"three points": official_points(), "three on a line": official_points(collinear=True)}
    points, name = _points(data, limit, seed)
    return {name: PointMasses(points)}


def _flows(
    priors: dict[str, Any], rho_max: float, rho_min: float, starts: int, seed: int, tolerance: float
) -> tuple[list[tuple[str, str, Any, float]], dict[str, Any]]:
    """One row for each prior and schedule, and the canonical report of each prior."""
    from dfmath.transport import official_schedules, ot_check

    schedules: dict[str, Any] = {"canonical": None, **official_schedules()}
    rows: list[tuple[str, str, Any, float]] = []
    canonical: dict[str, Any] = {}
    with progress("flows", len(priors) * len(schedules)) as advance:
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


@app.command()
def look(
    data: PlaneData = None,
    mixture: Mixture = None,
    rho_max: Annotated[
        float | None, typer.Option(help="Highest noise-to-signal ratio. Default: ten times the data's extent.")
    ] = None,
    rho_min: Annotated[
        float | None, typer.Option(help="Lowest noise-to-signal ratio. Default: a 50th of the data's extent.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Number of noise levels, at most 100.")] = 31,
    starts: Annotated[int, typer.Option(help="Number of trajectories, at most 50.")] = 9,
    output: Annotated[str, typer.Option(metavar="FILE", help="Where the page is written (.html).")] = "look.html",
    limit: Limit = 20_000,
    seed: Seed = 0,
) -> int:
    """Data in the plane: a page with a slider over the noise level.

    It shows density, score, F and flow, and needs neither a server nor a network.
    """
    from dfmath import page
    from dfmath.explorer import explore
    from dfmath.theorems.run import model
    from dfmath.transport import official_points

    page.destination(output, "output")
    points, name = (official_points().points, "three points") if data is None else _points(data, limit, seed)
    if points.shape[-1] != 2:
        raise ValueError(f"data must have dimension 2 to be looked at, got {points.shape[-1]}")
    prior, title = model(points, mixture, seed=seed).prior, f"A look at {_called(name, mixture)}"
    with progress("noise levels", frames) as advance:
        work = partial(explore, prior, rho_max, rho_min, frames=frames, starts=starts, seed=seed, title=title)
        shown = work(progress=lambda rho: advance(f"rho = {rho:.3g}"))
    wrote("page", page.save(shown.html, output, "output"), False)
    return 0


@app.command()
def info(json: Json = False) -> int:
    """Versions, array libraries, backends and devices."""
    import os

    from dfmath import backends, report

    versions, arrays = report.versions(), report.array_libraries()
    found = {name: version for name, version in versions.items() if version is not None}
    missing = [name for name, version in versions.items() if version is None]
    machine: dict[str, Any] = {"cpu cores": os.cpu_count(), "gpu": _gpus()}
    if json:
        kinds = {"backends": backends.available(), "array libraries": arrays}
        report.print_json({"versions": found, "not installed": missing, **kinds, **machine})
        return 0
    purposes = {
        "array-api": "array-api (any array library)",
        "device": "device (CuPy and torch)",
        "numba": "numba (compiled, for NumPy arrays)",
    }
    rows = found | {
        "not installed": ", ".join(missing) or "nothing is missing",
        "array libraries": ", ".join(arrays),
        "backends": ", ".join(purposes.get(name, name) for name in backends.available()),
        "cpu cores": machine["cpu cores"],
        **({f"gpu {i}": gpu for i, gpu in enumerate(machine["gpu"])} or {"gpu": "none found"}),
    }
    for name, value in rows.items():
        print(f"{name:18}{value}")
    return 0


app.add_typer(bench, name="bench")
app.command()(reproduce)


def _gpus() -> list[str]:
    """Names and memory of the CUDA devices that torch or CuPy see, whichever is installed."""
    try:
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in found]
    except ImportError:
        pass
    try:
        import cupy

        kinds = [cupy.cuda.runtime.getDeviceProperties(i) for i in range(cupy.cuda.runtime.getDeviceCount())]
        return [f"{kind['name'].decode()}, {kind['totalGlobalMem'] / 2**30:.0f} GiB" for kind in kinds]
    except (ImportError, RuntimeError):  # no driver, or no device
        return []


def _points(data: str | None, limit: int, seed: int) -> tuple[Any, str]:
    """The data to work on and what to call them."""
    import numpy as np

    from dfmath import datasets

    limit = _checks.positive_integer("limit", limit)
    if data == "":
        raise ValueError("data must name a file, got an empty name")
    points = datasets.digits() if data is None else datasets.load_points(data)
    name = "the digits" if data is None else Path(data).name
    if len(points) > limit:
        chosen = np.sort(np.random.default_rng(seed).choice(len(points), limit, replace=False))
        print(f"note: a random {limit} of {len(points)} points; --limit changes that", file=sys.stderr)
        points = points[chosen]
    return points, name
