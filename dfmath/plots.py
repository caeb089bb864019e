"""Figures. Matplotlib is imported here alone, and only when a figure is drawn."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dfmath.backends._compat import to_numpy
from dfmath.flow import probability_flow
from dfmath.profile import QUANTILES, LevelProfile
from dfmath.transport import OTReport

FORMATS = (".png", ".svg", ".pdf")


def destination(path: str | Path) -> Path:
    """Return the path of a figure to be written, or say why it can't be: before the work, not after it."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"plot must end in one of {', '.join(FORMATS)}, got {str(path)!r}")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"plot must be in a folder that exists, got {str(path)!r}")
    return path


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure to a temporary name beside `path`, then rename: an interruption leaves no half a file."""
    path = destination(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
    return path


def _figure(columns: int, width: float = 4.6, height: float = 3.8) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def profile(levels: list[LevelProfile], title: str) -> Any:
    """Draw trace, spectrum and effective rank of the Fisher against the noise level."""
    with_spectrum = levels[0].quantiles is not None
    figure, axes = _figure(3 if with_spectrum else 1)
    rho = np.array([level.rho for level in levels])
    trace, error = np.array([(level.trace, level.trace_error) for level in levels]).T
    _line(axes[0], rho, trace, 2 * error, r"$\rho^2\,\mathrm{tr}F\,/\,d$")
    if with_spectrum:
        _quantiles(axes[1], rho, np.array([level.quantiles for level in levels]))
        rank = [(level.effective_rank, level.effective_rank_error) for level in levels]
        values, errors = np.array(rank, dtype=np.float64).T
        _line(axes[2], rho, values, 2 * errors, r"effective rank of $P$: $(\mathrm{tr}P)^2/|P|_F^2$")
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlabel(r"noise-to-signal ratio $\rho$")
        axis.grid(alpha=0.25)
    figure.suptitle(title)
    return figure


def _line(axis: Any, x: Any, y: Any, error: Any, label: str) -> None:
    axis.plot(x, y, "o-", markersize=3)
    axis.fill_between(x, y - error, y + error, alpha=0.25)
    axis.set_ylabel(label)


def _quantiles(axis: Any, x: Any, values: Any) -> None:
    names = ("smallest", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "largest")
    for column, name in zip(values.T, names, strict=True):
        axis.plot(x, column, label=name)
    if values.min() < -10.0:  # where the density is far from log-concave: linear near [0, 1], logarithmic beyond
        axis.set_yscale("symlog", linthresh=1.0)
    axis.axhline(0.0, color="0.5", linewidth=0.8)
    axis.set_ylabel(r"eigenvalues of $\rho^2 F$")
    axis.legend(fontsize=8, title="quantile")


def trajectories(cases: list[tuple[str, Any, OTReport]], rho_max: float, rho_min: float, shown: int = 24) -> Any:
    """Draw two-dimensional trajectories, coloured by the asymmetry of their Jacobian; one panel for each case.

    Each case is (title, prior, report). Axes are x = z/sqrt(1 + rho^2), which is of order one at every noise level.
    """
    figure, axes = _figure(len(cases), width=5.2, height=4.6)
    largest = max(float(report.asymmetry.values[:shown].max()) for _, _, report in cases)
    for axis, (title, prior, report) in zip(axes, cases, strict=True):
        paths = _paths(prior, report.starts[:shown], rho_max, rho_min)
        lines = _draw_paths(axis, paths, report.asymmetry.values[:shown], max(largest, 1e-12))
        points = to_numpy(prior.components.centres)[0]
        axis.plot(*points.T, "k*", markersize=11, zorder=5, label="data")
        axis.set(title=title, xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
        axis.plot(*paths[0].T, "o", color="0.4", markersize=3, label="starts")
        axis.legend(fontsize=8, loc="lower left")
    figure.colorbar(lines, ax=axes, label=r"asymmetry $|A-A^T|_F\,/\,2|A|_F$")
    return figure


def _draw_paths(axis: Any, paths: Any, colours: Any, largest: float) -> Any:
    from matplotlib.collections import LineCollection

    lines = LineCollection(list(paths.swapaxes(0, 1)), cmap="viridis", linewidths=1.2)
    lines.set_array(np.asarray(colours))
    lines.set_clim(0.0, largest)
    axis.add_collection(lines)
    return lines


def _paths(prior: Any, starts: Any, rho_max: float, rho_min: float, steps: int = 80) -> Any:
    """States along the flow, (steps, n, 2), scaled to x."""
    rhos, z = np.geomspace(rho_max, rho_min, steps), starts
    states = [to_numpy(z) / math.hypot(1.0, rho_max)]
    for high, low in pairwise(rhos):
        z = probability_flow(prior, z, float(high), float(low), rtol=1e-6).x
        states.append(to_numpy(z) / math.hypot(1.0, low))
    return np.stack(states)
