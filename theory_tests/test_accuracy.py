"""The accuracy standard: 1e-10 in float64 and 1e-5 in float32 against arbitrary precision, on every kind of data.

Errors are relative to the quantity itself; the log density's absolute where it is below one nat, and the score's
relative to its components' scores, because midway between two points it is zero.
"""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch
from arbitrary_precision import DIGITS, point_masses
from dfmath.backends.numba_arithmetic import two_term_squared_distance
from dfmath.backends.precision import two_term_roundings
from helpers import (
    FORMS,
    KINDS,
    NUMBA,
    QUANTITIES,
    SIGMAS,
    SINGULAR_FORMS,
    Problem,
    accuracy_grid,
    accuracy_problem,
    assert_matches,
    computed,
    mixture_problem,
    numbers,
    underflow,
)
from hypothesis import given, settings
from strategies import problems

from dfmath import PointMasses

GRID = accuracy_grid()
CASES = [*GRID, "zero-weights"]


def problem_of(name: str, sigma: float, points=None) -> Problem:
    seed = round(1000 * (3 - math.log10(sigma)))
    if name == "zero-weights":
        logs = np.log(np.array([1.0, 1e-30, 2.0, 0.5, 1.0, 1.0]))
        logs[[1, 4]] = -np.inf
        points = np.random.default_rng(1).standard_normal((6, 3))
        return accuracy_problem(points, sigma, seed, log_weights=logs)
    return accuracy_problem(GRID[name] if points is None else points, sigma, seed)


def promised(kind, dtype):
    """The standard; with float64 sums a float32 result is off by its own rounding alone."""
    if dtype == "float64":
        return 1e-10
    products = kind.backend in ("numba", "device")  # which may be in float32
    return 1e-5 if kind.unit > 1e-10 or products else 2.5e-7


def check(problem, dtype, kinds=KINDS, slack=0.0, scales=None):
    """Compare all quantities of all kinds of arrays with one evaluation of the truth."""
    problem = problem.as_dtype(dtype)
    truth, sizes = problem.truth()
    for kind in kinds:
        if dtype not in kind.dtypes:
            continue
        rtol = promised(kind, dtype) + slack
        vanishing = underflow(problem, kind, dtype) / rtol
        scale = {"log_density": 1.0, "score": sizes["score"]} if scales is None else scales(sizes)
        # What is left out by default is far below rounding beside 1/sigma, where a score may vanish.
        sigma = np.asarray(problem.levels[1])
        scale["score"] = np.maximum(scale.get("score", 0.0), (sigma > 0) * 1e-6 / np.where(sigma > 0, sigma, 1.0))
        for name in ("covariance_product", "covariance_trace"):
            scale[name] = np.maximum(scale.get(name, 0.0), vanishing)
        with kind.context():
            x, v = kind.put(problem.x, dtype), kind.put(problem.v, dtype)
            got = computed(problem.marginal(kind, dtype), x, v)
            for name in QUANTITIES:
                try:
                    assert_matches(got[name], truth[name], rtol, scale.get(name, 0.0), like=x)
                except AssertionError as error:
                    raise AssertionError(f"{name} on {kind.name}: {error}") from None
    return truth


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("name", CASES)
def test_point_masses(name, sigma, dtype):
    problem = problem_of(name, sigma)
    truth = check(problem, dtype)
    # Float32 results are right to 1e-5 by default, but worst-case rounding of their matrix products bounds them less
    # tightly; a tolerance asks for arithmetic that bounds them better.
    check_bounds(problem, truth, dtype, absurd=1e-8 if dtype == "float64" else 1.0)
    check_bounds(problem, truth, dtype, tolerance=1e-12, absurd=1e-8 if dtype == "float64" else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("name", ["digits", "plane", "pixels"])
def test_point_masses_in_full_size(name, sigma, dtype):
    check(problem_of(name, sigma, accuracy_grid(full=True)[name]), dtype)


def rounding_of_eigenvectors(problem):
    """What no method can undo: eigenvectors of C are those of a matrix eps |C| away, and F has 1/sigma^2 beside it."""
    alpha, sigma = problem.levels
    size = np.linalg.norm(problem.dense_covariances, 2, axis=(1, 2)).max()
    least = np.linalg.eigvalsh(problem.dense_covariances).min().clip(0)
    return 8 * np.finfo(float).eps * float(np.max(alpha**2 * size / (alpha**2 * least + sigma**2)))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("form", [*FORMS, *SINGULAR_FORMS])
def test_mixtures(form, sigma, dtype):
    problem = mixture_problem(form, sigma, seed=3)
    kinds = [kind for kind in KINDS if kind.unit < 1e-10]
    slack = rounding_of_eigenvectors(problem) if form.startswith("full") else 0.0
    truth = check(problem, dtype, kinds, slack)
    check_bounds(problem, truth, dtype)


@pytest.mark.parametrize("form", [*FORMS, *SINGULAR_FORMS])
def test_mixtures_far_from_the_origin(form):
    """Components of the size of sigma, which is 1e-8 of their distance to the origin."""
    sigma, problem = 1e-4, mixture_problem(form, 1.0, seed=4)
    c = problem.covariances
    shrunk = (sigma**2 * c[0], sigma * c[1]) if isinstance(c, tuple) else sigma**2 * c
    centres, x = 1e4 + sigma * problem.centres, 0.9 * 1e4 + sigma * problem.x
    problem = Problem(centres, x, problem.v, 0.9, sigma, shrunk, problem.log_weights)
    check_bounds(problem, check(problem, "float64"))


@pytest.mark.parametrize("form", [None, *FORMS, *SINGULAR_FORMS])
def test_one_noise_level_for_each_query(form):
    alpha, sigma = np.array([1.0, 0.5, 0.01]), np.array([0.05, 1.0, 100.0])
    if form is None:
        problem = accuracy_problem(GRID["line"], 1.0, 5)
        problem = Problem(problem.centres, problem.x, problem.v, alpha, sigma)
    else:
        problem = mixture_problem(form, sigma, seed=5, alpha=alpha)
    check(problem, "float64", slack=rounding_of_eigenvectors(problem) if form == "full-singular" else 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_mixtures_without_noise(form):
    """At sigma = 0 all but P is as at any other level; P is 0, and comes out as rounding of (x/alpha)^2 squared."""
    problem = mixture_problem(form, 0.0, seed=6)
    check(
        problem,
        "float64",
        scales=lambda sizes: {"log_density": 1.0, "covariance_product": 1e-20, "covariance_trace": 1e-20},
    )


@pytest.mark.parametrize("sigma", [0.0, 1e-18])
@pytest.mark.parametrize("form", FORMS)
def test_bounds_below_the_rounding_of_the_data(form, sigma):
    """P of 1e-36 is lost among components that agree on x0 to 1e-16, and the bound says so."""
    problem = mixture_problem(form, sigma, seed=6)
    check_bounds(problem, problem.truth()[0])


@settings(max_examples=100)
@given(problems())
def test_nasty_priors(problem):
    """Wherever terms cancel by chance, errors are relative to the terms."""
    slack = rounding_of_eigenvectors(problem) if getattr(problem.covariances, "ndim", 0) == 3 else 0.0
    truth = check(problem, "float64", KINDS[:2], slack, dict)
    check_bounds(problem, truth)


# Certified bounds


def check_bounds(problem, truth, dtype="float64", kinds=KINDS[:2], tolerance=None, absurd=None):
    """No error of F v or P v exceeds the bound times |v|, and the bound is less than `absurd` (|F| + 1/sigma^2)."""
    problem = problem.as_dtype(dtype)
    length = np.linalg.norm(problem.v, axis=1)
    for kind in kinds:
        if dtype not in kind.dtypes:
            continue
        with kind.context():
            x, v = kind.put(problem.x, dtype), kind.put(problem.v, dtype)
            fisher = problem.marginal(kind, dtype, tolerance).fisher(x)
            for operator, name in [(fisher, "fisher"), (fisher.posterior_covariance(), "covariance")]:
                bound = numbers(operator.error_bound())
                error = np.linalg.norm(numbers(operator.matvec(v)) - truth[f"{name}_product"], axis=1) / length
                lost = underflow(problem, kind, dtype) if name == "covariance" else 0.0
                assert (error <= bound + lost).all(), f"{name} on {kind.name}: {error} > {bound}"
                trace_error = np.abs(numbers(operator.trace()) - truth[f"{name}_trace"])
                assert (trace_error <= problem.x.shape[1] * (bound + lost)).all(), f"tr {name} on {kind.name}"
            if absurd is not None:
                size = np.abs(numbers(fisher.eigvalsh())).max(axis=1) + problem.levels[1] ** -2
                assert (numbers(fisher.error_bound()) <= absurd * size).all()


@pytest.mark.parametrize("sigma", [1.0, 0.1, 0.01])
def test_bounds_cover_what_tolerance_leaves_out(sigma):
    """A tenth of the mass may go: errors are then far above rounding, and the bound still holds."""
    points = 3 * sigma * np.random.default_rng(0).standard_normal((3000, 2))
    problem = accuracy_problem(points, sigma, seed=2)
    truth, _ = problem.truth()
    check_bounds(problem, truth, kinds=[NUMBA], tolerance=0.1)
    q = problem.marginal(tolerance=0.1)
    off = np.abs(q.fisher(problem.x).trace() - truth["fisher_trace"]) * sigma**2
    assert (off > 1e-9).any(), "nothing was left out: this test would show nothing"


@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("sigma", [0.1, 1e-3, 1e-5])
@pytest.mark.parametrize("form", ["full-singular", "low-rank-singular", "full"])
def test_bounds_for_stiff_covariances(form, sigma, size):
    """Large |C|/sigma^2 turns the rounding of C's eigenvectors into all there is of F."""
    problem = mixture_problem(form, sigma, seed=7)
    c = problem.covariances
    large = (size * c[0], size**0.5 * c[1]) if isinstance(c, tuple) else size * (c + 1e-3 * np.ones((3, 3)))
    problem = replace(problem, covariances=large)
    check_bounds(problem, problem.truth()[0])


def tied(dim, ratio, log_weights=None):
    """A vector and permutations of it, which are exactly as far from a query of equal entries: ratio sigma away."""
    rng = np.random.default_rng(dim)
    first = rng.standard_normal(dim).astype(np.float32).astype(float)
    centres, x = np.array([first, rng.permutation(first), rng.permutation(first)]), np.full((1, dim), 0.375)
    sigma = 2.0 ** round(math.log2(np.linalg.norm(first - x) / ratio))
    return Problem(centres, x, rng.standard_normal((1, dim)), 1.0, sigma, log_weights=log_weights)


@pytest.mark.parametrize("ratio", [1e6, 1e9, 3e9, 1e10, 1e12, 1e14, 1e15, 1e16, 1e17])
@pytest.mark.parametrize("dim", [8, 24, 64])
def test_bounds_at_exact_ties_far_away(dim, ratio):
    """Beyond 1e10 sigma two terms do not hold a tie any more, and from 1e16 on all weight falls on one component."""
    problem = tied(dim, ratio)
    check_bounds(problem, problem.truth()[0], kinds=KINDS, absurd=1e-8 if ratio <= 1e10 else None)


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("dim", [8, 24, 64])
def test_bounds_at_exact_ties_where_two_terms_are_float32(dim, ratio):
    kinds = [kind for kind in KINDS if kind.unit > 1e-10]
    if not kinds:
        pytest.skip("no array library here that sums in float32")
    problem = tied(dim, ratio)
    check_bounds(problem, problem.truth()[0], "float32", kinds=kinds, absurd=1e-2 if ratio <= 1e4 else None)


def test_ties_keep_their_weights_in_many_dimensions():
    """The constant d log(2 pi S)/2 is tens of thousands here, and is not to round weights that differ."""
    problem = tied(3000, 1e6, log_weights=np.array([0.0, -0.3, -1.1]))
    check_bounds(problem, problem.truth()[0], kinds=KINDS, absurd=1e-10)


@pytest.mark.parametrize("dim", [1, 7, 31, 32, 33, 100, 1000])
def test_two_term_roundings(dim):
    rng, unit = np.random.default_rng(dim), 2.0**-53
    for size in (1.0, 1e6):
        x, y = size + rng.standard_normal(dim), size + rng.standard_normal(dim)
        high, low = two_term_squared_distance(x, 0.7, y)
        with mpmath.workdps(DIGITS):
            gaps = [mpmath.mpf(a) - mpmath.mpf(0.7) * mpmath.mpf(b) for a, b in zip(x, y, strict=True)]
            square = mpmath.fsum(g * g for g in gaps)
            error = abs(mpmath.mpf(high) + mpmath.mpf(low) - square)
            root, length = mpmath.sqrt(square), mpmath.sqrt(mpmath.fsum(mpmath.mpf(a) ** 2 for a in x))
            assert error <= unit**2 * (two_term_roundings(dim) * square + 2 * root * (2 * root + length))


@pytest.mark.parametrize(("alpha", "sigma", "size"), [(1e-100, 1e100, 1.0), (1e10, 1e-60, 1e-60), (1.0, 1e-70, 1e-65)])
@pytest.mark.filterwarnings("error")
def test_far_ends_of_the_allowed_range(alpha, sigma, size):
    """Right, and without a word from NumPy."""
    rng = np.random.default_rng(0)
    centres = size * rng.standard_normal((6, 3))
    x = alpha * centres[:2] + min(sigma, 1.0) * rng.standard_normal((2, 3))
    problem = Problem(centres, x, rng.standard_normal((2, 3)), alpha, sigma)
    check_bounds(problem, problem.truth()[0])
    check(problem, "float64", kinds=KINDS[:2])


def crowds(counts, centres, x, v, sigma, shuffle):
    """Centres that stand so many times among the points, and truth from weights instead."""
    points = np.repeat(centres, counts, axis=0)
    points = np.random.default_rng(0).permutation(points) if shuffle else points
    found = [point_masses(centres, counts, row, 1.0, sigma, along) for row, along in zip(x, v, strict=True)]
    truth = {name: np.array([getattr(t, name) for t in found]) for name in QUANTITIES}
    return Problem(points, x, v, 1.0, sigma), truth


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [40, 1000, 5000])
@pytest.mark.parametrize("seed", range(4))
def test_bounds_for_many_copies_of_a_point(seed, count, shuffle):
    """Sums of thousands of equal terms; F is all but I/sigma^2, to a few roundings."""
    rng = np.random.default_rng(seed)
    centres, counts = np.round(3 * rng.standard_normal((5, 2))), np.array([count, 1, count // 7, 1, 3])
    x, v = centres[:3] + np.array([0.3, 0.1]), rng.standard_normal((3, 2))
    problem, truth = crowds(counts, centres, x, v, 1e-3, shuffle)
    check_bounds(problem, truth, absurd=1e-11)
    got = PointMasses(problem.centres).diffuse(1.0, 1e-3).fisher(x).matvec(v)
    np.testing.assert_allclose(got, truth["fisher_product"], rtol=4 * np.finfo(float).eps)


@pytest.mark.parametrize("sigma", [1e-2, 1e-5])
@pytest.mark.parametrize("count", [100, 1000, 4000])
@pytest.mark.parametrize("seed", range(4))
def test_bounds_where_the_first_of_a_tie_is_alone(seed, count, sigma):
    """Sums are centred at one point, all others are copies of another: their second moment is `count` times Cov."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(-512, 512, (2, 3)) / 512
    problem, truth = crowds(
        np.array([1, count]), centres, centres.mean(axis=0)[None], rng.standard_normal((1, 3)), sigma, False
    )
    check_bounds(problem, truth, absurd=1e-8)


# The truth itself


@pytest.mark.parametrize("form", [None, *FORMS])
def test_truth_is_what_automatic_differentiation_gives(form):
    """Where float64 suffices: derivatives of a dense log density, and Tweedie's formulas for m and P [MATH 1.1-1.2]."""
    problem = mixture_problem(form, 0.7, seed=1) if form else accuracy_problem(GRID["line"], 0.7, 1)
    truth, _ = problem.truth()
    x = torch.tensor(problem.x, requires_grad=True)
    log_density = torch.stack([problem.log_density(b)(row) for b, row in enumerate(x)])
    (score,) = torch.autograd.grad(log_density.sum(), x)
    x, v = problem.x, problem.v[:, :, None]
    expected = {
        "log_density": log_density.detach().numpy(),
        "score": score.numpy(),
        "mean": (x + 0.7**2 * score.numpy()) / 0.9,
        "fisher_product": (problem.hessians() @ v)[:, :, 0],
        "covariance_product": (problem.posterior_covariances() @ v)[:, :, 0],
        "fisher_trace": np.trace(problem.hessians(), axis1=1, axis2=2),
        "covariance_trace": np.trace(problem.posterior_covariances(), axis1=1, axis2=2),
    }
    for name in QUANTITIES:
        np.testing.assert_allclose(truth[name], expected[name], rtol=1e-11, err_msg=name)


@pytest.mark.parametrize("sigma", [1e-6, 1e-5, 1e-2])
def test_a_narrow_component_inside_a_wide_one(sigma):
    """Vectors of components of very different widths are differenced without their common part."""
    centres, variances = np.array([[0.1], [100.1], [0.3]]), np.array([0.0, 1e4, 1e-4])
    x = np.array([[0.1 + 0.7 * sigma], [0.2], [50.0]])
    logs = np.log(np.array([sigma / 100, 1.0, 0.1]))
    for covariances in (variances, variances[:, None]):
        problem = Problem(centres, x, np.ones((3, 1)), 1.0, sigma, covariances, logs)
        check_bounds(problem, check(problem, "float64"))


@pytest.mark.parametrize("sigma", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("d", [1, 2])
def test_factors_that_span_all_dimensions(d, sigma):
    """Nothing is outside the range of d or more independent factors, and rounding must not say that something is."""
    rng = np.random.default_rng(d)
    factors, diagonal = rng.standard_normal((2, d, d + 1)), np.zeros((2, d))
    x = rng.standard_normal((3, d))
    problem = Problem(rng.standard_normal((2, d)), x, np.ones((3, d)), 1.0, sigma, (diagonal, factors))
    check_bounds(problem, check(problem, "float64"))
