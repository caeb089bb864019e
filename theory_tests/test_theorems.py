"""The registry and `verify`: complete, honest about what does not apply, and able to fail."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from dfmath.datasets import digits
from dfmath.theorems import Outcome, registered
from dfmath.theorems.run import Level, model, noise_levels, select, verify

QUICK = ["1", "4.1", "4.2", "4.3", "4.3b", "4.5", "4.9", "4.10"]
LEVELS = noise_levels(80.0, 0.02, 4)


def _data(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    match kind:
        case "digits":
            return digits()[::6]
        case "offset":
            return rng.standard_normal((800, 2)) + np.array([3.0, -2.0])
        case "pixels":
            return rng.integers(0, 256, (150, 20)).astype(np.float64)
        case "one point":
            return np.array([[1.0, -2.0, 3.0]])
        case "duplicates":
            return np.array([[1.0, 2.0]] * 5 + [[3.0, 4.0]])
        case _:
            return rng.standard_normal((60, 1))


def _failures(results: list) -> list[str]:
    return [f"{r.theorem.number}: {r.worst}" for r in results if r.verdict == "fail"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["digits", "offset", "pixels", "one point", "duplicates", "line"])
def test_theorems_hold_on_points(kind: str, dtype: str) -> None:
    results = verify(model(_data(kind), dtype=dtype), LEVELS, only=QUICK)
    assert _failures(results) == []
    assert sum(r.verdict == "pass" for r in results) >= 20


@pytest.mark.parametrize("backend", ["array-api", "array-api-strict", "torch"])
def test_theorems_hold_on_other_libraries(backend: str) -> None:
    subject = model(_data("offset")[:200], backend=backend)
    assert _failures(verify(subject, LEVELS, backend=backend, only=["1", "4.1", "4.10"])) == []


def test_theorems_hold_on_a_fitted_mixture() -> None:
    results = verify(model(_data("digits"), mixture=3), LEVELS, only=QUICK)
    assert _failures(results) == []
    assert {r.theorem.number: r.verdict for r in results}["1.3"] == "not applicable"


def test_a_single_gaussian_is_log_concave() -> None:
    (result,) = verify(model(_data("offset"), mixture=1), LEVELS, only=["1.7c"])
    assert result.verdict == "pass"


@pytest.mark.parametrize("scope", ["2", "3"])
def test_trajectories(scope: str) -> None:
    assert _failures(verify(model(_data("offset")[:40]), LEVELS, only=[scope])) == []


def test_every_theorem_is_stated() -> None:
    theorems = registered()
    assert len(theorems) >= 45
    for t in theorems:
        assert re.fullmatch(r"[1-4]\.\d+[a-z]?", t.number)
        assert t.title and t.statement and t.source and t.hypotheses and t.check.__doc__
        assert t.statement.count("{") == t.statement.count("}"), t.number


def test_every_number_of_the_mathematics_has_a_check() -> None:
    stems = {t.number.rstrip("abcdef") for t in registered()}
    wanted = {f"1.{i}" for i in range(1, 10)} | {f"2.{i}" for i in range(1, 6)} | {f"3.{i}" for i in range(1, 6)}
    assert stems == wanted | {f"4.{i}" for i in range(1, 11)}


def test_only_selects_by_prefix() -> None:
    assert {t.number for t in select(["1.2"])} == {"1.2"}
    assert {t.number.split(".")[0] for t in select(["3"])} == {"3"}
    with pytest.raises(ValueError, match=r"theorem must be one of .* did you mean '1\.\d'"):
        select(["1.12"])


def test_not_a_number_never_passes() -> None:
    assert not Outcome(math.nan, 1.0, "").passed
    assert not Outcome(math.inf, 1.0, "").passed


def test_a_check_that_raises_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from dfmath.marginal import Marginal

    def broken(self: Marginal, x: object) -> object:
        raise ValueError("broken on purpose")

    monkeypatch.setattr(Marginal, "score", broken)
    (result,) = verify(model(_data("line")), LEVELS, only=["1.1"])
    assert result.verdict == "fail"
    assert "broken on purpose" in result.reason
    assert isinstance(result.worst, Level)
