"""``dfmath fisher``: F along the noise levels of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dfmath import _checks
from dfmath.cli_options import Cluster, Data, Limit, Plot, RhoMax, RhoMin, Seed, on_cluster, points_of
from dfmath.console import Json, progress, save


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
    with on_cluster(cluster), progress("noise levels", len(rhos)) as advance:
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
    points, name = points_of(data, limit, seed)
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
