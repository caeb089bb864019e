"""How time falls with workers and grows with points on a Dask cluster of this machine, and what that means elsewhere.

The model is T = overhead + work N B/w for N points, B queries and w workers of one thread: what is moved for a batch
does not grow with N but with the number of parts, by one set of moments each.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from dfmath.benchmarks.timing import machine, write

from dfmath import PointMasses

WORKERS = (1, 2, 4)
COUNTS = (100_000, 200_000, 400_000, 800_000)
DIM, QUERIES, CHUNK, RHO = 64, 64, 25_000, 0.8
LARGE, LARGE_CHUNK, MANY = 10**9, 10**6, (16, 64, 256)  # points and workers to say what the model says of


def measure(rounds: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Return median seconds and memory for every number of workers and of points, and the fitted model."""
    from distributed import Client, LocalCluster

    rows = []
    for workers in WORKERS:
        options = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
        with LocalCluster(**options) as machines, Client(machines) as client:
            for count in COUNTS:
                rows.append({"workers": workers, "points": count, **_one(client, count, rounds)})
                note(f"{workers} workers, {count} points")
    cores = os.cpu_count() or 1
    fitted = _fitted([row for row in rows if row["workers"] <= cores])
    return {"machine": machine(), "rounds": rounds, "rows": rows, "model": fitted, "bytes": _bytes()}


def _one(client: Any, count: int, rounds: int) -> dict[str, Any]:
    """Median seconds of score and trace, and by how much the largest worker grew beyond its points."""
    import dask.array

    points = dask.array.random.default_rng(0).standard_normal((count, DIM), chunks=(CHUNK, DIM))
    prior = PointMasses(points)
    x, q = np.random.default_rng(1).standard_normal((QUERIES, DIM)), prior.diffuse(1.0, RHO)
    q.evaluate(x, ("trace",))  # compiles, and makes what is kept about the points
    before = client.run(_resident)
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        q.evaluate(x, ("trace",))
        seconds.append(time.perf_counter() - begin)
    after = client.run(_resident)
    growth = max(after[worker] - before[worker] for worker in before)
    del q, prior, points
    return {"seconds": statistics.median(seconds), "all seconds": seconds, "growth in bytes": growth}


def _resident() -> int:
    """The largest resident size so far of a worker, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fitted(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Overhead of a batch, and seconds of one worker for one point and query, by least squares."""
    load = np.array([row["points"] * QUERIES / row["workers"] for row in rows])
    seconds = np.array([row["seconds"] for row in rows])
    columns = np.stack([np.ones_like(load), load], axis=1) / seconds[:, None]  # relative errors are made small
    overhead, work = np.linalg.lstsq(columns, np.ones(len(rows)), rcond=None)[0]
    worst = float(np.abs((overhead + work * load) / seconds - 1.0).max())
    return {"overhead": float(overhead), "work": float(work), "worst relative error": worst}


def _bytes() -> dict[str, int]:
    """What a batch moves: queries to each worker, and moments from each part."""
    return {"to a worker": 8 * QUERIES * (DIM + 2), "from a part": 8 * QUERIES * (2 * DIM + 8)}


def markdown(result: dict[str, Any]) -> str:
    """Tables of times, and what the model says of a billion points."""
    about, model, moved = result["machine"], result["model"], result["bytes"]
    lines = [
        f"# Score and trace on a Dask cluster, {QUERIES} queries in {DIM} dimensions, chunks of {CHUNK} points\n",
        f"{about['processor']}, {about['cores']} cores, workers of one thread; commit {about['commit']}.",
        "Growth is that of the largest worker beyond the points it holds, while batches are answered.\n",
        "| points | " + " | ".join(f"{w} workers, s" for w in WORKERS) + " | 1 to 2 | growth, MB |",
        "|---" * (3 + len(WORKERS)) + "|",
    ]
    for count in COUNTS:
        found = {row["workers"]: row for row in result["rows"] if row["points"] == count}
        cells = [f"{found[w]['seconds']:.3g}" for w in WORKERS]
        growth = max(row["growth in bytes"] for row in found.values()) / 1e6
        speed = found[1]["seconds"] / found[2]["seconds"]
        lines.append(f"| {count} | " + " | ".join(cells) + f" | {speed:.2f} | {growth:.0f} |")
    lines += [
        f"\nModel: {model['overhead']:.3g} s + {model['work']:.3g} s N B/w, off by {model['worst relative error']:.0%}",
        f"at most. A batch moves {moved['to a worker']} bytes to each worker and {moved['from a part']} from each",
        "part.\n",
        f"On paper, {LARGE:.0e} points in chunks of {LARGE_CHUNK:.0e}; what Dask takes for a task comes on top:\n",
        "| workers | seconds | moved in all, MB |",
        "|---|---|---|",
    ]
    for workers in MANY:
        seconds = model["overhead"] + model["work"] * LARGE * QUERIES / workers
        parts = LARGE // LARGE_CHUNK
        total = (workers * moved["to a worker"] + parts * moved["from a part"]) / 1e6
        lines.append(f"| {workers} | {seconds:.3g} | {total:.0f} |")
    return "\n".join(lines) + "\n"


def save(result: dict[str, Any], folder: Path) -> None:
    """Write JSON and Markdown."""
    write(folder / "cluster.json", json.dumps(result, indent=1))
    write(folder / "cluster.md", markdown(result))
