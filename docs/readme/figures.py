"""Draw the README's two figures from committed results: ``python docs/readme/figures.py``.

Both are PNGs beside this script.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from dfmath import plots

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks/results"
COLOURS = {"dfmath": "C0", "torch dense": "C1", "torch jvp": "C3"}
NAMES = {"dfmath": "dfmath", "torch dense": "torch, dense float32", "torch jvp": "torch.func.jvp"}


def result(name: str) -> Any:
    """What a file of results holds."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def fisher() -> Any:
    """The smallest eigenvalue of rho^2 F, the density's contours and ellipses of P, at three noise levels."""
    found = result("plane")
    figure = Figure(figsize=(9.0, 3.3), layout="constrained")
    axes = figure.subplots(1, len(found["levels"]))
    for axis, level in zip(axes, found["levels"], strict=True):
        shade = _level(axis, np.array(found["side"]), level)
        axis.plot(*np.array(found["points"]).T, "*", color="gold", markeredgecolor="black", markersize=11)
    ticks = [-3, -2, -1, 0, 1]
    figure.colorbar(shade, ax=list(axes), label=r"smallest eigenvalue of $\rho^2 F$", pad=0.02, ticks=ticks)
    return figure


def _level(axis: Any, side: Any, level: dict[str, Any]) -> Any:
    norm = TwoSlopeNorm(vcenter=0.0, vmin=-3.0, vmax=1.0)
    bands = np.concatenate([np.linspace(-3.0, 0.0, 7), np.linspace(0.0, 1.0, 7)[1:]])
    least = np.minimum(level["least"], 1.0)
    shade = axis.contourf(side, side, least, bands, cmap="RdBu", norm=norm, alpha=0.75, extend="min")
    axis.contour(side, side, np.exp(level["log_density"]), colors="0.35", linewidths=0.6)
    _ellipses(axis, np.array(level["nodes"]), np.array(level["covariance"]))
    axis.set(title=rf"$\rho = {level['rho']:g}$", xticks=[], yticks=[])
    return shade


def _ellipses(axis: Any, nodes: Any, covariance: Any) -> None:
    """One standard deviation of the posterior, a quarter of its size."""
    values, vectors = np.linalg.eigh(covariance)
    angle = np.linspace(0.0, 2.0 * np.pi, 60)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    ellipses = 0.25 * vectors @ (np.sqrt(np.maximum(values, 0.0))[:, :, None] * circle)
    for node, ellipse in zip(nodes, ellipses, strict=True):
        axis.plot(*(node[:, None] + ellipse), color="black", linewidth=0.8)


def product() -> Any:
    """Time and error of F v against the noise level, from the committed benchmark."""
    found = result("moments_patches_product")
    rows = found["tasks"]["one product"]["levels"]
    rho = [row["rho"] for row in rows]
    figure = Figure(figsize=(9.0, 3.3), layout="constrained")
    times, errors = figure.subplots(1, 2)
    for name, label in NAMES.items():
        of_name = [row["contenders"][name] for row in rows]
        style: dict[str, Any] = {"color": COLOURS[name], "marker": "o", "markersize": 4, "label": label}
        times.loglog(rho, [part["seconds"] for part in of_name], **style)
        errors.loglog(rho, [part["errors"]["product"] for part in of_name], **style)
    errors.axhline(1.0, color="0.5", linewidth=0.8)
    (count, dim), machine = found["shape"], found["machine"]
    times.set(xlabel=r"noise-to-signal ratio $\rho$", ylabel=f"seconds on {machine['cores']} cores")
    times.set_title(f"Time of $F v$: {count:,} × {dim} patches, {found['queries']} queries")
    errors.set(xlabel=r"noise-to-signal ratio $\rho$", ylabel="worst relative error", title="Error of $F v$, float32")
    times.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    times.minorticks_off()
    for axis in (times, errors):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return figure


def main() -> None:
    """Draw both."""
    plots.save(fisher(), HERE / "fisher.png")
    plots.save(product(), HERE / "product.png")


if __name__ == "__main__":
    main()
