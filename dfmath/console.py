"""What every command prints with: a progress bar, one JSON object, a figure in a file."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def needs(command: str, extra: str, *packages: str) -> None:
    """Raise a ValueError that says what to install, unless all packages are there."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        names, install = " and ".join(missing), f"pip install -c constraints.txt -e '.[{extra}]'"
        raise ValueError(f"{command} needs {names}: in the folder of dfmath, {install}")


def save(figure: Any, plot: str, json: bool) -> None:
    """Write a figure and say where; where programs read standard output, say it beside."""
    from dfmath import plots

    wrote("figure", plots.save(figure, plot), json)


def wrote(what: str, path: Path, json: bool) -> None:
    """Say where something is; where programs read standard output, say it beside."""
    print(f"{what}: {path}", file=sys.stderr if json else sys.stdout)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """A bar that is told of each part once it is done; None for a total that is not known yet."""
    with _bar(what, total) as update:
        yield lambda description: update(advance=1, description=description)


@contextmanager
def under_way(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar that is told of each part before it begins, so that one sees what takes long."""
    begun = itertools.count()
    with _bar(what, total) as update:
        yield lambda description: update(completed=next(begun), description=description)


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, silence in a pipe."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    screen = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        yield partial(bar.update, bar.add_task("", total=total))
