"""``dfmath bench``: side-by-side benchmarks; the work is done in `dfmath.benchmarks`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dfmath import _checks
from dfmath.console import Json, needs, progress, save

bench = typer.Typer(help="Side-by-side benchmarks, with files of results.", rich_markup_mode=None)
Output = Annotated[str, typer.Option(metavar="FOLDER", help="Where results are written.")]


@bench.command()
def moments(
    data: Annotated[str, typer.Option(help="digits, patches (50,000 x 3072) or plane (100,000 x 2).")] = "digits",
    task: Annotated[list[str] | None, typer.Option(help="mean and trace, one product, eight products.")] = None,
    contender: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Beside dfmath; all by default.")] = None,
    count: Annotated[int | None, typer.Option(help="Use this many points; all by default.")] = None,
    queries: Annotated[int, typer.Option(help="Queries at each level.")] = 256,
    levels: Annotated[int, typer.Option(help="Noise levels of the EDM grid, 80 to 0.002.")] = 18,
    rounds: Annotated[int, typer.Option(help="Timed calls of everybody at each level.")] = 5,
    backend: Annotated[str, typer.Option(help="Arrays: numpy, torch (CPU), cuda (torch) or cupy.")] = "numpy",
    output: Output = "bench",
    json: Json = False,
) -> int:
    """Posterior mean and tr F, F v and F V(8), beside torch, NumPy, JAX and KeOps."""
    from dfmath import report
    from dfmath.benchmarks import contenders, places, timing, workloads
    from dfmath.benchmarks import moments as run

    peers = tuple(name for name in contenders.CONTENDERS if name != "dfmath")
    numbers = (("queries", queries), ("levels", levels), ("rounds", rounds))
    queries, levels, rounds = (_checks.positive_integer(name, value) for name, value in numbers)
    plan = run.Plan(
        _checks.one_of("data", data, workloads.NAMES),
        tuple(_checks.one_of("task", t, contenders.TASKS) for t in task or contenders.TASKS),
        ("dfmath", *(_checks.one_of("contender", c, peers) for c in contender or peers)),
        None if count is None else _checks.positive_integer("count", count),
        queries,
        levels,
        rounds,
        _checks.one_of("backend", backend, tuple(places.PLACES)),
    )
    for name in contender or ():
        places_of = contenders.CONTENDERS[name][2]
        if plan.backend not in places_of:
            raise ValueError(f"contender {name!r} needs --backend {' or '.join(places_of)}, got {plan.backend!r}")
    folder = timing.folder(output)
    with progress("benchmark", len(plan.tasks) * plan.levels) as advance:
        result = run.measure(plan, advance, lambda so_far: run.save(so_far, folder))
    report.print_json(result) if json else print(run.markdown(result))
    save(run.figure(result), str(folder / f"{run.name(plan.data, plan.backend)}.png"), json)
    return 0


@bench.command()
def flow(
    data: Annotated[str, typer.Option(help="digits, with Jacobians; or patches, at low noise.")] = "digits",
    starts: Annotated[int, typer.Option(help="Trajectories.")] = 64,
    alone: Annotated[int, typer.Option(help="Trajectories that SciPy integrates (digits); its time is scaled.")] = 8,
    count: Annotated[int, typer.Option(help="Use this many points (patches).")] = 50_000,
    rounds: Annotated[int, typer.Option(help="Timed calls of everybody.")] = 5,
    output: Output = "bench",
    json: Json = False,
) -> int:
    """Flows beside SciPy's DOP853 and dense torch code."""
    from dfmath import report
    from dfmath.benchmarks import flows, timing

    data = _checks.one_of("data", data, ("digits", "patches"))
    numbers = (("starts", starts), ("alone", min(alone, starts)), ("rounds", rounds), ("count", count))
    starts, alone, rounds, count = (_checks.positive_integer(name, value) for name, value in numbers)
    folder = timing.folder(output)
    with progress("benchmark", 1) as advance:
        if data == "digits":
            result = flows.measure(starts, alone, rounds, advance)
        else:
            result = flows.measure_low_noise(starts, rounds, count, advance)
    flows.save(result, folder, data)
    if json:
        report.print_json(result)
        return 0
    print(f"{starts} starts, rtol {result['rtol']:g}, {result['evaluations']:.0f} evaluations each")
    for name, value in result["seconds"].items():
        ratio = f", dfmath takes {result['ratios'][name]:.3g} of it" if name != "dfmath" else ""
        print(f"{name:22}{value:10.3g} s{ratio}")
    return 0


@bench.command()
def scaling(
    most: Annotated[int, typer.Option(help="Largest number of points.")] = 2_000_000,
    queries: Annotated[int, typer.Option(help="Queries in a call.")] = 64,
    rounds: Annotated[int, typer.Option(help="Timed calls of each.")] = 5,
    output: Output = "bench",
    json: Json = False,
) -> int:
    """How time grows with points and dimensions, beside one product with all points."""
    from dfmath import report
    from dfmath.benchmarks import scaling as run
    from dfmath.benchmarks import timing

    numbers = (("most", most), ("queries", queries), ("rounds", rounds))
    most, queries, rounds = (_checks.positive_integer(name, value) for name, value in numbers)
    folder = timing.folder(output)
    with progress("benchmark", len(run.grid(most))) as advance:
        result = run.measure(most, queries, rounds, advance)
    run.save(result, folder)
    report.print_json(result) if json else print(run.markdown(result))
    save(run.figure(result), str(folder / "scaling.png"), json)
    return 0


@bench.command()
def network(
    batch: Annotated[int, typer.Option(help="Images in a call.")] = 16,
    rounds: Annotated[int, typer.Option(help="Timed calls of each.")] = 7,
    backend: Annotated[str, typer.Option(help="Tensors: torch (CPU) or cuda.")] = "torch",
    output: Output = "bench",
    json: Json = False,
) -> int:
    """Noise and trace from a UNet of five million parameters: a riding head beside Hutchinson; needs diffusers."""
    needs("bench network", "diffusers", "torch", "diffusers", "safetensors")
    from dfmath.benchmarks import networks

    batch, rounds = _checks.positive_integer("batch", batch), _checks.positive_integer("rounds", rounds)
    backend = _checks.one_of("backend", backend, tuple(networks.DEVICES))
    return _written(networks, output, json, len(networks.NAMES) + 1, batch, rounds, backend)


@bench.command()
def sampling(
    batch: Annotated[int, typer.Option(help="Images in a call.")] = 4,
    rounds: Annotated[int, typer.Option(help="Timed calls of each.")] = 7,
    output: Output = "bench",
    json: Json = False,
) -> int:
    """What samplers add to their evaluations, beside diffusers and azula; needs diffusers."""
    needs("bench sampling", "diffusers", "torch", "diffusers", "safetensors")
    from dfmath.benchmarks import sampling as run

    batch, rounds = _checks.positive_integer("batch", batch), _checks.positive_integer("rounds", rounds)
    return _written(run, output, json, 2, batch, rounds)


@bench.command()
def streaming(
    points: Annotated[int, typer.Option(help="Points in the file, which is made if it is not there.")] = 20_000_000,
    dim: Annotated[int, typer.Option(help="Dimensions.")] = 64,
    folder: Annotated[str, typer.Option(metavar="FOLDER", help="Where the file is, 8 bytes a number.")] = ".",
    output: Output = "bench",
    json: Json = False,
) -> int:
    """Mean and tr F of points in a file that is larger than memory, beside the disk's own rate."""
    from dfmath.benchmarks import streaming as run
    from dfmath.benchmarks import timing

    points, dim = _checks.positive_integer("points", points), _checks.positive_integer("dim", dim)
    place = timing.folder(folder)
    return _written(run, output, json, 1 + len(run.LEVELS) * len(run.QUERIES), place, points, dim)


@bench.command()
def cluster(
    rounds: Annotated[int, typer.Option(help="Timed calls of each.")] = 5,
    output: Output = "bench",
    json: Json = False,
) -> int:
    """Score and tr F on 1, 2 and 4 Dask workers of this machine, and a model of the cost elsewhere; needs Dask."""
    needs("bench cluster", "dask", "dask", "distributed")
    from dfmath.benchmarks import cluster as run

    rounds = _checks.positive_integer("rounds", rounds)
    return _written(run, output, json, len(run.WORKERS) * len(run.COUNTS), rounds)


def _written(run: Any, output: str, json: bool, parts: int, *arguments: Any) -> int:
    """Measure with a progress bar, write the table, and print it."""
    from dfmath import report
    from dfmath.benchmarks import timing

    folder = timing.folder(output)
    with progress("benchmark", parts) as advance:
        result = run.measure(*arguments, advance)
    run.save(result, folder)
    report.print_json(result) if json else print(run.markdown(result))
    return 0
