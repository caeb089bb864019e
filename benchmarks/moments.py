"""Posterior moments side by side with the peers: time, error and memory over the noise levels of real data.

Every figure of one row comes from one run: all contenders in turn, round after round, on the same queries. Errors are
relative, against float64 sums of differences, at the worst of a few queries. JAX and KeOps take part where installed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from dfmath.backends._compat import to_numpy
from dfmath.benchmarks.contenders import CONTENDERS, truth
from dfmath.benchmarks.places import PLACES, Place
from dfmath.benchmarks.timing import interleaved, machine, write
from dfmath.benchmarks.workloads import levels, points, queries

CHECKED = 4  # queries whose truth is computed: with many points it costs more than everything else
RATES = {
    "TF32 flop/s": "GFLOP/s in TF32",
    "bfloat16 flop/s": "GFLOP/s in bfloat16",
    "copy bytes/s": "GB/s in copies",
}
MATRIX_PRODUCTS = {"mean and trace": 2, "one product": 4, "eight products": 18}  # of the dense form


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    data: str
    tasks: tuple[str, ...]
    contenders: tuple[str, ...]
    count: int | None = None
    queries: int = 256
    levels: int = 18
    rounds: int = 5
    backend: str = "numpy"


def measure(plan: Plan, note: Callable[[str], None], done: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Return all figures; `done` sees them after every level, so that an interruption loses no finished part."""
    place = PLACES[plan.backend]()
    y = points(plan.data, plan.count)
    held = place.put(y)
    result: dict[str, Any] = {"data": plan.data, "shape": list(y.shape), "queries": plan.queries}
    result |= {"backend": plan.backend, "machine": machine(), **place.about(), "tasks": {}}
    for task in plan.tasks:
        ready, absent = _prepare(held, task, plan)
        rows: list[dict[str, Any]] = []
        result["tasks"][task] = {"absent": absent, "levels": rows}
        work = 2.0 * MATRIX_PRODUCTS[task] * plan.queries * y.size
        for rho in levels(plan.levels):
            found = _level(y, float(rho), task, ready, plan, place)
            for figures in found.values():
                figures["share of sgemm"] = work / figures["seconds"] / result["sgemm flop/s"]
            rows.append({"rho": float(rho), "contenders": found})
            done(result)
            note(f"{task}, rho = {rho:.3g}")
    return result


def _prepare(y: Any, task: str, plan: Plan) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the contenders for the task that are installed here, and why the others are not."""
    ready, absent = {}, {}
    for name in plan.contenders:
        factory, tasks, backends = CONTENDERS[name]
        if plan.backend not in backends:
            absent[name] = f"takes no part on {plan.backend} arrays"
        elif task in tasks:
            try:
                ready[name] = factory(y, task)
            except ImportError as reason:
                absent[name] = str(reason)
    return ready, absent


def _level(y: Any, rho: float, task: str, ready: dict[str, Any], plan: Plan, place: Place) -> dict[str, Any]:
    """Measure one noise level; queries and results stay where the points are."""
    x, v = queries(y, rho, plan.queries)
    v = np.ascontiguousarray(v if task == "eight products" else v[:, :, :1])
    wanted = truth(y, x[:CHECKED], rho, v[:CHECKED])
    there = place.put(x), rho, place.put(v)
    errors = {name: _errors(evaluate(*there), wanted) for name, evaluate in ready.items()}  # warms up, too
    calls = {name: place.finished(partial(evaluate, *there)) for name, evaluate in ready.items()}
    seconds = interleaved(calls, plan.rounds)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "rounds": len(seconds[name]),
            "errors": errors[name],
            "bytes": place.peak_memory(calls[name]),
        }
        for name in ready
    }


def _errors(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float | None]:
    """Worst relative error of each quantity; None where the answer is not a number."""
    errors = {}
    for key, value in found.items():
        got, true = (to_numpy(a)[:CHECKED].astype(np.float64) for a in (value, wanted[key]))
        got, true = (a.reshape(len(a), -1) for a in (got, true))
        worst = float((np.linalg.norm(got - true, axis=1) / np.linalg.norm(true, axis=1)).max())
        errors[key] = worst if math.isfinite(worst) else None
    return errors


def ratios(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """How long the first contender takes, in units of each other one's time, level by level."""
    first, *others = rows[0]["contenders"]
    seconds = [{name: found["seconds"] for name, found in row["contenders"].items()} for row in rows]
    return {name: [row[first] / row[name] for row in seconds] for name in others}


def geometric_mean(values: list[float]) -> float:
    """Exp of the mean of the logarithms."""
    return math.exp(sum(map(math.log, values)) / len(values))


def markdown(result: dict[str, Any]) -> str:
    """All figures as tables: seconds, share of sgemm and error of the first; time ratios and errors of the others."""
    n, d = result["shape"]
    about = result["machine"]
    head = f"# Posterior moments, {result['data']}, {n} x {d}, {result['queries']} queries\n\n"
    where = result.get("device", f"{about['processor']}, {about['cores']} cores")
    others = [f", {result[name] / 1e9:.0f} {unit}" for name, unit in RATES.items() if name in result]
    head += (
        f"{where}, {result['sgemm flop/s'] / 1e9:.0f} GFLOP/s in sgemm{''.join(others)}; commit {about['commit']}.\n"
    )
    return head + "".join(f"\n## {task}\n\n{_table(part['levels'])}\n" for task, part in result["tasks"].items())


def _table(rows: list[dict[str, Any]]) -> str:
    first, *others = rows[0]["contenders"]
    columns = [f"{first}: seconds", "of sgemm", "MiB", "error", *(f"{first} / {name} (its error)" for name in others)]
    lines = ["| rho | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    shares = ratios(rows)
    for i, row in enumerate(rows):
        mine = row["contenders"][first]
        cells = [f"{mine['seconds']:.3g}", f"{mine['share of sgemm']:.2g}", _mebibytes(mine), _worst(mine)]
        cells += [f"{shares[name][i]:.3g} ({_worst(row['contenders'][name])})" for name in others]
        lines.append(f"| {row['rho']:.3g} | " + " | ".join(cells) + " |")
    means = [f"{geometric_mean(values):.3g}, at most {max(values):.3g}" for values in shares.values()]
    return "\n".join([*lines, "| geometric mean | | | | | " + " | ".join(means) + " |"])


def _worst(figures: dict[str, Any]) -> str:
    errors = list(figures["errors"].values())
    return "not a number" if None in errors else f"{max(errors):.0e}"


def _mebibytes(figures: dict[str, Any]) -> str:
    return "?" if figures["bytes"] is None else f"{figures['bytes'] / 2**20:.0f}"


def figure(result: dict[str, Any]) -> Any:
    """Draw time ratios and errors against the noise level, a column for each task."""
    from matplotlib.figure import Figure

    tasks = result["tasks"]
    page = Figure(figsize=(5.2 * len(tasks), 7.2), layout="constrained")
    axes = page.subplots(2, len(tasks), squeeze=False, sharex=True)
    for column, (task, part) in enumerate(tasks.items()):
        _draw(axes[0, column], axes[1, column], task, part["levels"])
    page.suptitle(f"{result['data']}, {result['shape'][0]} x {result['shape'][1]}, {result['queries']} queries")
    return page


def _draw(times: Any, errors: Any, task: str, rows: list[dict[str, Any]]) -> None:
    rho = [row["rho"] for row in rows]
    names = list(rows[0]["contenders"])
    for i, (name, values) in enumerate(ratios(rows).items(), start=1):
        times.plot(rho, values, "o-", color=f"C{i}", markersize=3, label=name)
    for i, name in enumerate(names):
        found = [list(row["contenders"][name]["errors"].values()) for row in rows]
        worst = [math.nan if None in values else max(values) for values in found]
        errors.plot(rho, np.maximum(worst, 1e-17), "o-", color=f"C{i}", markersize=3, label=name)
    times.axhline(1.0, color="0.4", linewidth=0.8)
    times.set(xscale="log", yscale="log", title=task, ylabel=f"time of {names[0]} / time of the other")
    errors.set(yscale="log", ylabel="worst relative error", xlabel=r"noise-to-signal ratio $\rho$")
    for axis in (times, errors):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)


def name(data: str, backend: str) -> str:
    """What files of results are called."""
    return f"moments_{data}" if backend == "numpy" else f"moments_{data}_{backend}"


def save(result: dict[str, Any], folder: Path) -> None:
    """Write JSON and Markdown."""
    stem = folder / name(result["data"], result["backend"])
    write(stem.with_suffix(".json"), json.dumps(result, indent=1))
    write(stem.with_suffix(".md"), markdown(result))
