"""The spectrum of F along the noise levels of real data: quantiles, effective rank, and where most of it happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from dfmath.benchmarks.workloads import patches
from dfmath.experiments import output

from dfmath import PointMasses
from dfmath.datasets import digits
from dfmath.profile import QUANTILES, SEEN, fisher_profile
from dfmath.report import below_one

QUESTION = (
    "How do the eigenvalues of the diffusion Fisher change with the noise on real data? In canonical form they are "
    "those of rho^2 F = I - P/rho^2, at most 1 [MATH 1.2]: 1 where the data say nothing in a direction, and far below "
    "0 where several data points compete. The effective rank (tr P)^2/|P|_F^2 counts the directions in which they do; "
    f"draws with tr P up to {SEEN:g} of rho^2 and of the data's variance, one point as good as exactly, have none."
)


@dataclass(frozen=True)
class Plan:
    """Noise levels, draws at each, and points of the patches."""

    levels: int = 18
    draws: int = 64
    patches: int = 20_000
    side: int = 8
    rho_max: float = 80.0
    rho_min: float = 0.02
    seed: int = 0

    @property
    def parts(self) -> int:
        """Of the work."""
        return 2 * self.levels


FULL = Plan()
QUICK = Plan(levels=9, draws=16, patches=2_000, side=4)


def measure(plan: Plan, advance: Callable[[str], None]) -> dict[str, Any]:
    """Profiles of F of the digits and of patches of photographs."""
    data = {
        "digits": digits(),
        "patches": patches(plan.patches, side=plan.side).astype(np.float64),
    }
    found = {}
    for name, points in data.items():
        prior, rows = PointMasses(points), []
        for rho in np.geomspace(plan.rho_max, plan.rho_min, plan.levels).tolist():
            rows.append(asdict(fisher_profile(prior, rho, plan.draws, plan.seed)))
            advance(f"{name}, rho = {rho:.3g}")
        found[name] = {"shape": list(points.shape), "levels": rows}
    return {"data": found}


def tables(result: dict[str, Any]) -> list[output.Table]:
    """One row for each noise level of each data set."""
    columns = ("rho", "rho^2 tr F/d", *_names(), "effective rank of P", "of draws")
    return [
        output.Table(f"Eigenvalues of rho^2 F, {_about(name, found, result)}", columns, _rows(found["levels"]))
        for name, found in result["data"].items()
    ]


def _names() -> tuple[str, ...]:
    return ("smallest", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "largest")


def _about(name: str, found: dict[str, Any], result: dict[str, Any]) -> str:
    n, d = found["shape"]
    what = {"digits": "scikit-learn's digits", "patches": "patches of scikit-learn's two photographs"}[name]
    return (
        f"{what}, {n} x {d}: means over {result['settings']['draws']} draws at each level, of the effective rank over "
        "those that have one; ± standard error"
    )


def _rows(levels: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (row["rho"], _below_one(row["trace"], row["trace_error"]), *_quantiles(row), _rank(row), row["ranked"])
        for row in levels
    ]


def _quantiles(row: dict[str, Any]) -> list[str]:
    return [_below_one(*pair) for pair in zip(row["quantiles"], row["quantile_errors"], strict=True)]


def _below_one(value: float, error: float) -> str:
    shown = below_one(value)
    return shown if shown == "1" else f"{shown} ± {error:.1g}"


def _rank(row: dict[str, Any]) -> str:
    rank, error = row["effective_rank"], row["effective_rank_error"]
    if not np.isfinite(rank):
        return "one point"
    return f"{rank:.3g} ± {error:.1g}" if np.isfinite(error) else f"{rank:.3g}"


def seen(result: dict[str, Any]) -> str:
    """Say what the numbers say."""
    return " ".join(_sentence(name, found) for name, found in result["data"].items())


def _sentence(name: str, found: dict[str, Any]) -> str:
    rows, dim = found["levels"], found["shape"][1]
    lowest = min(rows, key=lambda row: row["quantiles"][0])
    widest = max(rows, key=lambda row: _or_zero(row["effective_rank"]))
    return (
        f"Of the {name} the smallest eigenvalue of rho^2 F is on average {_quantiles(lowest)[0]} at rho = "
        f"{lowest['rho']:.3g}, where it is lowest, and the median of the eigenvalues there {_quantiles(lowest)[2]}; "
        f"the effective rank of P is largest at rho = {widest['rho']:.3g}, {_rank(widest)} of {dim} directions."
    )


def _or_zero(value: float) -> float:
    return value if np.isfinite(value) else 0.0


COLOURS = (output.VERMILION, output.ORANGE, output.GREEN, output.SKY, output.BLUE)


def figure(result: dict[str, Any]) -> Any:
    """Quantiles and effective ranks against the noise level, a row for each data set."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(12.0, 7.6), layout="constrained")
    grid = drawn.subplots(2, 2, sharex=True, width_ratios=(1.5, 1.0))
    for (spectrum, ranks), (name, found) in zip(grid, result["data"].items(), strict=True):
        rho = [row["rho"] for row in found["levels"]]
        _draw_quantiles(spectrum, rho, found["levels"])
        spectrum.set_title(f"{name}, {found['shape'][0]} x {found['shape'][1]}")
        rank, error = (
            np.array([row[key] for row in found["levels"]]) for key in ("effective_rank", "effective_rank_error")
        )
        ranks.errorbar(rho, rank, 2.0 * error, color=COLOURS[4], marker="o", markersize=3, capsize=2)
        ranks.set(ylabel=r"effective rank of $P$: $(\mathrm{tr}P)^2/|P|_F^2$", ylim=(0.0, None))
        ranks.grid(alpha=0.25)
    for axes in grid[-1]:
        axes.set_xlabel(r"noise-to-signal ratio $\rho$")
    return drawn


def _draw_quantiles(axes: Any, rho: list[float], levels: list[dict[str, Any]]) -> None:
    """Where eigenvalues lie far below 0 linear near [0, 1], and logarithmic beyond."""
    for k, (name, colour) in enumerate(zip(_names(), COLOURS, strict=True)):
        axes.semilogx(rho, [row["quantiles"][k] for row in levels], "o-", color=colour, markersize=6 - k, label=name)
    if min(row["quantiles"][0] for row in levels) < -10.0:
        axes.set_yscale("symlog", linthresh=1.0)
    axes.axhline(0.0, color="0.5", linewidth=0.8)
    axes.set_ylabel(r"eigenvalues of $\rho^2 F$")
    axes.legend(fontsize="small", title="quantile", loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.25)
