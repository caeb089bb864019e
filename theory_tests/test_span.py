"""The Fisher as a multiple of the identity and outer products, against automatic differentiation [MATH 1.6, 1.7d]."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import FORMS, NUMBA, SINGULAR_FORMS, Problem, assert_matches, mixture_problem, numbers
from hypothesis import given
from scipy.special import softmax
from strategies import problems

from dfmath import GaussianMixture, PointMasses

ALPHA, SIGMA = np.array([1.0, 0.75, 0.5]), np.array([0.5, 1.0, 2.0])


def points_problem(count=6, dim=4, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    points, x = offset + rng.standard_normal((count, dim)), rng.standard_normal((3, dim))
    return Problem(points, ALPHA[:, None] * offset + x, rng.standard_normal((3, dim)), ALPHA, SIGMA)


def precision(kind, dtype):
    return 1e-4 if kind.unit > 1e-10 else {"float64": 1e-12, "float32": 1e-6}[dtype]


def check_parts(span, problem, rtol, kind, dtype):
    """Shift, coefficients and vectors make up the Hessian, by hand and by the span's own methods."""
    dense, like = problem.hessians(), kind.put(problem.x, dtype)
    size = np.abs(dense).max(axis=(1, 2)) + problem.levels[1] ** -2
    shift, coefficients, vectors = (numbers(part) for part in (span.shift, span.coefficients, span.vectors))
    b, d, _ = dense.shape
    rebuilt = shift[:, None, None] * np.eye(d) + np.einsum("br,bri,brj->bij", coefficients, vectors, vectors)
    assert_matches(rebuilt, dense, rtol, size, like=rebuilt)
    assert_matches(span.to_dense(), dense, rtol, size, like=like)
    assert_matches(span.trace(), np.trace(dense, axis1=1, axis2=2), rtol, d * size, like=like)
    v = np.random.default_rng(1).integers(-4, 5, (b, d)).astype(float)
    assert_matches(span.matvec(kind.put(v, dtype)), (dense @ v[:, :, None])[:, :, 0], rtol, 16 * size, like=like)
    for part in (span.shift, span.coefficients, span.vectors, span.truncation_error):
        assert_matches(part, numbers(part), 0.0, like=like)


def span_of(problem, form, kind, dtype="float64", tolerance=0.0):
    problem = problem.as_dtype(dtype)
    return problem.marginal(kind, dtype).fisher(kind.put(problem.x, dtype)).span(form, tolerance)


@pytest.mark.parametrize("form", ["data", "centred", "orthonormal"])
def test_every_form_is_the_fisher_of_point_masses(form, xp_kind, dtype):
    problem = points_problem().as_dtype(dtype)
    span = span_of(problem, form, xp_kind, dtype)
    check_parts(span, problem, precision(xp_kind, dtype), xp_kind, dtype)
    np.testing.assert_allclose(numbers(span.shift), 1 / SIGMA**2, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_few_points_in_many_dimensions(dtype):
    """Two points in 200,000 dimensions: F = I/sigma^2 - (alpha^2/sigma^4) w (1 - w) (y1 - y2)(y1 - y2)^T, by hand."""
    dim, alpha, sigma = 200_000, 0.8, 0.7
    rng = np.random.default_rng(0)
    apart = rng.standard_normal(dim) / np.sqrt(dim)
    points = np.stack([np.zeros(dim), apart]).astype(dtype)
    x, v = (0.3 * alpha * points[1:]).astype(dtype), rng.standard_normal((1, dim)).astype(dtype)
    span = PointMasses(points).diffuse(alpha, sigma).fisher(x).span()
    y, x, v = (array.astype(np.float64) for array in (points, x[0], v[0]))
    w = softmax(-((x - alpha * y) ** 2).sum(axis=1) / (2 * sigma**2))
    u = y[1] - y[0]
    wanted = v / sigma**2 - alpha**2 / sigma**4 * w[0] * w[1] * (u @ v) * u
    tolerance = {"float64": 1e-12, "float32": 1e-5}[dtype]
    assert span.vectors.shape == (1, 1, dim)
    np.testing.assert_allclose(span.matvec(v[None].astype(dtype))[0], wanted, atol=tolerance * np.abs(wanted).max())
    assert abs(float(span.coefficients[0, 0]) + alpha**2 / sigma**4 * w[0] * w[1] * (u @ u)) < tolerance
    assert 0.0 <= float(span.truncation_error[0]) <= 33 * np.finfo(dtype).eps / sigma**2


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_low_rank_and_dense_spans_agree(tolerance, monkeypatch):
    """Of the same F in 150 dimensions, found from products and from the matrix; with as many vectors left out."""
    rng = np.random.default_rng(1)
    points = rng.standard_normal((6, 150)) * np.geomspace(1.0, 1e-2, 6)[:, None]
    fisher = PointMasses(points).diffuse(1.0, 1.5).fisher(rng.standard_normal((2, 150)))
    quick = fisher.span(tolerance=tolerance)
    monkeypatch.setattr(type(fisher), "low_rank", lambda self: None)
    dense = fisher.span(tolerance=tolerance)
    assert quick.vectors.shape == dense.vectors.shape
    np.testing.assert_allclose(quick.to_dense(), dense.to_dense(), atol=1e-14)
    np.testing.assert_allclose(quick.truncation_error, dense.truncation_error, atol=1e-14)


@pytest.mark.parametrize("form", ["centred", "orthonormal"])
def test_mixtures_with_one_scalar_covariance(form, xp_kind, dtype):
    """The shift is 1/(alpha^2 c + sigma^2)."""
    problem = mixture_problem("scalar", SIGMA, seed=0, alpha=ALPHA).as_dtype(dtype)
    span = span_of(problem, form, xp_kind, dtype)
    check_parts(span, problem, precision(xp_kind, dtype), xp_kind, dtype)
    np.testing.assert_allclose(numbers(span.shift), 1 / (0.3 * ALPHA**2 + SIGMA**2), rtol=1e-6)


@pytest.mark.parametrize("covariances", [*FORMS, *SINGULAR_FORMS])
def test_orthonormal_span_of_any_mixture(covariances, xp_kind):
    dtype = xp_kind.dtypes[0]
    problem = mixture_problem(covariances, SIGMA, seed=0, alpha=ALPHA).as_dtype(dtype)
    check_parts(span_of(problem, "orthonormal", xp_kind, dtype), problem, precision(xp_kind, dtype), xp_kind, dtype)


# What each form is made of


def test_data_form_is_the_data_and_the_mean():
    """The paper's: weights -(alpha^2/sigma^4) w_i on y_i, and +(alpha^2/sigma^4) on m = (x + sigma^2 s)/alpha."""
    problem = points_problem()
    span = span_of(problem, "data", NUMBA)
    alpha, sigma = (level[:, None] for level in problem.levels)
    logits = -0.5 * np.sum((problem.x[:, None] - alpha[:, None] * problem.centres) ** 2, axis=2) / sigma**2
    w = softmax(logits, axis=1)
    scale = alpha**2 / sigma**4
    np.testing.assert_allclose(span.coefficients, scale * np.concatenate([-w, np.ones((3, 1))], axis=1), rtol=1e-12)
    np.testing.assert_array_equal(span.vectors[:, :-1], np.stack([problem.centres] * 3))
    score = problem.marginal().score(problem.x)
    np.testing.assert_allclose(span.vectors[:, -1], (problem.x + sigma**2 * score) / alpha, rtol=1e-12)


def test_centred_form_is_the_data_less_the_mean():
    problem = points_problem()
    span = span_of(problem, "centred", NUMBA)
    mean = problem.marginal().posterior_mean(problem.x)
    np.testing.assert_allclose(span.vectors, problem.centres - mean[:, None], rtol=1e-12, atol=1e-14)
    assert (span.coefficients <= 0).all()
    np.testing.assert_allclose(-span.coefficients.sum(axis=1), ALPHA**2 / SIGMA**4, rtol=1e-13)


def test_centred_form_keeps_its_digits_far_from_the_origin():
    """The printed form loses eps |y|^2 there; in this one nothing is larger than the data's spread."""
    near, far = points_problem(), points_problem(offset=1024.0)
    problem = replace(far, centres=1024.0 + np.round(near.centres * 2**20) / 2**20)
    x = ALPHA[:, None] * 1024.0 + np.round(near.x * 2**20) / 2**20
    problem, shifted = (
        replace(problem, x=x),
        replace(near, centres=problem.centres - 1024.0, x=x - ALPHA[:, None] * 1024.0),
    )
    dense = span_of(problem, "centred", NUMBA).to_dense()
    np.testing.assert_allclose(dense, shifted.hessians(), rtol=1e-11, atol=1e-12)


def test_orthonormal_vectors_are_orthonormal(xp_kind, dtype):
    vectors = numbers(span_of(points_problem(), "orthonormal", xp_kind, dtype).vectors)
    gram = vectors @ vectors.transpose(0, 2, 1)
    np.testing.assert_allclose(
        gram, np.broadcast_to(np.eye(gram.shape[1]), gram.shape), atol=1e-5 if dtype == "float32" else 1e-13
    )


# Rank


@pytest.mark.parametrize(("count", "rank"), [(1, 0), (2, 1), (4, 3), (5, 4), (6, 5), (12, 5)])
def test_rank_is_that_of_the_affine_hull(count, rank, xp_kind):
    """At most min(d, N - 1), and attained by points in general position, wherever the origin is."""
    span = span_of(points_problem(count, 5, offset=3.0), "orthonormal", xp_kind, xp_kind.dtypes[0])
    assert span.vectors.shape == (3, rank, 5) and span.coefficients.shape == (3, rank)


def test_rank_counts_components_that_carry_weight_alone(xp_kind):
    dtype = xp_kind.dtypes[0]
    problem = replace(points_problem(6, 5), log_weights=np.array([0.0, -np.inf, 0.0, -np.inf, -np.inf, 0.0]))
    assert span_of(problem, "orthonormal", xp_kind, dtype).vectors.shape == (3, 2, 5)


def test_points_on_a_line_have_rank_one():
    direction = np.array([[1.0, 2.0, -2.0]]) / 3.0
    points = 5.0 + np.linspace(-1, 1, 7)[:, None] * direction
    span = PointMasses(points).diffuse(0.9, 0.7).fisher(4.5 + np.zeros((2, 3))).span("orthonormal", tolerance=1e-12)
    assert span.vectors.shape == (2, 1, 3)
    np.testing.assert_allclose(np.abs(span.vectors[:, 0] @ direction[0]), 1.0, rtol=1e-12)


# Truncation


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01, 1e-4])
@pytest.mark.parametrize("covariances", [None, "diagonal", "full"])
def test_truncation_error_is_what_was_left_out(covariances, tolerance):
    """It is the spectral norm of the error, not more, and below the tolerance times the shift or the largest part."""
    problem = mixture_problem(covariances, SIGMA, seed=0, alpha=ALPHA) if covariances else stretched()
    span = span_of(problem, "orthonormal", NUMBA, tolerance=tolerance)
    error = np.linalg.norm(span.to_dense() - problem.hessians(), 2, axis=(1, 2))
    np.testing.assert_allclose(span.truncation_error, error, rtol=1e-9, atol=1e-12)
    largest = np.maximum(span.shift, np.abs(span.coefficients).max(axis=1, initial=0.0))
    assert (span.truncation_error <= tolerance * largest * (1 + 1e-12)).all()


def stretched():
    """Points whose variances fall off by a factor of 9 from axis to axis."""
    problem = points_problem(200, 5)
    return replace(problem, centres=problem.centres * 3.0 ** -np.arange(5))


def test_no_more_vectors_than_the_tolerance_needs():
    counts = [span_of(stretched(), "orthonormal", NUMBA, tolerance=t).vectors.shape[1] for t in (0.5, 0.05, 1e-3, 0.0)]
    assert counts == sorted(counts) and counts[0] < counts[1] < counts[-1] == 5


@given(problems(offsets=(0.0,), sigmas=(-1.0, 1.0), alphas=(-1.0, 0.0)))
def test_the_complete_orthonormal_span_leaves_nothing_out(problem):
    fisher = problem.marginal().fisher(problem.x)
    span = fisher.span("orthonormal")
    size = np.abs(fisher.eigvalsh()).max(axis=1) + span.shift
    error = np.linalg.norm(span.to_dense() - fisher.to_dense(), 2, axis=(1, 2))
    assert (error <= span.truncation_error + 1e-13 * size).all()
    assert (span.truncation_error <= 1e-14 * size).all()


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, 1e5])
@pytest.mark.parametrize("form", ["data", "centred", "orthonormal"])
def test_rounding_error_says_what_cancellation_costs(form, offset):
    rng = np.random.default_rng(2)
    fisher = PointMasses(offset + rng.standard_normal((40, 3))).diffuse(1.0, 0.3).fisher(offset + np.zeros((4, 3)))
    span, dense = fisher.span(form), fisher.to_dense()
    error = np.linalg.norm(span.to_dense() - dense, 2, axis=(1, 2))
    assert (error <= span.rounding_error + span.truncation_error + fisher.error_bound()).all()
    small = span.rounding_error <= 1e-11 * np.linalg.norm(dense, 2, axis=(1, 2))
    assert small.all() == (form != "data" or offset == 0.0)


def test_every_prior_has_the_default_form():
    x = np.zeros((2, 2))
    full = GaussianMixture(np.eye(2), np.stack([np.eye(2), np.diag([1.0, 3.0])])).diffuse(0.9, 0.5).fisher(x)
    np.testing.assert_allclose(full.span().to_dense(), full.to_dense(), rtol=1e-12, atol=1e-12)
