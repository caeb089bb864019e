"""The --slow option, the Hypothesis profile, and fixtures for every kind of array."""

from __future__ import annotations

import os
from importlib.util import find_spec

import numba
import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("helpers")

from helpers import CUPY, KINDS, lack_of_cupy  # noqa: E402

settings.register_profile(
    "dfmath",
    deadline=None,
    max_examples=25,
    derandomize=os.environ.get("CI") == "true",
    # Our fixtures hold no state that one example could leave to the next.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("dfmath")


# Small problems gain nothing from threads, and on a busy machine wait for them a hundred times as long as they compute.
# That results do not depend on the number is tested in test_backends.
numba.set_num_threads(1)
if find_spec("torch") is not None:
    import torch

    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


_LACK = lack_of_cupy()
_EVERY = [*KINDS, pytest.param(CUPY, marks=pytest.mark.skip(reason=_LACK))] if _LACK else KINDS


@pytest.fixture(params=_EVERY, ids=lambda kind: kind.name)
def xp_kind(request):
    """One way to hold arrays and the backend that serves them, in force during the test."""
    with request.param.context():
        yield request.param


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    """Both dtypes, where the test's kind of array has them."""
    if "xp_kind" in request.fixturenames and request.param not in request.getfixturevalue("xp_kind").dtypes:
        pytest.skip("JAX has float64 in its 64-bit mode alone")
    return request.param
