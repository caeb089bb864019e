"""``dfmath verify``: every theorem, as a table, JSON or a page."""

from __future__ import annotations

import shlex
import sys
import time
from typing import Annotated, Any

import typer

from dfmath import _checks
from dfmath.cli_options import Cluster, Data, Limit, Mixture, Only, RhoMax, RhoMin, Seed, called, on_cluster, points_of
from dfmath.console import Json, under_way, wrote


def verify(
    data: Data = None,
    mixture: Mixture = None,
    backend: Annotated[
        str, typer.Option(help="numba, array-api, array-api-strict, torch, jax, cupy or dask.")
    ] = "numba",
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    only: Only = None,
    own: Annotated[
        list[str] | None,
        typer.Option("--theorems", metavar="FILE", help="Check your own, too: a Python file that registers them."),
    ] = None,
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

    Exit code 1 if one fails. Give --theorems only files whose code you would run.
    """
    if cluster is not None and backend != "dask":
        raise ValueError(f"--cluster belongs to --backend dask, got it beside {backend!r}")
    from dfmath import page
    from dfmath.theorems import run
    from dfmath.theorems.own import load

    if page_file is not None:
        page.destination(page_file, "report")
    for file in own or []:
        load(file)
    seed, numbers = _checks.random_seed(seed), _numbers(only)
    levels, theorems = run.noise_levels(rho_max, rho_min), run.select(numbers)
    run.builder(_array_backend(backend), dtype)
    points, name = points_of(data, limit, seed)
    begun = time.perf_counter()
    with on_cluster(cluster), under_way("verifying", len(theorems)) as begins:
        subject = run.model(points, mixture, backend, dtype, seed)
        results = run.verify(
            subject, levels, only=numbers, seed=seed, progress=lambda t: begins(f"{t.number} {t.title}")
        )
    counts = {v: sum(r.verdict == v for r in results) for v in ("pass", "fail", "not applicable")}
    about = {
        "data": called(name, mixture),
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
