"""What the command line prints: tables for people, one object of JSON for programs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dfmath.held_out import LevelLikelihood
from dfmath.profile import LevelProfile
from dfmath.theorems.run import Result
from dfmath.transport import OTReport

if TYPE_CHECKING:
    from dfmath.integrations.diffusers import ImageLikelihood

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
ARRAY_LIBRARIES = ("numpy", "torch", "jax", "cupy", "array-api-strict")
_WHEELS = {"cupy": ("cupy", "cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x")}  # one library, a name for each CUDA
_COLOURS = {"pass": "green", "fail": "bold red", "not applicable": "yellow"}


def versions() -> dict[str, str | None]:
    """Return the versions of dfmath, Python and the libraries it can use; None for those not installed."""
    found: dict[str, str | None] = {"dfmath": _version("dfmath"), "python": platform.python_version()}
    return found | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str | None:
    for wheel in _WHEELS.get(name, (name,)):
        try:
            return importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def array_libraries() -> list[str]:
    """Return the installed array libraries that priors can be made of."""
    return [name for name in ARRAY_LIBRARIES if importlib.util.find_spec(name.replace("-", "_")) is not None]


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: 1 draw, 2 draws."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_json(value: dict[str, Any]) -> None:
    """Print one object; numbers that JSON has no word for become null."""
    print(json.dumps(plain(value), indent=2, allow_nan=False))


def plain(value: Any) -> Any:
    """Return the value with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console() -> Console:
    """Return the console that tables go to: as wide as the terminal or COLUMNS says, or wide enough for a pipe."""
    plain = Console()
    return plain if plain.is_terminal or os.environ.get("COLUMNS", "").isdigit() else Console(width=132)


def theorem_table(results: Iterable[Result], title: str) -> Table:
    """Return the table of theorems; reasons that several share stand once, below it."""
    results = list(results)
    letters = _letters([r.reason for r in results])
    table = Table(title=escape(title), title_justify="left", caption=_legend(letters), caption_justify="left")
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
        because = f"({letters[r.reason]})" if r.reason in letters else escape(r.reason)
        table.add_row(r.theorem.number, r.theorem.title, *numbers, f"[{colour}]{r.verdict}[/]", because)
    return table


def _letters(reasons: list[str]) -> dict[str, str]:
    """A letter for each reason that is given more than once."""
    repeated = [reason for reason, count in Counter(reasons).items() if count > 1 and reason]
    return dict(zip(repeated, ascii_lowercase, strict=False))  # beyond 26 the rest stay in their rows


def _legend(letters: dict[str, str]) -> str | None:
    return "\n".join(f"({letter}) {escape(reason)}" for reason, letter in letters.items()) or None


def _numbers(result: Result) -> tuple[str, str, str]:
    assert result.worst is not None
    worst = result.worst
    where = f"{worst.rho:.3g}" if result.theorem.scope == "level" else "all"
    return f"{worst.discrepancy:.1e}", f"{worst.threshold:.1e}", where


def _estimate(mean: float | None, error: float | None, digits: int, error_digits: int | None = None) -> str:
    """A mean and its standard error: without the error where one sample tells none, empty where there is no mean."""
    if mean is None:
        return ""
    shown = f"{mean:.{digits}f}"
    if error is None or not math.isfinite(error):
        return shown
    return f"{shown} ± {error:.{digits if error_digits is None else error_digits}f}"


RANKED = "eigenvalues of rho^2 F: means over draws; effective rank: over the ( ) whose posterior is not one point"
CANCELLED = 1e-13  # what is left of 1 - P/rho^2 by rounding


def profile_table(levels: list[LevelProfile], title: str) -> Table:
    """Return the table of Fisher profiles."""
    with_spectrum = any(level.quantiles is not None for level in levels)
    caption = RANKED if with_spectrum else None
    table = Table(title=escape(title), title_justify="left", caption=caption, caption_justify="left")
    spectrum = ("smallest", "median", "largest", "effective rank of P") if with_spectrum else ()
    for heading in ("rho", "rho^2 tr F / d", *spectrum):
        table.add_column(heading, justify="right")
    for level in levels:
        table.add_row(f"{level.rho:.4g}", _estimate(level.trace, level.trace_error, 4), *_spectrum_cells(level))
    return table


def _spectrum_cells(level: LevelProfile) -> tuple[str, ...]:
    if level.quantiles is None:
        return ()
    rank = _estimate(level.effective_rank, level.effective_rank_error, 2)
    counted = rank if level.ranked is None else f"{rank} ({level.ranked})".strip()
    return *(below_one(level.quantiles[k]) for k in (0, 2, -1)), counted


def below_one(value: float) -> str:
    """Write an eigenvalue of rho^2 F, at most 1; one that rounds to 1 by its distance from it."""
    gap = 1.0 - value
    if gap >= 0.01:
        return f"{value:.3f}" if gap < 10.0 else f"{value:.4g}"
    return f"1 - {gap:.1e}" if gap > CANCELLED else "1"


def likelihood_table(levels: list[LevelLikelihood], title: str) -> Table:
    """Return the table of likelihoods along the noise levels; a star marks the level that suits the points best."""
    caption = "-log q per dimension, mean ± standard error over the points; * smallest" if len(levels) > 1 else None
    table = Table(title=escape(title), title_justify="left", caption=caption, caption_justify="left")
    for heading in ("rho", "nats per dimension", "bits per dimension", ""):
        table.add_column(heading, justify="right")
    best = min(levels, key=lambda level: level.nats)
    for level in levels:
        star = "*" if level is best and len(levels) > 1 else ""
        table.add_row(f"{level.rho:.4g}", _estimate(level.nats, level.error, 4), f"{level.bits:.4f}", star)
    return table


def image_table(images: Sequence[ImageLikelihood], title: str) -> Table:
    """Return the table of images' likelihoods."""
    caption = "log q in nats, ± standard error over the probes; bits per dimension are of pixels, latents have no bins"
    table = Table(title=escape(title), title_justify="left", caption=caption, caption_justify="left")
    for heading in ("image", "log q", "nats per dimension", "bits per dimension"):
        table.add_column(heading, justify="left" if heading == "image" else "right")
    for image in images:
        bits = "" if image.bits_per_dimension is None else f"{image.bits_per_dimension:.4f}"
        log_density = _estimate(image.log_density, image.standard_error, 2)
        table.add_row(escape(image.file), log_density, f"{-image.log_density / image.dim:.4f}", bits)
    return table


_TRANSPORT_CAPTION = """\
off-diagonal and rotation-invariant: asymmetry of the flow's Jacobian A, mean ± standard error over the starts
min eig.: smallest eigenvalue of (A + A^T)/2 at any start
gap: how much dearer the flow's pairs are than the cheapest matching of their points, relative to it (0 proves nothing)
transport?: whether A is symmetric within the tolerance, with no negative eigenvalue, at every start
differs by: largest difference of either asymmetry from the canonical integration at any start"""


def transport_table(rows: list[tuple[str, str, OTReport, float]], title: str) -> Table:
    """Return the table of transport checks; each row is (data, schedule, report, largest difference)."""
    table = Table(title=escape(title), title_justify="left", caption=_TRANSPORT_CAPTION, caption_justify="left")
    headings = ("data", "schedule", "off-diagonal", "rotation-invariant", "min eig.", "gap", "transport?", "differs by")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("data", "schedule") else "right")
    for data, schedule, r, difference in rows:
        table.add_row(
            escape(data),
            schedule,
            _estimate(r.asymmetry_offdiagonal.mean, r.asymmetry_offdiagonal.standard_error, 6, 3),
            _estimate(r.asymmetry.mean, r.asymmetry.standard_error, 6, 3),
            f"{r.min_eigenvalue.values.min():.2e}",
            f"{r.transport_gap:.2e}",
            "yes" if r.is_transport else "no",
            f"{difference:.1e}",
        )
    return table
