"""The noised density: values, derivatives of each other, and what must not change them [MATH 1.1-1.5]."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    FORMS,
    KINDS,
    QUANTITIES,
    SINGULAR_FORMS,
    Problem,
    assert_matches,
    computed,
    mixture_problem,
    numbers,
)
from hypothesis import example, given
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from strategies import problems

from dfmath import GaussianMixture, PointMasses

EVERY_FORM = [None, *FORMS, *SINGULAR_FORMS]


def problem_of(form, sigma=0.7, alpha=0.9, seed=1):
    """Three components at three queries; point masses where there is no form."""
    problem = mixture_problem(form or "zero", sigma, seed, alpha)
    return problem if form else replace(problem, covariances=None)


def precision(kind, dtype):
    """What one rounding of the result costs, or in JAX without float64 the sums, too."""
    single = 1e-5 if kind.backend == "numba" else 2.5e-7  # products may be in float32
    return 1e-5 if kind.unit > 1e-10 else {"float64": 1e-12, "float32": single}[dtype]


# Values, against SciPy and automatic differentiation


@pytest.mark.parametrize("form", EVERY_FORM)
def test_log_density_score_and_mean(form, xp_kind, dtype):
    problem = problem_of(form).as_dtype(dtype)
    x = xp_kind.put(problem.x, dtype)
    q = problem.marginal(xp_kind, dtype)
    expected = log_density_of(problem)
    score = scores_of(problem)
    rtol = precision(xp_kind, dtype)
    assert_matches(q.log_density(x), expected, rtol, like=x)
    assert_matches(q.score(x), score, rtol, like=x)
    alpha, sigma = (level[:, None] for level in problem.levels)
    assert_matches(q.posterior_mean(x), (problem.x + sigma**2 * score) / alpha, rtol, like=x)


def log_density_of(problem):
    """Log sum_k pi_k N(x; alpha mu_k, S_k) by SciPy."""

    def one(x, alpha, sigma):
        s = alpha**2 * problem.dense_covariances + sigma**2 * np.eye(len(x))
        logs = problem.logs - logsumexp(problem.logs)
        parts = [multivariate_normal.logpdf(x, alpha * m, c) for m, c in zip(problem.centres, s, strict=True)]
        return logsumexp(logs + np.array(parts))

    return np.array([one(x, a, s) for x, a, s in zip(problem.x, *problem.levels, strict=True)])


def scores_of(problem):
    rows = torch.tensor(problem.x)
    return np.stack([torch.func.grad(problem.log_density(b))(x).numpy() for b, x in enumerate(rows)])


@pytest.mark.parametrize("form", ["scalar", "full"])
def test_score_is_the_slope_of_the_log_density(form):
    """Central differences know nothing of how either is computed."""
    problem, h = problem_of(form), 1e-5
    q = problem.marginal()
    steps = h * np.eye(3)
    slopes = [(q.log_density(problem.x + e) - q.log_density(problem.x - e)) / (2 * h) for e in steps]
    np.testing.assert_allclose(q.score(problem.x), np.stack(slopes, axis=1), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", [None, "full"])
def test_derivatives_of_score_and_mean(form):
    """Jacobians are -F and (alpha/sigma^2) P [MATH 1.2]."""
    problem, h = problem_of(form), 1e-5
    q = problem.marginal()

    def slope(function, e):
        return (function(problem.x + e) - function(problem.x - e)) / (2 * h)

    scores = np.stack([slope(q.score, e) for e in h * np.eye(3)], axis=2)
    means = np.stack([slope(q.posterior_mean, e) for e in h * np.eye(3)], axis=2)
    fisher = q.fisher(problem.x)
    np.testing.assert_allclose(-fisher.to_dense(), scores, rtol=1e-6, atol=1e-8)
    covariance = fisher.posterior_covariance().to_dense()
    np.testing.assert_allclose(0.9 / 0.7**2 * covariance, means, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("covariances", [0.0, np.array([0.0, 0.5, 2.0]), np.array([[0.1], [0.2], [0.3]])])
def test_density_integrates_to_one(covariances):
    """The trapezoidal rule is exact to rounding for smooth functions that vanish at both ends."""
    means, weights = np.array([[-1.0], [0.5], [3.0]]), np.array([1.0, 2.0, 5.0])
    prior = GaussianMixture(means, covariances, weights=weights)
    x = np.linspace(-40.0, 40.0, 20_001)[:, None]
    density = np.exp(prior.diffuse(0.8, 0.3).log_density(x))
    assert np.sum(density) * (x[1, 0] - x[0, 0]) == pytest.approx(1.0, abs=1e-12)


def test_density_in_the_plane_integrates_to_one():
    means = np.array([[-1.0, 0.0], [1.5, 1.0]])
    full = np.array([[[1.0, 0.8], [0.8, 1.0]], [[0.5, -0.2], [-0.2, 0.3]]])
    q = GaussianMixture(means, full, weights=np.array([0.3, 0.7])).diffuse(0.9, 0.4)
    axis = np.linspace(-9.0, 9.0, 361)
    grid = np.stack(np.meshgrid(axis, axis), axis=2).reshape(-1, 2)
    assert np.exp(q.log_density(grid)).sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1.0, abs=1e-12)


# What must not change results


@pytest.mark.parametrize("form", EVERY_FORM)
def test_noise_levels_of_other_queries_do_not_matter(form, xp_kind):
    dtype = xp_kind.dtypes[0]
    levels = np.array([1.0, 0.6, 0.25]), np.array([0.3, 0.8, 4.0])
    problem = problem_of(form, levels[1], levels[0]).as_dtype(dtype)
    x = xp_kind.put(problem.x, dtype)
    together = problem.marginal(xp_kind, dtype).log_density(x), problem.marginal(xp_kind, dtype).score(x)
    for b in range(3):
        one = replace(problem, alpha=float(problem.alpha[b]), sigma=float(problem.sigma[b])).marginal(xp_kind, dtype)
        like = x[b : b + 1, :]
        assert_matches(one.log_density(like), numbers(together[0])[b : b + 1], 100 * xp_kind.unit, like=like)
        assert_matches(one.score(like), numbers(together[1])[b : b + 1], 100 * xp_kind.unit, like=like)


def test_scalar_alpha_goes_with_one_sigma_for_each_query():
    problem = problem_of("diagonal", np.array([0.3, 0.8, 4.0]), 0.5)
    both = replace(problem, alpha=np.full(3, 0.5))
    np.testing.assert_array_equal(problem.marginal().score(problem.x), both.marginal().score(problem.x))


@given(problems())
def test_order_and_splitting_of_components_do_not_matter(problem):
    """Reverse the components and give each twice, with a quarter and three quarters of its weight."""

    def twice(value):
        if isinstance(value, tuple):
            return tuple(twice(part) for part in value)
        return np.concatenate([value[::-1], value[::-1]]) if np.ndim(value) else value

    logs = np.concatenate([problem.logs[::-1] + np.log(0.25), problem.logs[::-1] + np.log(0.75)])
    c = problem.covariances
    split = replace(problem, centres=twice(problem.centres), covariances=twice(c), log_weights=logs)
    same(split, problem, 1e-9)


@given(problems(sigmas=(-1.0, 2.0), alphas=(-1.0, 0.0)))
@example(
    Problem(
        centres=np.array([[0.47590191], [1.04386493]]),
        x=np.array([[0.03039534]]),
        v=np.ones((1, 1)),
        alpha=0.04,
        sigma=0.05,
        covariances=0.3,
    )
)
def test_units_do_not_matter(problem):
    """In units 4 times as small everything scales exactly, because powers of two do not round."""
    c, count = problem.covariances, 4.0
    larger = tuple(f * part for f, part in zip((16.0, 4.0), c, strict=True)) if isinstance(c, tuple) else c
    larger = 16.0 * c if isinstance(c, np.ndarray | float) else larger
    scaled = replace(
        problem, centres=count * problem.centres, x=count * problem.x, sigma=count * problem.sigma, covariances=larger
    )
    before, after = (computed(p.marginal(), p.x, p.v) for p in (problem, scaled))
    d = problem.x.shape[1]
    np.testing.assert_allclose(after["log_density"], before["log_density"] - d * np.log(4.0), rtol=1e-12, atol=1e-12)
    _, sizes = scaled.truth()  # a score may be zero by cancellation, where logits that log 4 moved round otherwise
    for name, power in {"mean": 1, "score": -1, "fisher_product": -2, "fisher_trace": -2}.items():
        expected = count**power * before[name]
        assert_matches(after[name], expected, 1e-9, sizes[name] + 1e-100, like=expected)


def same(problem, other, rtol):
    """All quantities of both agree, beside the sizes of their terms."""
    got, expected = (computed(p.marginal(), p.x, p.v) for p in (problem, other))
    _, sizes = other.truth()
    for name in QUANTITIES:
        assert_matches(got[name], expected[name], rtol, sizes[name] + 1e-100, like=expected[name])


def test_weights_and_log_weights_are_the_same_thing(xp_kind, dtype):
    points = np.random.default_rng(0).standard_normal((5, 2))
    weights = np.array([0.5, 0.0, 2.0, 1.0, 4.0])
    with np.errstate(divide="ignore"):
        logs = np.log(weights)
    x = xp_kind.put(points[:3] + 0.1, dtype)
    priors = [
        PointMasses(xp_kind.put(points, dtype), weights=xp_kind.put(weights, dtype)),
        PointMasses(xp_kind.put(points, dtype), log_weights=xp_kind.put(logs, dtype)),
        PointMasses(xp_kind.put(points[weights > 0], dtype), weights=xp_kind.put(weights[weights > 0] * 7, dtype)),
    ]
    first, *others = [numbers(prior.diffuse(1.0, 0.5).score(x)) for prior in priors]
    for other in others:
        np.testing.assert_allclose(other, first, rtol=4 * float(np.finfo(dtype).eps))


# Limits


@pytest.mark.parametrize("form", FORMS)
def test_without_noise_the_density_is_the_prior_itself(form):
    problem = problem_of(form, sigma=0.0, alpha=1.0)
    q = problem.marginal()
    np.testing.assert_allclose(q.log_density(problem.x), log_density_of(problem), rtol=1e-12)
    np.testing.assert_allclose(q.posterior_mean(problem.x), problem.x, rtol=1e-12)


def test_at_low_noise_the_posterior_is_the_nearest_point():
    points = np.random.default_rng(0).standard_normal((50, 3))
    q = PointMasses(points).diffuse(0.5, 1e-6)
    np.testing.assert_array_equal(q.posterior_mean(0.5 * points[:7] + 1e-7), points[:7])
    np.testing.assert_array_equal(q.fisher(0.5 * points[:7]).trace(), np.full(7, 3e12))


def test_at_high_noise_the_posterior_is_the_prior():
    problem = problem_of("full", sigma=1e8, alpha=1.0)
    w = np.exp(problem.logs) / np.exp(problem.logs).sum()
    mean = w @ problem.centres
    spread = problem.centres - mean
    covariance = np.einsum("k,kij->ij", w, problem.dense_covariances + spread[:, :, None] * spread[:, None, :])
    q, x = problem.marginal(), np.zeros((1, 3))
    np.testing.assert_allclose(q.posterior_mean(x)[0], mean, rtol=1e-12)
    np.testing.assert_allclose(q.fisher(x).posterior_covariance().to_dense()[0], covariance, rtol=1e-12)


@given(problems(forms=(None,)))
def test_the_posterior_mean_lies_among_the_points(problem):
    mean, y = problem.marginal().posterior_mean(problem.x), problem.centres
    slack = 1e-13 * np.abs(y).max()
    assert (mean >= y.min(axis=0) - slack).all() and (mean <= y.max(axis=0) + slack).all()


@pytest.mark.parametrize("form", [None, "per-component", "full", "low-rank"])
def test_no_queries_give_no_results(form, xp_kind):
    problem = problem_of(form).as_dtype(xp_kind.dtypes[0])
    x = xp_kind.put(np.zeros((0, 3)), xp_kind.dtypes[0])
    got = computed(problem.marginal(xp_kind, xp_kind.dtypes[0]), x, x)
    for name in QUANTITIES:
        width = (0, 3) if name in ("mean", "score", "fisher_product", "covariance_product") else (0,)
        assert_matches(got[name], np.zeros(width), 0.0, like=x)


def test_kinds_are_all_there():
    """What the fixtures claim to run on."""
    names = [kind.name for kind in KINDS]
    assert names[:4] == ["numpy-numba", "numpy-array-api", "array-api-strict", "torch"]
    assert len(set(names)) == len(names)


def test_the_problem_is_the_one_that_is_meant():
    """A guard on this file's own truth: a shifted mean or a wrong level changes log q."""
    problem = problem_of("full")
    for change in ({"alpha": 0.91}, {"sigma": 0.71}, {"centres": problem.centres + 1e-6}):
        assert not np.allclose(log_density_of(Problem(**(vars(problem) | change))), log_density_of(problem), rtol=1e-12)
