"""Measure what the README's first figure shows: ``python docs/readme/plane.py`` writes benchmarks/results/plane.json.

F and the posterior covariance of three points of equal weight in the plane, at three noise levels (alpha = 1).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from dfmath.benchmarks import timing

from dfmath import PointMasses

RESULT = Path(__file__).parents[2] / "benchmarks/results/plane.json"
POINTS = np.array([[0.0, 1.2], [-1.0, -0.6], [1.1, -0.5]])
LEVELS = (1.0, 0.6, 0.35)  # rho
HALF, CELLS, APART = 2.0, 50, 5  # half of the window's width, cells along a side, and from one ellipse to the next


def measure() -> dict[str, Any]:
    """Return the smallest eigenvalue of rho^2 F and log q on a grid, and P at some of its nodes."""
    side = np.linspace(-HALF, HALF, CELLS + 1)
    grid = np.stack(np.meshgrid(side, side), axis=-1)
    levels = [_level(rho, grid) for rho in LEVELS]
    return {"points": POINTS.tolist(), "side": _short(side, 6), "levels": levels}


def _level(rho: float, grid: Any) -> dict[str, Any]:
    q, rows = PointMasses(POINTS).diffuse(1.0, rho), grid.reshape(-1, 2)
    nodes = grid[APART:-1:APART, APART:-1:APART].reshape(-1, 2)
    least = rho**2 * q.fisher(rows).eigvalsh()[:, 0]
    return {
        "rho": rho,
        "least": _short(least.reshape(grid.shape[:2]), 4),
        "log_density": _short(q.log_density(rows).reshape(grid.shape[:2]), 4),
        "nodes": _short(nodes, 6),
        "covariance": _short(q.fisher(nodes).posterior_covariance().to_dense(), 6),
    }


def _short(values: Any, digits: int) -> Any:
    return values.round(digits).tolist()


def main() -> None:
    """Write the file."""
    timing.write(RESULT, json.dumps({"machine": timing.machine(), **measure()}) + "\n")


if __name__ == "__main__":
    main()
