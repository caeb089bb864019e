"""Options that several commands share, and what they mean."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dfmath import _checks
from dfmath.console import needs

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


def points_of(data: str | None, limit: int, seed: int) -> tuple[Any, str]:
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


def called(name: str, mixture: int | None) -> str:
    """What the data, or a mixture fitted to them, are called."""
    from dfmath.report import plural

    return name if mixture is None else f"a mixture of {plural(mixture, 'Gaussian')} fitted to {name}"


@contextmanager
def on_cluster(address: str | None) -> Iterator[None]:
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
