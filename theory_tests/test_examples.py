"""The examples in docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

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
