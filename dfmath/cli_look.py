"""``dfmath look``: a page with a slider over the noise level."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from dfmath.cli_options import Limit, Mixture, PlaneData, Seed, called, points_of
from dfmath.console import progress, wrote


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
    points, name = (official_points().points, "three points") if data is None else points_of(data, limit, seed)
    if points.shape[-1] != 2:
        raise ValueError(f"data must have dimension 2 to be looked at, got {points.shape[-1]}")
    prior, title = model(points, mixture, seed=seed).prior, f"A look at {called(name, mixture)}"
    with progress("noise levels", frames) as advance:
        work = partial(explore, prior, rho_max, rho_min, frames=frames, starts=starts, seed=seed, title=title)
        shown = work(progress=lambda rho: advance(f"rho = {rho:.3g}"))
    wrote("page", page.save(shown.html, output, "output"), False)
    return 0
