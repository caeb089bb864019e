"""Theorems of the caller's own, in a Python file that registers them."""

from __future__ import annotations

import sys
import traceback
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from dfmath.theorems.registry import Theorem
from dfmath.theorems.run import select  # with it the library's own are registered, whose numbers are taken


def load(path: str | Path) -> list[Theorem]:
    """Run a file that decorates checks with `theorem`, and return the theorems it registers.

    The file is run as a module of its own name: only give files whose code you would run.

    Parameters
    ----------
    path
        The file, which ends in .py.

    Raises
    ------
    ValueError
        If there is no such file, it can't be run, or it registers nothing.

    Examples
    --------
    >>> load("conjecture.py")
    Traceback (most recent call last):
    ValueError: theorems must name a Python file (.py) that exists, got 'conjecture.py'
    """
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"theorems must name a Python file (.py) that exists, got {str(path)!r}")
    name = _module_name(file.resolve())
    _run(file.resolve(), name)
    found = [t for t in select() if t.check.__module__ == name]
    if not found:
        raise ValueError(f"theorems: {file.name} registers none; decorate a check with dfmath.theorems.theorem")
    return found


def _module_name(file: Path) -> str:
    """The file's own name, unless another module has it."""
    known = sys.modules.get(file.stem)
    return file.stem if known is None or getattr(known, "__file__", None) == str(file) else f"{file.stem}_theorems"


def _run(file: Path, name: str) -> None:
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # which is so for every file that ends in .py
    module = sys.modules[name] = module_from_spec(spec)  # where dataclasses and inspect look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"theorems: {file.name}{_line(error, file)}: {type(error).__name__}: {error}") from error


def _line(error: Exception, file: Path) -> str:
    """The last line of the file that was run; a syntax error tells its own."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f", line {lines[-1]}" if lines else ""
