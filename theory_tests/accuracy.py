"""Worst relative errors against 60-digit arithmetic, beside plain dense torch code on the same cases.

    pip install -c constraints.txt -e ".[test]" && python theory_tests/accuracy.py [--output FOLDER]

Queries lie midway between near neighbours, where weights are not trivial at any noise level. The peer is what most
hand-written code does: softmax of -(|x|^2 + |y|^2 - 2 x.y)/(2 sigma^2), tr P as E|y|^2 - |m|^2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dfmath.benchmarks import timing

from dfmath import PointMasses
from dfmath.datasets import digits

sys.path.insert(0, str(Path(__file__).parent))
from arbitrary_precision import Truth, point_masses

ALPHA, QUERIES = 0.7, 3
QUANTITIES = ("mean", "score", "fisher_product", "fisher_trace", "covariance_trace")


def cases() -> Iterator[tuple[str, Any, float]]:
    """Yield (name, points, sigma)."""
    rng = np.random.default_rng(0)
    plane = rng.standard_normal((2000, 2))
    sets: list[tuple[str, Any, tuple[float, ...]]] = [
        ("digits", digits()[:400], (3.0, 0.2, 0.05, 0.01, 0.002)),
        ("pixels 0..255", rng.integers(0, 256, (300, 64)).astype(np.float64), (50.0, 1.0, 0.02)),
        ("2-D, centre (3, -2)", plane + np.array([3.0, -2.0]), (0.2, 0.05, 0.01, 0.002)),
        ("2-D, centre (300, -200)", plane[:400] + np.array([300.0, -200.0]), (0.3, 0.05, 0.01)),
        ("near-equal, 1e3 away", 1e3 * np.array([[1.0, 2.0], [1.0 + 1e-9, 2.0], [5.0, 5.0]]), (1.0, 1e-3)),
    ]
    for name, points, sigmas in sets:
        for sigma in sigmas:
            yield name, points, sigma


def midway(points: Any, sigma: float, rng: np.random.Generator) -> Any:
    """Queries between a point and its nearest neighbour, a little off the middle."""
    rows = []
    for i in rng.integers(len(points), size=QUERIES):
        distance = ((points - points[i]) ** 2).sum(axis=1)
        distance[distance == 0] = np.inf
        rows.append(ALPHA * (points[i] + points[distance.argmin()]) / 2)
    return np.array(rows) + 0.003 * sigma * rng.standard_normal((QUERIES, points.shape[1]))


def ours(points: Any, x: Any, sigma: float, v: Any) -> dict[str, Any]:
    """Evaluate the library."""
    q = PointMasses(points).diffuse(ALPHA, sigma)
    fisher = q.fisher(x)
    return {
        "mean": q.posterior_mean(x),
        "score": q.score(x),
        "fisher_product": fisher.matvec(v),
        "fisher_trace": fisher.trace(),
        "covariance_trace": fisher.posterior_covariance().trace(),
    }


def plain(points: Any, x: Any, sigma: float, v: Any) -> dict[str, Any]:
    """Evaluate dense torch code as it is usually written."""
    y, x, v = (torch.from_numpy(a) for a in (points, x, v))
    square = (x**2).sum(1, keepdim=True) - 2 * ALPHA * x @ y.T + ALPHA**2 * (y**2).sum(1)
    w = torch.softmax(-square / (2 * sigma**2), dim=1)
    mean = w @ y
    trace = w @ (y**2).sum(1) - (mean**2).sum(1)
    product = (w * (v @ y.T)) @ y - mean * (mean * v).sum(1, keepdim=True)
    factor = ALPHA**2 / sigma**4
    found = {
        "mean": mean,
        "score": (ALPHA * mean - x) / sigma**2,
        "fisher_product": v / sigma**2 - factor * product,
        "fisher_trace": y.shape[1] / sigma**2 - factor * trace,
        "covariance_trace": trace,
    }
    return {key: value.numpy() for key, value in found.items()}


def worst(found: dict[str, Any], truths: list[Truth], quantity: str) -> float:
    """Largest error over the queries, relative to the true value's length."""
    errors = []
    for row, truth in zip(found[quantity], truths, strict=True):
        wanted = np.asarray(getattr(truth, quantity))
        size = float(np.linalg.norm(np.atleast_1d(wanted)))
        if size > 1e-30:  # below, float32 has no numbers to be right with
            errors.append(float(np.linalg.norm(np.atleast_1d(np.float64(row) - wanted))) / size)
    return max(errors, default=0.0)


def measure() -> dict[str, dict[str, dict[str, float]]]:
    """Return worst[case][method][quantity]."""
    methods: list[tuple[str, Callable[..., dict[str, Any]]]] = [("dfmath", ours), ("plain torch", plain)]
    table: dict[str, dict[str, dict[str, float]]] = {}
    rng = np.random.default_rng(1)
    for name, points, sigma in cases():
        for dtype in ("float64", "float32"):
            y, x = points.astype(dtype), midway(points, sigma, rng).astype(dtype)
            v = rng.standard_normal(x.shape).astype(dtype)
            truths = [point_masses(y, np.ones(len(y)), a, ALPHA, sigma, b) for a, b in zip(x, v, strict=True)]
            for method, evaluate in methods:
                found = evaluate(y, x, sigma, v)
                row = table.setdefault(f"{name}, sigma = {sigma:g}", {}).setdefault(f"{method} {dtype}", {})
                row.update({quantity: worst(found, truths, quantity) for quantity in QUANTITIES})
    return table


def main() -> None:
    """Write all errors and what they were measured on to accuracy.json, and print the worst of each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="benchmarks/results", help="folder for accuracy.json")
    path = timing.folder(parser.parse_args().output) / "accuracy.json"
    table = measure()
    timing.write(path, json.dumps({"machine": timing.machine(), "cases": table}, indent=1) + "\n")
    for way in next(iter(table.values())):
        print(f"{way}: at most {max(max(ways[way].values()) for ways in table.values()):.0e} in {len(table)} cases")
    print(f"all of them: {path}")


if __name__ == "__main__":
    main()
