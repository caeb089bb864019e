"""What the command line prints: tables for people, one object of JSON for programs."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from dfmath.profile import LevelProfile
from dfmath.theorems.run import Result
from dfmath.transport import OTReport

LIBRARIES = (
    "numpy",
    "scipy",
    "numba",
    "scikit-learn",
    "torch",
    "jax",
    "cupy",
    "array-api-strict",
    "dask",
    "POT",
    "diffusers",
)
_COLOURS = {"pass": "green", "fail": "bold red", "not applicable": "yellow"}


def versions() -> dict[str, str | None]:
    """Return the versions of dfmath, Python and the libraries it can use; None for those not installed."""
    found: dict[str, str | None] = {"dfmath": _version("dfmath"), "python": platform.python_version()}
    return found | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_json(value: dict[str, Any]) -> None:
    """Print one object; numbers that JSON has no word for become null."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console() -> Console:
    """Return the console that tables go to: as wide as the terminal, or wide enough for a pipe."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=132)


def theorem_table(results: Iterable[Result], title: str) -> Table:
    """Return the table of theorems."""
    table = Table(title=title, title_justify="left")
    table.add_column("no.", no_wrap=True)
    table.add_column("theorem")
    table.add_column("worst", justify="right", no_wrap=True)
    table.add_column("allowed", justify="right", no_wrap=True)
    table.add_column("at rho", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("because", overflow="fold")
    for r in results:
        colour = _COLOURS[r.verdict]
        numbers = ("", "", "") if r.worst is None else _numbers(r)
        table.add_row(r.theorem.number, r.theorem.title, *numbers, f"[{colour}]{r.verdict}[/]", r.reason)
    return table


def _numbers(result: Result) -> tuple[str, str, str]:
    assert result.worst is not None
    worst = result.worst
    where = f"{worst.rho:.3g}" if result.theorem.scope == "level" else "all"
    return f"{worst.discrepancy:.1e}", f"{worst.threshold:.1e}", where


def profile_table(levels: list[LevelProfile], title: str) -> Table:
    """Return the table of Fisher profiles."""
    table = Table(title=title, title_justify="left")
    for heading in ("rho", "rho^2 tr F / d", "smallest", "median", "largest", "effective rank of P"):
        table.add_column(heading, justify="right")
    for level in levels:
        q = level.quantiles
        spectrum = ("", "", "") if q is None else (f"{q[0]:.4g}", f"{q[2]:.4f}", f"{q[-1]:.4f}")
        rank = "" if level.effective_rank is None else f"{level.effective_rank:.2f} ± {level.effective_rank_error:.2f}"
        table.add_row(f"{level.rho:.4g}", f"{level.trace:.4f} ± {level.trace_error:.4f}", *spectrum, rank)
    return table


def transport_table(rows: list[tuple[str, str, OTReport, float]], title: str) -> Table:
    """Return the table of transport checks; each row is (data, schedule, report, largest difference)."""
    table = Table(title=title, title_justify="left")
    headings = ("data", "schedule", "off-diagonal", "rotation-invariant", "min eig.", "gap", "transport?", "differs by")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("data", "schedule") else "right")
    for data, schedule, r, difference in rows:
        table.add_row(
            data,
            schedule,
            f"{r.asymmetry_offdiagonal.mean:.6f} ± {r.asymmetry_offdiagonal.standard_error:.3f}",
            f"{r.asymmetry.mean:.6f}",
            f"{r.min_eigenvalue.values.min():.2e}",
            f"{r.transport_gap:.2e}",
            "yes" if r.is_transport else "no",
            f"{difference:.1e}",
        )
    return table
