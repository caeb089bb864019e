"""How time grows with the number of points and with dimensions, at three noise levels, beside the least it could be.

The least is one float32 product of all queries with all points, which any exact method needs that looks at all of them:
limited by arithmetic, 2 B N d operations, or by reading the points once, 4 N d bytes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from dfmath.benchmarks.timing import bandwidth, interleaved, machine, sgemm_rate, write
from dfmath.benchmarks.workloads import patches

from dfmath import PointMasses

LEVELS = (0.02, 0.5, 10.0)
SIDE, COUNTS = 4, (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 2_000_000)
COUNT, DIMENSIONS = 20_000, (2, 12, 48, 192, 768, 3072)
FITTED = {"points": 100_000, "dimensions": 192}  # from here on calls are no longer paid for by their own overhead


def grid(most: int) -> list[tuple[str, int, int]]:
    """Return what is measured: (what grows, N, d), with no more points than `most`."""
    counts = [("points", count, 3 * SIDE**2) for count in COUNTS if count <= most]
    return counts + [("dimensions", min(COUNT, most), dim) for dim in DIMENSIONS]


def cloud(count: int, dim: int) -> Any:
    """Patches of the photographs with half a grey level of dither, so that no two are equal: (count, dim) float32."""
    side = max(1, round((dim / 3) ** 0.5))
    found = patches(count, side=side)[:, :dim]
    found += np.random.default_rng(1).uniform(-0.5, 0.5, found.shape).astype(np.float32) / np.float32(127.5)
    return np.ascontiguousarray(found)


def measure(most: int, queries: int, rounds: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Return medians of the time of mean and trace, with the least time, and fitted exponents."""
    rates = {"sgemm flop/s": sgemm_rate(), "bytes/s": bandwidth()}
    rows = []
    for growing, count, dim in grid(most):
        y = cloud(count, dim)
        least = max(2.0 * queries * y.size / rates["sgemm flop/s"], y.nbytes / rates["bytes/s"])
        seconds = _seconds(y, queries, rounds)
        rows.append({"growing": growing, "points": count, "dimensions": dim, "least": least, "seconds": seconds})
        note(f"{count} x {dim}")
    return {
        "machine": machine(),
        **rates,
        "queries": queries,
        "rounds": rounds,
        "levels": list(LEVELS),
        "rows": rows,
        "exponents": {growing: _exponents(rows, growing) for growing in FITTED},
    }


def _seconds(y: Any, queries: int, rounds: int) -> list[float]:
    """Median time at each noise level."""
    prior, rng = PointMasses(y), np.random.default_rng(2)
    calls: dict[str, Callable[[], Any]] = {}
    for rho in LEVELS:
        chosen = y[rng.integers(len(y), size=queries)]
        x = chosen + np.float32(rho) * rng.standard_normal(chosen.shape).astype(np.float32)
        calls[str(rho)] = partial(prior.diffuse(1.0, rho).evaluate, x, ("trace",))
        for _ in range(2):  # compiles, and makes what is kept about the points
            calls[str(rho)]()
    return [statistics.median(times) for times in interleaved(calls, rounds, rest=0.0).values()]


def _exponents(rows: list[dict[str, Any]], growing: str) -> list[float | None]:
    """Slopes of log time against log N or log d, where the arrays are large; None for fewer than two."""
    large = [row for row in rows if row["growing"] == growing and row[growing] >= FITTED[growing]]
    if len(large) < 2:
        return [None] * len(LEVELS)
    sizes = np.log([row[growing] for row in large])
    return [float(np.polyfit(sizes, np.log([row["seconds"][i] for row in large]), 1)[0]) for i in range(len(LEVELS))]


def markdown(result: dict[str, Any]) -> str:
    """A table of times over the least time, and the exponents."""
    about, rates = result["machine"], (result["sgemm flop/s"] / 1e9, result["bytes/s"] / 1e9)
    lines = [
        f"# Growth of the time of mean and trace, {result['queries']} queries\n",
        f"{about['processor']}, {about['cores']} cores, {rates[0]:.0f} GFLOP/s in sgemm, {rates[1]:.0f} GB/s;",
        f"commit {about['commit']}. Cells: seconds (and times the least).\n",
        "| N | d | least | " + " | ".join(f"rho = {rho:g}" for rho in result["levels"]) + " |",
        "|---" * (3 + len(result["levels"])) + "|",
    ]
    for row in result["rows"]:
        cells = [f"{value:.2g} ({value / row['least']:.2g})" for value in row["seconds"]]
        lines.append(f"| {row['points']} | {row['dimensions']} | {row['least']:.2g} | " + " | ".join(cells) + " |")
    for growing, values in result["exponents"].items():
        shown = ", ".join("-" if value is None else f"{value:.2f}" for value in values)
        lines.append(f"\nExponent in {growing}, from {FITTED[growing]} on: {shown}.")
    return "\n".join(lines)


def figure(result: dict[str, Any]) -> Any:
    """Draw times against N and against d, with the least time."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(10.0, 4.2), layout="constrained")
    for axis, growing in zip(page.subplots(1, 2), FITTED, strict=True):
        rows = [row for row in result["rows"] if row["growing"] == growing]
        sizes = [row[growing] for row in rows]
        for i, rho in enumerate(result["levels"]):
            axis.plot(sizes, [row["seconds"][i] for row in rows], "o-", markersize=3, label=rf"$\rho$ = {rho:g}")
        axis.plot(sizes, [row["least"] for row in rows], "k--", linewidth=0.8, label="one product with all points")
        axis.set(xscale="log", yscale="log", xlabel=f"number of {growing}", ylabel="seconds")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return page


def save(result: dict[str, Any], folder: Path) -> None:
    """Write JSON and Markdown."""
    write(folder / "scaling.json", json.dumps(result, indent=1))
    write(folder / "scaling.md", markdown(result))
