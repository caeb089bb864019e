"""The examples in docstrings, in the README and in docs print what they say."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import pytest

import dfmath

MODULES = [m.name for m in pkgutil.walk_packages(dfmath.__path__, "dfmath.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ImportError as missing:
        pytest.skip(f"{missing.name} is not installed")
    assert doctest.testmod(module).failed == 0


def test_there_are_examples():
    found = sum(len(test.examples) for name in MODULES for test in doctest.DocTestFinder().find(_module(name)))
    assert found >= 30


def _module(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return dfmath


def _number(word):
    try:
        return float(word.strip("[](),"))
    except ValueError:
        return None


def _same(printed, said):
    """Word by word; numbers to six digits."""
    pairs = list(zip(printed.split(), said.split(), strict=True))
    return all(a == b if _number(a) is None else _number(a) == pytest.approx(_number(b), rel=1e-6) for a, b in pairs)


ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```(?:\s*```\n(.*?)```)?", re.DOTALL)
PAGES = {path.stem: path for path in [ROOT / "README.md", *ROOT.glob("docs/*/*.md")] if BLOCK.search(path.read_text())}


def test_pages_have_examples():
    assert len(BLOCK.findall(PAGES["README"].read_text())) >= 3
    assert {"exact", "flows", "sampling", "approximations", "accuracy", "networks", "arrays", "notation"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_pages_print_what_they_say(page):
    """One after the other in one interpreter, as a reader would type them."""
    blocks, names = BLOCK.findall(PAGES[page].read_text()), {}
    for code, said in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert _same(printed.getvalue(), said), (printed.getvalue(), said)
