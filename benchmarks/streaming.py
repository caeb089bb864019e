"""Points in a file that memory does not hold: time, rate beside the disk's own, and the memory that it takes."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from dfmath.benchmarks.timing import machine, write

from dfmath import PointMasses

LEVELS = (5.0, 0.5, 0.05)
QUERIES = (16, 256)
BLOCK = 250_000  # rows that are made together
PIECE, READ = 2**26, 2**31  # bytes read at a time, and in all, to know the disk


def made(path: Path, points: int, dim: int) -> Path:
    """Write a cloud of points of growing spread, float64, block by block, unless it is there."""
    if path.exists():
        return path
    rng, draft = np.random.default_rng(0), path.with_suffix(".tmp")
    base = rng.standard_normal((min(BLOCK, points), dim))
    with draft.open("wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (points, dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for i, start in enumerate(range(0, points, BLOCK)):
            block = base * (1.0 + 0.01 * i) + rng.standard_normal(dim)
            block[: points - start].tofile(file)
        file.flush()
        os.fsync(file.fileno())
    return draft.replace(path)


def measure(folder: Path, points: int, dim: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Return times of mean and trace over the whole file, read cold each time."""
    path, rng = made(folder / f"streaming_{points}x{dim}.npy", points, dim), np.random.default_rng(1)
    note("file")
    prior = PointMasses.from_file(path, memory=0)
    _warm(prior, dim)
    rows, size = [], path.stat().st_size
    for queries in QUERIES:
        for rho in LEVELS:
            x = rho * rng.standard_normal((queries, dim))
            disk = _disk_rate(path)
            seconds = _cold(path, lambda rho=rho, x=x: prior.diffuse(1.0, rho).evaluate(x, ("trace",)))  # type: ignore
            rows.append({"rho": rho, "queries": queries, "seconds": seconds, "rate": size / seconds, "disk": disk})
            note(f"rho = {rho:g}, {queries} queries")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    about = {"machine": machine(), "points": points, "dimensions": dim, "bytes": size}
    return {**about, "peak resident bytes": peak, "rows": rows}


def _warm(prior: Any, dim: int) -> None:
    """Compile, on a few rows."""
    few = PointMasses(prior.points[:2000])
    for rho in LEVELS:
        few.diffuse(1.0, rho).evaluate(np.zeros((16, dim)), ("trace",))


def _cold(path: Path, call: Callable[[], Any]) -> float:
    """Seconds of a call that finds nothing of the file in memory."""
    _forget(path)
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _disk_rate(path: Path) -> float:
    """Bytes per second of reading alone."""
    _forget(path)
    room, read = bytearray(PIECE), 0
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while read < READ and (count := file.readinto(room)):
            read += count
    return read / (time.perf_counter() - begin)


def _forget(path: Path) -> None:
    """Have the system drop what it keeps of a file."""
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def markdown(result: dict[str, Any]) -> str:
    """A table of times and rates."""
    about, size = result["machine"], result["bytes"] / 1e9
    lines = [
        f"# Mean and trace over {result['points']} x {result['dimensions']} float64 points in a file, {size:.3g} GB\n",
        f"{about['processor']}, {about['cores']} cores; commit {about['commit']}. The file is read from the disk each",
        f"time. Peak memory of the whole process: {result['peak resident bytes'] / 1e6:.0f} MB.\n",
        "| rho | queries | seconds | GB/s | of the disk's own rate |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        share = row["rate"] / row["disk"]
        lines.append(
            f"| {row['rho']:g} | {row['queries']} | {row['seconds']:.3g} | {row['rate'] / 1e9:.2f} | {share:.2f} |"
        )
    return "\n".join(lines) + "\n"


def save(result: dict[str, Any], folder: Path) -> None:
    """Write JSON and Markdown."""
    write(folder / "streaming.json", json.dumps(result, indent=1))
    write(folder / "streaming.md", markdown(result))
