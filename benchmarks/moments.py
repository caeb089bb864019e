"""Posterior moments side by side with the peers: time, error and memory over the noise levels of real data.

    pip install -c constraints.txt -e ".[test]" && python benchmarks/moments.py --data digits

Every figure of one row comes from one run: all contenders in turn, round after round, on the same queries. Errors are
relative, against float64 sums of differences, at the worst of a few queries. JAX and KeOps take part where installed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from contenders import CONTENDERS, TASKS, truth
from timing import interleaved, machine, median, peak_memory, sgemm_rate
from workloads import levels, points, queries

CHECKED = 8  # queries whose truth is computed


def prepare(y: Any, task: str, chosen: list[str]) -> dict[str, Any]:
    """Return the contenders that can do the task here; say which cannot, and why."""
    ready = {}
    for name in chosen:
        try:
            ready[name] = CONTENDERS[name](y, task)
        except (ImportError, NotImplementedError) as reason:
            print(f"{name}: left out of '{task}': {reason}", file=sys.stderr)
    return ready


def level(y: Any, rho: float, task: str, ready: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one noise level: {contender: {seconds, rounds, error, bytes}}."""
    x, v = queries(y, rho, options.queries)
    v = v if task == "eight products" else v[:, :, :1]
    wanted = truth(y, x[:CHECKED], rho, v[:CHECKED])
    found = {name: _checked(evaluate(x, rho, v), wanted) for name, evaluate in ready.items()}  # warms up, too
    calls = {name: (lambda evaluate=evaluate: evaluate(x, rho, v)) for name, evaluate in ready.items()}
    seconds = interleaved(calls, options.rounds)
    return {
        name: {
            "seconds": median(seconds[name]),
            "rounds": len(seconds[name]),
            "errors": found[name],
            "bytes": peak_memory(calls[name]) if options.memory else None,
        }
        for name in ready
    }


def _checked(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float | None]:
    """Worst relative error of each quantity; None where the answer is not a number."""
    errors = {}
    for key, value in found.items():
        got, true = (np.asarray(a, dtype=np.float64)[:CHECKED].reshape(CHECKED, -1) for a in (value, wanted[key]))
        worst = float((np.linalg.norm(got - true, axis=1) / np.linalg.norm(true, axis=1)).max())
        errors[key] = worst if math.isfinite(worst) else None
    return errors


def flops(y: Any, task: str, count: int) -> float:
    """Operations of the dense form's matrix products: logits and mean, and two more for each vector."""
    products = {"mean and trace": 2, "one product": 4, "eight products": 18}[task]
    return 2.0 * products * count * y.shape[0] * y.shape[1]


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Markdown: milliseconds and worst error of the first, time ratios and errors of the others."""
    first, *others = names
    lines = ["| rho | " + " | ".join([f"{first}, ms (error)", *(f"{n}, times as long (error)" for n in others)]) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for row in rows:
        mine = row["contenders"][first]
        cells = [f"{1e3 * mine['seconds']:.3g} ({_worst(mine)})"]
        peers = [row["contenders"][name] for name in others]
        cells += [f"{peer['seconds'] / mine['seconds']:.3g} ({_worst(peer)})" for peer in peers]
        lines.append(f"| {row['rho']:.3g} | " + " | ".join(cells) + " |")
    ratios = {n: [r["contenders"][n]["seconds"] / r["contenders"][first]["seconds"] for r in rows] for n in others}
    means = [f"{math.exp(sum(map(math.log, values)) / len(values)):.3g}" for values in ratios.values()]
    return "\n".join([*lines, "| geometric mean | | " + " | ".join(means) + " |"])


def _worst(result: dict[str, Any]) -> str:
    errors = list(result["errors"].values())
    return "not a number" if None in errors else f"{max(errors):.0e}"


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "patches", "plane"), default="digits")
    parser.add_argument("--count", type=int, help="use this many points (default: all)")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all three")
    parser.add_argument("--contender", choices=tuple(CONTENDERS), action="append", help="default: all")
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--levels", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="also watch the peak of memory during one more call")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    return parser.parse_args()


def main() -> None:
    """Measure, print tables, write JSON after every task so that an interruption loses no finished part."""
    options = parse()
    y = points(options.data, options.count)
    rate = sgemm_rate()
    result: dict[str, Any] = {"data": options.data, "shape": list(y.shape), "queries": options.queries}
    result |= {"machine": machine(), "sgemm flop/s": rate, "tasks": {}}
    for task in options.task or TASKS:
        ready = prepare(y, task, options.contender or list(CONTENDERS))
        rows = [
            {"rho": float(rho), "contenders": level(y, float(rho), task, ready, options)}
            for rho in levels(options.levels)
        ]
        work = flops(y, task, options.queries)
        for row in rows:
            for measured in row["contenders"].values():
                measured["share of sgemm"] = work / measured["seconds"] / rate
        result["tasks"][task] = rows
        print(f"\n{task}, {options.data} {y.shape[0]} x {y.shape[1]}, {options.queries} queries\n")
        print(table(rows, list(ready)), flush=True)
        if options.json:
            _write(options.json, result)


def _write(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(path)


if __name__ == "__main__":
    main()
