"""Figures. Matplotlib is imported here alone, and only when a figure is drawn."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dfmath import files
from dfmath.backends._compat import to_numpy
from dfmath.flow import probability_flow
from dfmath.profile import QUANTILES, LevelProfile
from dfmath.theorems.run import Level
from dfmath.transport import OTReport

MOST_STARS = 20_000
FORMATS = (".png", ".svg", ".pdf")


def destination(path: str | Path) -> Path:
    """Return the path of a figure to be written, or say why it can't be: before the work, not after it."""
    return files.destination("plot", path, FORMATS)


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure to a temporary name beside `path`, then rename: an interruption leaves no half a file."""
    path = destination(path)
    with files.replacing("plot", path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def svg(figure: Any) -> str:
    """Return a figure as SVG, letters as shapes: it looks the same where its fonts are missing."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "dfmath"}):
        figure.savefig(buffer, format="svg", transparent=True)
    return buffer.getvalue()


def _figure(columns: int, width: float = 4.6, height: float = 3.8) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def profile(levels: list[LevelProfile], title: str) -> Any:
    """Draw trace, spectrum and effective rank of the Fisher against the noise level."""
    with_spectrum = levels[0].quantiles is not None
    figure, axes = _figure(3) if with_spectrum else _figure(1, width=6.4, height=4.4)
    rho = np.array([level.rho for level in levels])
    trace, error = np.array([(level.trace, level.trace_error) for level in levels]).T
    _line(axes[0], rho, trace, 2 * error, r"$\rho^2\,\mathrm{tr}F\,/\,d$")
    if with_spectrum:
        _quantiles(axes[1], rho, np.array([level.quantiles for level in levels]))
        _ranks(axes[2], rho, levels)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlim(rho.min() / 1.2, rho.max() * 1.2)  # the same in each panel, also where one has gaps
        axis.set_xlabel(r"noise-to-signal ratio $\rho$")
        axis.grid(alpha=0.25)
    figure.suptitle(_wrapped(title, figure))
    return figure


def _wrapped(title: str, figure: Any) -> str:
    """Break a title into lines that the figure holds, at about ten letters an inch."""
    return textwrap.fill(title, int(10 * figure.get_figwidth()))


def _ranks(axis: Any, rho: Any, levels: list[LevelProfile]) -> None:
    """Effective ranks, with gaps where there is none: None becomes NaN."""
    ranks = np.array([(level.effective_rank, level.effective_rank_error) for level in levels], dtype=np.float64)
    _line(axis, rho, ranks[:, 0], 2 * ranks[:, 1], r"effective rank of $P$: $(\mathrm{tr}P)^2/|P|_F^2$")


def _line(axis: Any, x: Any, y: Any, error: Any, label: str) -> None:
    axis.plot(x, y, "o-", markersize=3)
    axis.fill_between(x, y - error, y + error, alpha=0.25)
    axis.set_ylabel(label)


def _quantiles(axis: Any, x: Any, values: Any) -> None:
    names = ("smallest", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "largest")
    sizes = np.linspace(8.0, 2.5, len(names))  # where curves coincide, each later one shows inside the earlier
    for column, name, size, line in zip(values.T, names, sizes, ("-", "--", "-.", ":", "-"), strict=True):
        axis.plot(x, column, line, marker="o", markersize=size, linewidth=0.5 + size / 4, label=name)
    if values.min() < -10.0:  # where the density is far from log-concave: linear near [0, 1], logarithmic beyond
        axis.set_yscale("symlog", linthresh=1.0)
    axis.axhline(0.0, color="0.5", linewidth=0.8)
    axis.set_ylabel(r"eigenvalues of $\rho^2 F$")
    axis.legend(fontsize=8, title="quantile")


def trajectories(cases: list[tuple[str, Any, OTReport]], rho_max: float, rho_min: float, shown: int = 24) -> Any:
    """Draw two-dimensional trajectories, coloured by the asymmetry of their final Jacobian; one panel for each case.

    Each case is (title, prior, report). Axes are z/sqrt(1 + rho^2), which is of order one at every noise level.
    """
    figure, axes = _figure(len(cases), width=5.6, height=5.0)
    largest = max(float(report.asymmetry.values[:shown].max()) for _, _, report in cases)
    for axis, (title, prior, report) in zip(axes, cases, strict=True):
        paths = _paths(prior, report.starts[:shown], rho_max, rho_min)
        _draw_data(axis, centres(prior))
        lines = _draw_paths(axis, paths, report.asymmetry.values[:shown], max(largest, 1e-12))
        axis.plot(*paths[0].T, "o", color="0.3", markersize=3.5, zorder=3, label="starts")
        axis.set(title=textwrap.fill(title, 44), xlabel=_SCALED.format(1), ylabel=_SCALED.format(2))
        axis.set_aspect("equal", adjustable="datalim")  # panels keep their size, and the colour bar theirs
        axis.legend(fontsize=8, loc="best")
    figure.colorbar(lines, ax=list(axes), label=r"final asymmetry $|A-A^T|_F\,/\,2|A|_F$", pad=0.02)
    return figure


_SCALED = r"$z_{}/\sqrt{{1+\rho^2}}$"


def centres(prior: Any) -> Any:
    """Return centres of the components, (K, d), of no more than can be told apart."""
    return to_numpy(prior.components.tile(0, min(prior.count, MOST_STARS), prior.dtype).centres)[0]


def _draw_data(axis: Any, points: Any) -> None:
    """Stars below the trajectories, smaller and fainter the more there are."""
    crowd = math.log10(max(len(points), 3) / 3)  # 0 for the three published points, 2 for 300, 4 for 30000
    size, alpha = max(2.0, 12.0 - 4.0 * crowd), max(0.15, 1.0 - 0.3 * crowd)
    axis.plot(*points.T, "*", color="black", markersize=size, alpha=alpha, markeredgewidth=0, zorder=1, label="data")


def _draw_paths(axis: Any, paths: Any, colours: Any, largest: float) -> Any:
    from matplotlib.collections import LineCollection

    lines = LineCollection(
        list(paths.swapaxes(0, 1)),
        cmap="viridis",
        linewidths=1.4,
        zorder=2,
        label="trajectories, coloured by final asymmetry",
    )
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


_WITHIN, _BEYOND = "#3a87c8", "#d55e00"  # seen on white and on black; told apart by their shapes, too


def discrepancies(levels: Sequence[Level], limits: tuple[float, float]) -> Any:
    """Draw a theorem's discrepancies against the noise level, log-log, with what is allowed as dashes.

    Parameters
    ----------
    levels
        At least one. Dots are within what is allowed, crosses beyond it; triangles lie on the edge: on the
        lower one zeros and what is as small, on the upper one what is not finite.
    limits
        Of the axis of discrepancies.
    """
    figure, (axis,) = _figure(1, width=2.7, height=1.8)
    rho, found, allowed = np.array([(level.rho, level.discrepancy, level.threshold) for level in levels]).T
    height = np.nan_to_num(found, nan=np.inf).clip(*limits)
    axis.loglog(rho, np.where(allowed > 0, allowed, np.nan), "--", color="black", linewidth=1.0)
    axis.loglog(rho, height, color="0.5", linewidth=0.7)
    for x, y, value, most in zip(rho, height, found, allowed, strict=True):
        edge = "v" if value < limits[0] else None if value <= limits[1] else "^"
        shape, colour, size = ("o", _WITHIN, 4.0) if value <= most else ("X", _BEYOND, 7.0)
        axis.plot(x, y, edge or shape, color=colour, markersize=6.0 if edge else size, markeredgewidth=0, clip_on=False)
    _few_ticks(axis, rho, limits)
    return figure


def _few_ticks(axis: Any, rho: Any, limits: tuple[float, float]) -> None:
    """A tick at each second or so power of ten, in small letters that a small panel has room for."""
    axis.minorticks_off()
    axis.tick_params(labelsize=8)
    axis.set_xlabel(r"$\rho$", fontsize=8)
    for name, (low, high) in (("x", (rho.min() / 1.5, rho.max() * 1.5)), ("y", limits)):
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        chosen = powers[:: max(1, len(powers) // 4)]
        labels = [f"{10.0**k:g}" if abs(k) < 4 else f"1e{k}" for k in chosen]
        axis.set(**{f"{name}lim": (low, high), f"{name}ticks": [10.0**k for k in chosen], f"{name}ticklabels": labels})
    axis.grid(alpha=0.25)
