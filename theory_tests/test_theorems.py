"""The registry and `verify`: complete, honest about what does not apply, and able to fail."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfmath import GaussianMixture, LowRank, PointMasses, theorems
from dfmath.datasets import digits
from dfmath.theorems import Outcome, registered, theorem
from dfmath.theorems.case import Case
from dfmath.theorems.own import load
from dfmath.theorems.run import Level, model, noise_levels, select, verify
from dfmath.theorems.subject import subject_of

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
    assert _failures(verify(subject, LEVELS, only=["1", "4.1", "4.10"])) == []


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
    with pytest.raises(ValueError, match=r"theorem must be a number such as 1.2.* did you mean '1\.\d'"):
        select(["1.12"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0])
def test_one_bad_level_fails_and_is_shown(registry: None, bad: float) -> None:
    """Wherever it is among the levels; what is not a number never passes, and is the worst there is."""

    @theorem("9.1", "One bad level", "a = b", "a conjecture")
    def check(case: Case) -> Outcome:
        return Outcome(bad if case.rho == LEVELS[2] else 0.5, 1.0, "one")

    (result,) = verify(_data("line"), LEVELS, only=["9.1"])
    assert result.verdict == "fail" and result.worst is not None
    assert result.worst.rho == LEVELS[2]
    assert [level.rho for level in result.levels] == list(LEVELS)


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda case: None, "TypeError: a check must return an Outcome, got NoneType"),
        (lambda case: {}["x"], "KeyError: 'x'"),
        (lambda case: Outcome("much", 1.0, ""), "discrepancy must be a real number"),
        (lambda case: Outcome(0.0, -1.0, ""), "threshold must not be negative, got -1"),
    ],
)
def test_a_check_that_is_wrong_in_itself_fails_and_says_so(registry: None, check: Any, said: str) -> None:
    theorem("9.1", "Wrong", "a = b", "a conjecture")(check)
    found = verify(_data("line"), LEVELS, only=["9.1", "1.2"])
    assert [result.verdict for result in found] == ["pass", "fail"]
    assert said in found[1].reason


def test_outcomes_of_numpy_numbers_can_be_written(registry: None) -> None:
    @theorem("9.1", "In single precision", "a = b", "a conjecture")
    def check(case: Case) -> Outcome:
        return Outcome(np.float32(0.5), np.ones(()), "one")  # type: ignore[arg-type]

    (result,) = verify(_data("line"), LEVELS, only=["9.1"])
    assert json.loads(json.dumps(result.as_dict()))["discrepancy"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((3,), TypeError, "points must be"),
        ((np.zeros((3, 2)), []), ValueError, "rhos must be positive, finite and from high to low"),
        ((np.zeros((3, 2)), [0.1, 1.0]), ValueError, "rhos must be positive, finite and from high to low"),
        ((np.zeros((3, 2)), 5.0), TypeError, "rhos must be a sequence"),
    ],
)
def test_what_can_not_be_verified_is_refused(arguments: tuple, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        verify(*arguments)


def test_priors_themselves_can_be_verified() -> None:
    """Of every form of covariance, with weights, on torch: the truth is made of what the prior was made of."""
    rng = np.random.default_rng(0)
    means, root = rng.standard_normal((3, 2)), rng.standard_normal((3, 2, 2))
    forms = [0.3, np.array([0.1, 0.2, 0.3]), rng.random((3, 2)), root @ root.swapaxes(1, 2)]
    forms.append(LowRank(rng.random((3, 2)), rng.standard_normal((3, 2, 1))))
    weights = np.array([0.2, 0.7, 0.1])
    priors = [GaussianMixture(means, form, weights=weights) for form in forms]
    priors += [PointMasses(means, weights=weights), PointMasses(torch.from_numpy(means.astype(np.float32)))]
    for prior in priors:
        found = verify(prior, [3.0, 0.3], only=["1.1", "1.2", "1.4", "4.1"])  # on the kind of arrays that it has
        assert _failures(found) == [] and sum(r.verdict == "pass" for r in found) >= 4


def test_the_truth_has_the_priors_parameters() -> None:
    rng = np.random.default_rng(1)
    means, values, vectors = rng.standard_normal((2, 3)), rng.random((2, 3)), rng.standard_normal((2, 3, 2))
    full = np.stack([np.diag(row) + v @ v.T for row, v in zip(values, vectors, strict=True)])
    cases = {
        "number": (0.3, np.stack([0.3 * np.eye(3)] * 2)),
        "(K,)": (np.array([0.1, 0.2]), np.stack([0.1 * np.eye(3), 0.2 * np.eye(3)])),
        "(K, d)": (values, np.stack([np.diag(row) for row in values])),
        "(K, d, d)": (full, full),
        "low rank": (LowRank(values, vectors), full),
    }
    for name, (given, wanted) in cases.items():
        subject = subject_of(GaussianMixture(means, given, weights=np.array([1.0, 3.0])))
        np.testing.assert_allclose(subject.covariances, wanted, rtol=1e-14, atol=1e-16, err_msg=name)
        np.testing.assert_array_equal(subject.means, means)
        np.testing.assert_allclose(subject.weights, [0.25, 0.75], rtol=1e-15)


def test_a_truth_of_other_weights_is_noticed() -> None:
    subject = subject_of(PointMasses(_data("offset"), weights=np.linspace(0.1, 1.0, 800)))
    wrong = replace(subject, weights=np.ones(800))
    assert "fail" in {result.verdict for result in verify(wrong, [0.5], only=["1"])}


def test_a_check_that_raises_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from dfmath.marginal import Marginal

    def broken(self: Marginal, x: object) -> object:
        raise ValueError("broken on purpose")

    monkeypatch.setattr(Marginal, "score", broken)
    (result,) = verify(model(_data("line")), LEVELS, only=["1.1"])
    assert result.verdict == "fail"
    assert "broken on purpose" in result.reason
    assert isinstance(result.worst, Level)


# Theorems of one's own.

OWN = """
from dfmath.theorems import Outcome, theorem

@theorem("{number}", "{title}", "d = {dim}", "a conjecture")
def dimension(case):
    return Outcome(abs(case.dim - {dim}), 0.0, "whole numbers")
"""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The registry, which forgets afterwards what a test puts in; so are the modules that were run for it."""
    monkeypatch.setattr(theorems.registry, "_REGISTRY", dict(theorems.registry._REGISTRY))
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def own(tmp_path: Path, registry: None) -> Callable[..., Path]:
    def write(name: str = "own_one.py", number: str = "9.1", title: str = "Dimension", dim: int = 2) -> Path:
        (tmp_path / name).write_text(OWN.format(number=number, title=title, dim=dim))
        return tmp_path / name

    return write


def test_a_file_of_ones_own_is_checked_with_the_others(own: Callable[..., Path]) -> None:
    (found,) = load(own())
    assert (found.number, found.title) == ("9.1", "Dimension")
    plane, line = model(_data("offset")), model(_data("line"))
    verdicts = [verify(subject, LEVELS, only=["9"])[0].verdict for subject in (plane, line)]
    assert verdicts == ["pass", "fail"]


def test_a_theorem_can_be_written_anew(own: Callable[..., Path]) -> None:
    """As a notebook's cell that runs twice: the last one counts."""
    load(own())
    (found,) = load(own(title="Another dimension", dim=3))
    assert [t.title for t in select(["9"])] == ["Another dimension"] == [found.title]
    assert verify(model(_data("offset")), LEVELS, only=["9.1"])[0].verdict == "fail"


@pytest.mark.parametrize("number", ["1.2", "9.1"])
def test_a_number_that_another_check_has_is_refused(own: Callable[..., Path], number: str) -> None:
    """The library's, or that of another file; what was registered stays."""
    load(own())
    before = {t.number: t for t in select()}
    with pytest.raises(ValueError, match=f"number '{number}' is taken by {re.escape(repr(before[number].title))}"):
        load(own("own_two.py", number))
    assert {t.number: t for t in select()} == before


@pytest.mark.parametrize("number", ["9", "9.", "nine.1", "9.1bc", "0.1", "9.1 "])
def test_numbers_have_a_form(own: Callable[..., Path], number: str) -> None:
    with pytest.raises(ValueError, match=f"number must be such as '9.1' or '9.1b', got '{number}'"):
        load(own(number=number))


def test_a_check_is_a_function(registry: None) -> None:
    with pytest.raises(TypeError, match="check must be a function of a Case, got int"):
        theorem("9.1", "None", "a = b", "a conjecture")(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "theorems: bad.py registers none"),
        ("\nx = y", "theorems: bad.py, line 2: NameError: name 'y' is not defined"),
        ("x = ", r"theorems: bad.py: SyntaxError: invalid syntax \(bad.py, line 1\)"),
        (None, "theorems must name a Python file"),
    ],
)
def test_files_that_are_none(tmp_path: Path, registry: None, text: str | None, message: str) -> None:
    file = tmp_path / "bad.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(file)
    assert "bad" not in sys.modules or text == "x = 1"


def test_a_file_named_as_a_module_leaves_the_module_alone(own: Callable[..., Path]) -> None:
    (found,) = load(own("json.py"))
    assert found.check.__module__ == "json_theorems" and hasattr(sys.modules["json"], "dumps")


def test_the_command_checks_a_file(own: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "dfmath", "verify", "--theorems", str(own()), "--only", "9.1,1.1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # the digits have d = 64
    found = json.loads(done.stdout)["theorems"]
    assert [(t["number"], t["verdict"]) for t in found] == [("1.1", "pass"), ("9.1", "fail")]
