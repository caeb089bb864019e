"""The tests' own tools reject planted errors: what cannot fail shows nothing."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
import torch
from helpers import (
    FORMS,
    KINDS,
    NUMBA,
    QUANTITIES,
    SINGULAR_FORMS,
    STRICT,
    TORCH,
    Problem,
    accuracy_problem,
    assert_matches,
    covariances_of,
    mixture_problem,
    numbers,
    relative_error,
)
from hypothesis import find, settings
from strategies import problems

EXPECTED = np.array([[1.0, -2.0], [3.0, 4.0], [0.0, 1e-3]])
RTOL = 1e-6


def rejected(actual, expected=EXPECTED, rtol=RTOL, scale=0.0, like=None):
    try:
        assert_matches(actual, expected, rtol, scale, like=actual if like is None else like)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_right_is_accepted(kind):
    with kind.context():
        for dtype in kind.dtypes:
            assert not rejected(kind.put(EXPECTED, dtype), EXPECTED.astype(dtype))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_wrong_sign_is_rejected(kind):
    with kind.context():
        wrong = EXPECTED.copy()
        wrong[1, 1] *= -1
        assert rejected(kind.put(wrong, kind.dtypes[-1]))


@pytest.mark.parametrize("factor", [0.9, 2.0])
def test_an_error_of_twice_the_tolerance_is_rejected_in_any_row(factor):
    for row, size in enumerate([2.0, 4.0, 1e-3]):
        wrong = EXPECTED.copy()
        wrong[row, 0] += factor * RTOL * size
        assert rejected(wrong) == (factor > 1)


def test_errors_of_opposite_sign_do_not_cancel():
    assert rejected(EXPECTED + RTOL * np.array([[3.0, -3.0], [6.0, -6.0], [0.0, 0.0]]))


def test_scale_is_a_floor_for_each_row():
    wrong = EXPECTED + np.array([[0.0], [0.0], [1e-6]])
    assert rejected(wrong)
    assert not rejected(wrong, scale=np.array([0.0, 0.0, 1.1]))
    assert rejected(wrong, scale=np.array([1.1, 1.1, 0.0]))


def test_nothing_but_zero_matches_zero():
    assert rejected(np.array([1e-300]), np.array([0.0]))
    assert not rejected(np.array([0.0]), np.array([0.0]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_rejected_where_not_expected(bad):
    wrong = EXPECTED.copy()
    wrong[0, 1] = bad
    assert rejected(wrong) and rejected(EXPECTED, wrong)
    assert not rejected(wrong, wrong)
    assert rejected(np.array([np.nan, -np.inf]), np.array([-np.inf, -np.inf]))


def test_wrong_dtype_is_rejected():
    assert rejected(EXPECTED.astype(np.float32), like=EXPECTED)
    assert rejected(torch.tensor(EXPECTED), like=torch.tensor(EXPECTED, dtype=torch.float32))


def test_wrong_namespace_is_rejected():
    assert rejected(torch.tensor(EXPECTED), like=EXPECTED)
    assert rejected(EXPECTED, like=array_api_strict.asarray(EXPECTED))


def test_wrong_device_is_rejected():
    elsewhere = array_api_strict.asarray(EXPECTED, device=array_api_strict.Device("device1"))
    assert rejected(elsewhere, like=array_api_strict.asarray(EXPECTED))


@pytest.mark.parametrize("change", [np.transpose, np.ravel, lambda a: a[:, :1], lambda a: a[None]])
def test_wrong_shape_is_rejected(change):
    assert rejected(change(EXPECTED), like=EXPECTED)


def test_relative_error_is_measured_row_by_row():
    error = relative_error(EXPECTED + 0.5, EXPECTED, scale=[0.0, 0.0, 1.0])
    np.testing.assert_allclose(error, [0.25, 0.125, 0.5])


def test_nothing_matches_nothing_of_the_same_shape_alone():
    assert not rejected(np.zeros((0, 2)), np.zeros((0, 2)))
    assert rejected(np.zeros((0, 2)), np.zeros((0, 3)))


def test_conversion_keeps_values_and_dtype():
    for kind in (NUMBA, STRICT, TORCH):
        for dtype in kind.dtypes:
            array = kind.put(EXPECTED, dtype)
            assert str(array.dtype).endswith(dtype)
            np.testing.assert_array_equal(numbers(array), EXPECTED.astype(dtype))


def test_kinds_put_copies():
    values = EXPECTED.copy()
    for kind in KINDS[:4]:
        array = kind.put(values)
        values[0, 0] = 7.0
        assert numbers(array)[0, 0] == 1.0
        values[0, 0] = 1.0


def test_rounding_a_problem_rounds_every_part_of_it():
    third = 1 / 3
    parts = (np.full((1, 2), third), np.full((1, 2, 1), third))
    x = np.full((1, 2), third)
    problem = Problem(x, x, x, third, np.array([third]), parts, np.array([-third])).as_dtype("float32")
    values = [problem.centres, problem.x, problem.v, problem.alpha, problem.sigma, *problem.covariances]
    assert all(np.all(np.float64(np.float32(third)) == value) for value in values)
    assert problem.log_weights[0] == -np.float64(np.float32(third)) and type(problem.alpha) is float


@pytest.mark.parametrize("form", [*FORMS, *SINGULAR_FORMS])
def test_dense_covariances_are_what_each_form_means(form):
    c = covariances_of(form, 3, 2, np.random.default_rng(0))
    problem = Problem(np.zeros((3, 2)), np.zeros((1, 2)), np.zeros((1, 2)), covariances=c)
    expected = {
        "low-rank": lambda: np.stack([np.diag(d) + f @ f.T for d, f in zip(*c, strict=True)]),
        "low-rank-singular": lambda: np.stack([f @ f.T for f in c[1]]),
        "per-component": lambda: c[:, None, None] * np.eye(2),
        "some-zero": lambda: c[:, None, None] * np.eye(2),
        "diagonal": lambda: np.stack([np.diag(d) for d in c]),
        "diagonal-singular": lambda: np.stack([np.diag(d) for d in c]),
    }.get(form, lambda: c if np.ndim(c) == 3 else np.stack([c * np.eye(2)] * 3))()
    np.testing.assert_allclose(problem.dense_covariances, expected, rtol=1e-15)
    assert ("singular" in form or "zero" in form) == (np.linalg.eigvalsh(expected).min() < 1e-12)


@pytest.mark.parametrize("part", ["centres", "x", "alpha", "sigma", "covariances", "log_weights"])
def test_truth_depends_on_every_part_of_a_problem(part):
    problem = mixture_problem("diagonal", 0.7, seed=0)
    before, _ = problem.truth()
    after, _ = Problem(**(vars(problem) | {part: 1.1 * getattr(problem, part)})).truth()
    assert all(np.all(relative_error(after[name], before[name]) > 1e-6) for name in QUANTITIES)


def test_sizes_are_at_least_the_quantities():
    for problem in (mixture_problem("full", 0.1, seed=0), accuracy_problem(np.eye(3), 0.3, 0)):
        values, sizes = problem.truth()
        for name in QUANTITIES:
            if name != "log_density":
                lengths = np.linalg.norm(np.atleast_2d(values[name].T).T, axis=1)
                assert (sizes[name] >= lengths * (1 - 1e-12)).all(), name


NASTY = {
    "one point": lambda p: len(p.centres) == 1,
    "duplicates": lambda p: len(np.unique(p.centres, axis=0)) < len(p.centres),
    "near-equal points": lambda p: 0 < np.ptp(p.centres, axis=0).max() < 1e-7,
    "one dimension": lambda p: p.centres.shape[1] == 1,
    "zero weights": lambda p: np.isneginf(p.logs).any(),
    "weights over 200 decades": lambda p: np.isfinite(p.logs).all() and np.ptp(p.logs) > 460,
    "far from the origin": lambda p: np.abs(p.centres).max() > 900,
    "small sigma": lambda p: np.max(p.sigma) < 1e-2,
    "large sigma": lambda p: np.min(p.sigma) > 1e2,
    "small alpha": lambda p: np.max(p.alpha) < 1e-2,
    "a noise level for each query": lambda p: np.ndim(p.sigma) == 1,
    "point masses": lambda p: p.covariances is None,
    "low rank": lambda p: isinstance(p.covariances, tuple),
    "singular and full": lambda p: (
        getattr(p.covariances, "ndim", 0) == 3
        and p.centres.shape[1] > 1
        and np.linalg.matrix_rank(p.covariances[0]) == 1
    ),
}


@pytest.mark.parametrize("what", NASTY)
def test_strategies_reach_what_is_nasty(what):
    find(problems(), NASTY[what], settings=settings(max_examples=2000, deadline=None, database=None))
