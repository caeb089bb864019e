"""Traces and products from network outputs, against automatic differentiation and enumeration [MATH 4.1-4.7]."""

from __future__ import annotations

import itertools
import math

import array_api_strict
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfmath import PointMasses, _checks, bounds
from dfmath.approximations import (
    EndpointFisher,
    GaussianFisher,
    arguments,
    hutchinson_trace,
    hutchpp_trace,
    local_loss_trace,
    stochastic_traces,
    trace_matching,
)

MANY = settings(max_examples=40, deadline=None)
VARIANTS = ("paper", "centred", "calibrated")
HOMES = [
    pytest.param(np, "float64", id="numpy64"),
    pytest.param(np, "float32", id="numpy32"),
    pytest.param(array_api_strict, "float64", id="strict64"),
    pytest.param(array_api_strict, "float32", id="strict32"),
    pytest.param(torch, "float64", id="torch64"),
    pytest.param(torch, "float32", id="torch32"),
]
homes = pytest.mark.parametrize(("xp", "dtype"), HOMES)


def put(xp, dtype, values):
    return xp.asarray(np.asarray(values, dtype=dtype).tolist(), dtype=getattr(xp, dtype))


def get(array):
    return array.detach().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def check(result, truth, xp, dtype, scale=1.0):
    """Right values to the dtype's precision, in the caller's namespace and dtype."""
    assert type(result) is type(put(xp, dtype, [0.0])) and result.dtype == getattr(xp, dtype)
    assert tuple(result.shape) == np.shape(truth)
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(get(result), truth, rtol=64 * eps, atol=64 * eps * scale)


def fisher_by_autograd(points, x, alpha, sigma):
    """-Hess log q by torch, knowing nothing of posterior moments."""
    y = torch.tensor(points)

    def minus_log_q(x):
        return -torch.logsumexp(-0.5 * torch.sum((x - alpha * y) ** 2, dim=1) / sigma**2, dim=0)

    return torch.autograd.functional.hessian(minus_log_q, torch.tensor(x)).numpy()


class Posterior:
    """What ideal networks would put out at one x, from the definitions."""

    def __init__(self, points, x, alpha, sigma):
        self.noise = (x - alpha * points) / sigma
        logits = -0.5 * np.sum(self.noise**2, axis=1)
        w = np.exp(logits - logits.max())
        self.w, self.points, self.alpha, self.sigma = w / w.sum(), points, alpha, sigma
        self.count, self.dim = points.shape
        self.mean, self.eps = self.w @ points, self.w @ self.noise
        self.second_moment = float(self.w @ np.sum(points**2, axis=1))
        self.fisher = fisher_by_autograd(points, x, alpha, sigma)
        self.trace = float(np.trace(self.fisher))
        # What the sums above lose in float64, to be allowed for on top of the dtype's own error.
        self.rounding = 1e-12 * ((alpha / sigma) ** 2 * (self.second_moment + 1) + self.dim) / sigma**2


@st.composite
def posteriors(draw):
    """Nasty ones too: one dimension, one point, duplicates, offsets, small sigma."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, d = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    points = draw(st.sampled_from([0.0, 1.0, 20.0])) + rng.standard_normal((n, d))
    if n > 1 and draw(st.booleans()):
        points[1] = points[0]
    alpha, sigma = draw(st.sampled_from([0.05, 0.7, 1.0])), draw(st.sampled_from([1e-2, 0.3, 1.0, 10.0]))
    x = alpha * points[0] + sigma * draw(st.sampled_from([0.0, 1.0, 4.0])) * rng.standard_normal(d)
    return Posterior(points, x, alpha, sigma)


def three_posteriors(seed=5):
    rng = np.random.default_rng(seed)
    points, noise = rng.standard_normal((4, 3)), rng.standard_normal((3, 3))
    levels = [(1.0, 0.5), (0.8, 0.7), (0.3, 0.95)]
    return [Posterior(points, a * points[0] + s * e, a, s) for (a, s), e in zip(levels, noise, strict=True)]


def column(posteriors, name):
    return np.array([getattr(p, name) for p in posteriors])


# 4.1, 4.3


@MANY
@given(posteriors())
def test_trace_matching_is_exact_for_ideal_networks(p):
    t = trace_matching(np.array([p.second_moment / p.dim]), p.mean[None, :], p.alpha, p.sigma)
    assert float(t[0]) == pytest.approx(p.trace, rel=1e-10, abs=p.rounding)


@MANY
@given(posteriors(), st.floats(0, 3), st.integers(0, 99))
def test_local_loss_trace_is_off_by_the_squared_error_of_the_noise_prediction(p, size, seed):
    off = size * np.random.default_rng(seed).standard_normal(p.dim)
    loss = float(p.w @ np.sum((p.noise - p.eps - off) ** 2, axis=1))
    trace = float(local_loss_trace(np.array([loss]), p.sigma, p.dim)[0])
    assert trace + off @ off / p.sigma**2 == pytest.approx(
        p.trace, rel=1e-10, abs=p.rounding + 1e-12 * loss / p.sigma**2
    )


@homes
def test_traces_at_one_noise_level_for_each_row(xp, dtype):
    ps = three_posteriors()
    alpha, sigma = put(xp, dtype, column(ps, "alpha")), put(xp, dtype, column(ps, "sigma"))
    t = put(xp, dtype, column(ps, "second_moment") / 3)
    check(trace_matching(t, put(xp, dtype, column(ps, "mean")), alpha, sigma), column(ps, "trace"), xp, dtype, 50.0)
    loss = put(xp, dtype, [p.w @ np.sum((p.noise - p.eps) ** 2, axis=1) for p in ps])
    check(local_loss_trace(loss, sigma, 3), column(ps, "trace"), xp, dtype, 50.0)


def test_trace_matching_is_what_gradients_flow_through():
    mean = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([3.0], dtype=torch.float64)
    trace_matching(t, mean, 0.5, 2.0).sum().backward()
    np.testing.assert_allclose(mean.grad, 2 * 0.5**2 / 2.0**4 * np.array([[1.0, 2.0]]), rtol=1e-14)


# Operators


def conforms(operator, dense, xp, dtype):
    """All of an operator's answers against the one dense matrix it stands for."""
    scale, (b, d, _) = float(np.max(np.abs(dense))), dense.shape
    v = np.random.default_rng(1).standard_normal((b, d, 2)).astype(dtype)
    assert operator.shape == dense.shape and operator.dtype == getattr(xp, dtype)
    check(operator.to_dense(), dense, xp, dtype, scale)
    check(operator.trace(), np.trace(dense, axis1=1, axis2=2), xp, dtype, d * scale)
    check(operator.diagonal(), np.diagonal(dense, axis1=1, axis2=2), xp, dtype, scale)
    check(operator @ put(xp, dtype, v), dense @ v, xp, dtype, 4 * scale)
    check(operator.matvec(put(xp, dtype, v[:, :, 0])), (dense @ v[:, :, :1])[:, :, 0], xp, dtype, 4 * scale)
    check(operator.row(b - 1).to_dense(), dense[b - 1 :], xp, dtype, scale)
    np.testing.assert_allclose(operator.to_scipy(0) @ np.eye(d), dense[0], rtol=1e-6, atol=1e-6 * scale)


def endpoint_model(xh, m, alpha, sigma, variant, trace):
    """MATH 4.4 and 4.6 as they are printed."""
    u = xh - m
    p = {
        "paper": np.outer(xh, xh) - np.outer(m, m),
        "centred": np.outer(u, u),
        "calibrated": trace * np.outer(u, u) / (u @ u) if u.any() else trace * np.eye(len(u)) / len(u),
    }[variant]
    return np.eye(len(u)) / sigma**2 - alpha**2 / sigma**4 * p


@homes
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("d", [1, 3])
def test_endpoint_fisher_is_the_printed_matrix(variant, d, xp, dtype):
    rng = np.random.default_rng(2)
    xh, m = rng.standard_normal((2, 3, d)).astype(dtype).astype(float)
    m[1] = xh[1]
    alpha, sigma, trace = (rng.uniform(0.5, 1, 3).astype(dtype).astype(float) for _ in range(3))
    rows = zip(xh, m, alpha, sigma, [variant] * 3, trace, strict=True)
    dense = np.stack([endpoint_model(*row) for row in rows])
    told = put(xp, dtype, trace) if variant == "calibrated" else None
    arrays = (put(xp, dtype, a) for a in (xh, m, alpha, sigma))
    conforms(EndpointFisher(*arrays, variant, told), dense, xp, dtype)


@homes
def test_endpoint_fisher_at_one_noise_level_for_all_rows(xp, dtype):
    xh, m = np.random.default_rng(2).standard_normal((2, 3, 2)).astype(dtype).astype(float)
    dense = np.stack([endpoint_model(a, b, 0.5, 0.75, "paper", 0) for a, b in zip(xh, m, strict=True)])
    conforms(EndpointFisher(put(xp, dtype, xh), put(xp, dtype, m), 0.5, 0.75), dense, xp, dtype)


@MANY
@given(posteriors(), st.sampled_from(["paper", "centred"]))
def test_endpoints_drawn_from_the_posterior_are_unbiased(p, variant):
    means = np.repeat(p.mean[None, :], p.count, axis=0)
    every = EndpointFisher(p.points, means, p.alpha, p.sigma, variant).to_dense()
    np.testing.assert_allclose(np.einsum("n,nij->ij", p.w, every), p.fisher, rtol=1e-10, atol=p.rounding)


@MANY
@given(posteriors(), st.floats(0, 10))
def test_calibrated_endpoints_have_the_trace_they_are_told(p, trace):
    means = np.repeat(p.mean[None, :], p.count, axis=0)
    told = np.full(p.count, trace)
    f = EndpointFisher(p.points, means, p.alpha, p.sigma, "calibrated", told)
    implied = p.sigma**2 / p.alpha**2 * (p.dim - p.sigma**2 * f.trace())
    np.testing.assert_allclose(implied, told, rtol=1e-9, atol=1e-9 * (p.sigma / p.alpha) ** 2)


@MANY
@given(posteriors(), st.sampled_from(["centred", "calibrated"]))
def test_centred_endpoints_stay_below_the_identity_over_sigma_squared(p, variant):
    means = np.repeat(p.mean[None, :], p.count, axis=0)
    told = np.ones(p.count) if variant == "calibrated" else None
    f = EndpointFisher(p.points, means, p.alpha, p.sigma, variant, told)
    scale = np.max(np.abs(f.to_dense()), axis=(1, 2))
    assert np.all(f.eigvalsh()[:, -1] <= 1 / p.sigma**2 + 1e-13 * scale)


def test_paper_endpoint_loses_no_digits_to_an_offset():
    offset, gap, v = 1e9, np.array([[1e-3, 2e-3, -1e-3]]), np.array([[1.0, -2.0, 0.5]])
    m = offset + np.zeros((1, 3))
    xh = m + gap
    result = EndpointFisher(xh, m, 1.0, 300.0).matvec(v)
    with mpmath.workdps(60):
        a, b, w = (mpmath.matrix([mpmath.mpf(float(c)) for c in row[0]]) for row in (xh, m, v))
        truth = w / 300**2 - (a * (a.T * w)[0] - b * (b.T * w)[0]) / mpmath.mpf(300) ** 4
        np.testing.assert_allclose(result[0], [float(t) for t in truth], rtol=1e-12)


@pytest.mark.parametrize("sigma", [1e-100, 1e-30])
def test_operators_do_not_overflow_before_the_fisher_does(sigma):
    m, xh = np.zeros((1, 2)), sigma * np.array([[3.0, 4.0]])
    for variant, told in [("paper", None), ("centred", None), ("calibrated", np.array([25.0 * sigma**2]))]:
        f = EndpointFisher(xh, m, 1.0, sigma, variant, told).to_dense()[0] * sigma**2
        np.testing.assert_allclose(f, [[-8, -12], [-12, -15]], rtol=1e-12)
    f = GaussianFisher(np.array([sigma**2, 1.0]), None, 1.0, sigma).diagonal()[0]
    np.testing.assert_allclose(f, [0.5 / sigma**2, 1.0], rtol=1e-12)


# 4.6b


def orthonormal(d, r, seed=3):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0][:, :r]


def gaussian_fisher(c, basis, alpha, sigma):
    """-Hess log N(x; 0, alpha^2 C + sigma^2 I), by inverting it."""
    u = np.eye(len(c)) if basis is None else basis
    return np.linalg.inv(alpha**2 * (u * c) @ u.T + sigma**2 * np.eye(len(u)))


@homes
@pytest.mark.parametrize("shape", ["coordinates", "complete", "low rank", "one direction", "one dimension"])
def test_gaussian_fisher_is_exact_for_gaussian_data(shape, xp, dtype):
    d, r = {"low rank": (5, 2), "one direction": (4, 1), "one dimension": (1, 1)}.get(shape, (3, 3))
    basis = None if shape == "coordinates" else orthonormal(d, r).astype(dtype)
    c = np.array([2.0, 0.5, 0.0])[:r]
    alpha, sigma = (np.array(v).astype(dtype).astype(float) for v in ([0.9, 0.5], [0.4, 0.8]))
    dense = np.stack([gaussian_fisher(c, basis, a, s) for a, s in zip(alpha, sigma, strict=True)])
    u = None if basis is None else put(xp, dtype, basis)
    f = GaussianFisher(put(xp, dtype, c), u, put(xp, dtype, alpha), put(xp, dtype, sigma))
    conforms(f, dense, xp, dtype)
    check(f.kappa, np.ones(2), xp, dtype)


@pytest.mark.parametrize("basis", [None, orthonormal(3, 3)], ids=["coordinates", "complete"])
def test_gaussian_fisher_keeps_small_eigenvalues_at_tiny_sigma(basis):
    c = np.array([1e-6, 1.0, 100.0])
    f = GaussianFisher(c, basis, 1.0, 1e-9)
    np.testing.assert_allclose(f.trace(), [np.sum(1 / (c + 1e-18))], rtol=1e-12)
    np.testing.assert_allclose(f.eigvalsh()[0], 1 / c[::-1], rtol=1e-9)


def gaussian_posterior_trace(c, alpha, sigma):
    return np.sum(sigma**2 * c / (alpha**2 * c + sigma**2))


@homes
def test_kappa_scales_the_gaussian_trace_to_the_one_told(xp, dtype):
    c, basis, alpha, sigma = np.array([2.0, 0.5]), orthonormal(4, 2), 0.8, 1.6
    factors = np.array([0.0, 0.5, 1.0, 1.2])
    told = factors * gaussian_posterior_trace(c, alpha, sigma)
    f = GaussianFisher(put(xp, dtype, c), put(xp, dtype, basis), alpha, sigma, put(xp, dtype, told))
    check(f.kappa, factors, xp, dtype)
    check(f.trace(), 4 / sigma**2 - alpha**2 / sigma**4 * told, xp, dtype, 4.0)
    plain = np.eye(4) / sigma**2 - gaussian_fisher(c, basis, alpha, sigma)
    conforms(f, np.eye(4) / sigma**2 - factors[:, None, None] * plain, xp, dtype)


@MANY
@given(st.integers(0, 99), st.floats(0, 1e4), st.sampled_from([1e-2, 1.0, 30.0]), st.booleans(), st.booleans())
def test_kappa_is_clipped_where_the_fisher_would_turn_negative(seed, trace, sigma, complete, coordinates):
    rng = np.random.default_rng(seed)
    d, r = 4, 4 if complete or coordinates else 2
    c, basis = rng.exponential(1.0, r), None if coordinates else orthonormal(d, r, seed)
    f = GaussianFisher(c, basis, 1.0, sigma, np.array([trace]))
    values = f.eigvalsh()[0]
    assert values[0] >= -1e-12 / sigma**2 and values[-1] <= (1 + 1e-12) / sigma**2
    limit = 1 + sigma**2 / np.max(c)
    wanted = trace / gaussian_posterior_trace(c, 1.0, sigma)
    assert float(f.kappa[0]) == pytest.approx(min(wanted, limit), rel=1e-12)
    if wanted > limit:
        assert values[0] == pytest.approx(0.0, abs=1e-12 / sigma**2)


def test_no_variance_leaves_nothing_to_scale():
    f = GaussianFisher(np.zeros(2), None, 1.0, 0.5, np.array([0.0, 3.0]))
    assert f.kappa.tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(f.to_dense(), np.stack([4 * np.eye(2)] * 2))


def test_batch_says_how_many_rows_there_are_where_nothing_else_does():
    assert GaussianFisher(np.ones(2), None, 1.0, 1.0).shape == (1, 2, 2)
    f = GaussianFisher(np.ones(2), None, 1.0, 1.0, batch=3)
    np.testing.assert_allclose(f.matvec(np.ones((3, 2))), np.full((3, 2), 0.5))


# 4.7: Hutchinson


def symmetric(d, seed=0):
    a = np.random.default_rng(seed).standard_normal((d, d))
    return (a + a.T) / 2


def product(matrix, xp=np, dtype="float64"):
    m = put(xp, dtype, matrix)
    return lambda v: xp.matmul(m[None, ...] if xp is not torch else m, v)


def exact_variance(matrix, distribution):
    """Variance of v^T M v, by enumeration of all sign vectors or by Gauss-Hermite quadrature."""
    nodes, mass = np.array([-1.0, 1.0]), np.array([0.5, 0.5])
    if distribution == "gaussian":
        nodes, mass = np.polynomial.hermite_e.hermegauss(3)
        mass = mass / mass.sum()
    d = len(matrix)
    v, w = (np.array(list(itertools.product(a, repeat=d))) for a in (nodes, mass))
    samples, w = np.einsum("ki,ij,kj->k", v, matrix, v), np.prod(w, axis=1)
    return float(w @ (samples - w @ samples) ** 2)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("d", [2, 4])
def test_hutchinson_has_the_mean_and_the_variance_of_all_its_probes(distribution, d):
    rows, n, matrix = 40_000, 2, symmetric(d)
    estimate = hutchinson_trace(product(matrix), np.zeros((rows, d)), n, 11, distribution)
    variance = exact_variance(matrix, distribution)
    off = np.mean(estimate.value) - np.trace(matrix)
    assert abs(off) <= 6 * math.sqrt(variance / n / rows)
    # Squared standard errors average to the variance of a mean of n; with n for n - 1 they would be half of it.
    measured = estimate.standard_error**2 * n
    assert abs(np.mean(measured) - variance) <= 6 * np.std(measured) / math.sqrt(rows)
    assert np.mean(measured) == pytest.approx(variance, rel=0.2)
    assert np.var(estimate.value) * n == pytest.approx(variance, rel=0.1)
    assert estimate.products == n


@pytest.mark.parametrize("method", [hutchinson_trace, hutchpp_trace])
def test_standard_errors_cover_as_often_as_they_should(method):
    matrix = symmetric(24, 4)
    estimate = method(product(matrix), np.zeros((4000, 24)), 20, 5)
    z = (estimate.value - np.trace(matrix)) / estimate.standard_error
    n = 20 if method is hutchinson_trace else 20 - 2 * (20 // 3)
    quantile = {20: 2.093, 8: 2.365}[n]  # Student's t with n - 1 degrees of freedom
    assert np.mean(np.abs(z) < quantile) == pytest.approx(0.95, abs=0.02)
    assert abs(np.mean(estimate.value) - np.trace(matrix)) <= 6 * np.std(estimate.value) / math.sqrt(4000)


def test_rademacher_probes_see_a_diagonal_exactly():
    estimate = hutchinson_trace(product(np.diag([1.0, -2.0, 5.0])), np.zeros((2, 3)), 2, 0)
    assert estimate.value.tolist() == [4.0, 4.0] and estimate.standard_error.tolist() == [0.0, 0.0]


@homes
@pytest.mark.parametrize("method", [hutchinson_trace, hutchpp_trace])
def test_estimates_are_the_same_in_every_namespace(method, xp, dtype):
    matrix = symmetric(9).astype(dtype)
    truth = method(product(matrix), np.zeros((3, 9)), 7, 42)
    estimate = method(product(matrix, xp, dtype), put(xp, dtype, np.zeros((3, 9))), 7, 42)
    check(estimate.value, truth.value, xp, dtype, 30.0)
    check(estimate.standard_error, truth.standard_error, xp, dtype, 30.0)
    assert estimate.products == truth.products == 7


@pytest.mark.parametrize("method", [hutchinson_trace, hutchpp_trace])
def test_a_row_does_not_depend_on_its_batch_mates_nor_on_blocks(method, monkeypatch):
    matrix = symmetric(10)
    whole = method(product(matrix), np.zeros((5, 10)), 8, 1)
    alone = method(product(matrix), np.zeros((1, 10)), 8, 1)
    monkeypatch.setattr(stochastic_traces, "_CHUNK", 150)
    blocks = method(product(matrix), np.zeros((5, 10)), 8, 1)
    np.testing.assert_allclose(alone.value, whole.value[:1], rtol=1e-13)
    np.testing.assert_allclose(blocks.value, whole.value, rtol=1e-13)
    np.testing.assert_allclose(blocks.standard_error, whole.standard_error, rtol=1e-12)
    assert len(set(whole.value.tolist())) == 5


def test_more_probes_add_to_fewer_and_another_seed_gives_others():
    seen = []

    def recorder(v):
        seen.append(v.copy())
        return v

    for n, seed in [(3, 0), (5, 0), (3, 1)]:
        hutchinson_trace(recorder, np.zeros((2, 4)), n, seed, "gaussian")
    np.testing.assert_array_equal(seen[0], seen[1][:, :, :3])
    assert not np.any(seen[0] == seen[2])


def test_probes_are_independent_of_samples_with_the_same_seed():
    seen = []
    hutchinson_trace(lambda v: seen.append(v) or v, np.zeros((1, 4)), 2, 3, "gaussian")
    assert not np.any(np.isin(seen[0], np.random.default_rng(3).standard_normal(100)))


@pytest.mark.parametrize("xp", [np, array_api_strict, torch])
def test_estimators_take_operators(xp):
    points = put(xp, "float64", np.random.default_rng(0).standard_normal((4, 30)))
    x = put(xp, "float64", np.random.default_rng(1).standard_normal((2, 30)))
    fisher = PointMasses(points).diffuse(1.0, 4.0).fisher(x)
    truth, estimate = get(fisher.trace()), hutchinson_trace(fisher, x, 50, 0)
    assert np.all(np.abs(get(estimate.value) - truth) <= 6 * get(estimate.standard_error))
    # Four points: I/sigma^2 less a matrix of rank three, which three sketched directions hold.
    exact = hutchpp_trace(fisher, x, 11, 0, shift=1 / 16)
    np.testing.assert_allclose(get(exact.value), truth, rtol=1e-12)


# Hutch++


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("shift", [0.0, -2.0, 1e3])
def test_hutchpp_is_exact_for_low_rank_plus_a_known_multiple_of_the_identity(rank, shift):
    u = np.random.default_rng(rank).standard_normal((20, rank))
    matrix = shift * np.eye(20) + (u * [5.0, -1.0, 0.2][:rank]) @ u.T
    estimate = hutchpp_trace(product(matrix), np.zeros((4, 20)), 9, 0, shift=shift)
    np.testing.assert_allclose(estimate.value, np.full(4, np.trace(matrix)), rtol=1e-12, atol=1e-12)
    assert np.all(estimate.standard_error <= 1e-12 * (1 + abs(shift) * 20))


def test_hutchpp_is_exact_for_multiples_of_the_identity_that_it_does_not_know():
    estimate = hutchpp_trace(lambda v: 3.0 * v, np.zeros((4, 20)), 9, 0)
    np.testing.assert_allclose(estimate.value, np.full(4, 60.0), rtol=1e-13)
    assert np.all(estimate.standard_error <= 1e-12)


def test_hutchpp_takes_another_shift_for_each_row():
    shifts = np.array([1.0, 5.0])
    u = np.random.default_rng(0).standard_normal(12)
    matrices = shifts[:, None, None] * np.eye(12) + np.outer(u, u)
    estimate = hutchpp_trace(lambda v: matrices @ v, np.zeros((2, 12)), 4, 0, shift=shifts)
    np.testing.assert_allclose(estimate.value, np.trace(matrices, axis1=1, axis2=2), rtol=1e-12)


@pytest.mark.parametrize(("d", "probes"), [(1, 4), (4, 4), (5, 60), (3, 4)])
def test_hutchpp_with_a_budget_for_every_direction_is_exact(d, probes, monkeypatch):
    matrix = symmetric(d)
    monkeypatch.setattr(stochastic_traces, "_CHUNK", 2 * d)
    estimate = hutchpp_trace(product(matrix), np.zeros((2, d)), probes, 0)
    np.testing.assert_allclose(estimate.value, np.full(2, np.trace(matrix)), rtol=1e-13)
    assert estimate.products == d and estimate.standard_error.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("method", [hutchinson_trace, hutchpp_trace])
@pytest.mark.parametrize("probes", [4, 7, 12])
def test_products_are_counted(method, probes):
    used = []

    def counting(v):
        used.append(v.shape[2])
        return 2.0 * v

    assert method(counting, np.zeros((2, 20)), probes, 0).products == sum(used) == probes


def test_hutchpp_beats_hutchinson_on_a_decaying_spectrum():
    u = orthonormal(40, 40)
    matrix = (u * 2.0 ** -np.arange(40)) @ u.T
    plain, better = (f(product(matrix), np.zeros((300, 40)), 24, 0) for f in (hutchinson_trace, hutchpp_trace))
    assert np.std(better.value) < 0.05 * np.std(plain.value)


def test_hutchinson_error_follows_the_bound_of_the_diffusion_fisher():
    points = np.random.default_rng(0).standard_normal((6, 5))
    x = np.repeat(points[:1], 20_000, axis=0)
    fisher = PointMasses(points).diffuse(1.0, 0.8).fisher(x[:1])
    dense = fisher.to_dense()[0]
    variance = bounds.hutchinson_variance(np.sum(dense**2), np.sum(np.diag(dense) ** 2))
    estimate = hutchinson_trace(lambda v: dense @ v, x, 3, 0)
    assert np.var(estimate.value) * 3 == pytest.approx(variance, rel=0.1)


# Devices


@pytest.fixture
def elsewhere(monkeypatch):
    """A device that is not the default one, whose arrays come back to the host only when asked to."""

    def to_numpy(array):
        return np.asarray(array.to_device(array_api_strict.Device("CPU_DEVICE")))

    for module in (_checks, arguments, bounds):
        monkeypatch.setattr(module, "to_numpy", to_numpy)
    return array_api_strict.Device("device1")


def test_results_stay_on_the_device_they_came_from(elsewhere):
    xp = array_api_strict
    points, level = xp.ones((2, 5), device=elsewhere), xp.asarray([0.5, 0.7], device=elsewhere)
    basis, c = xp.eye(5, 2, device=elsewhere), level
    operators = [EndpointFisher(2 * points, points, level, 0.3, v) for v in ("paper", "centred")]
    operators += [EndpointFisher(points, points, level, level, "calibrated", level)]
    operators += [GaussianFisher(c, u, 1.0, level, level) for u in (None, basis)]
    results = [trace_matching(level, points, 1.0, level), local_loss_trace(level, 0.5, 3)]
    results += [form for f in operators for form in (f.to_dense(), f.diagonal(), f.trace())]
    results += [f @ points[:, :, None] for f in operators if f.shape[1] == 5]
    for probes in (4, 6):
        e = hutchpp_trace(lambda v: 2 * v, points, probes, 0, shift=level)
        results += [e.value, e.standard_error, hutchinson_trace(lambda v: v, points, probes, 0).value]
    results += [bounds.weight_factor(level), *bounds.dropped_components(level, level)]
    results += [bounds.omitted_mass(points, level), bounds.endpoint_error(level, level, level, level)]
    assert all(result.device == elsewhere for result in results)


# The door


ONE, TWO = np.ones((1, 2)), np.ones((2, 2))
EYE = np.eye(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: trace_matching(np.ones(3), TWO, 1.0, 1.0), ValueError, r"second_moment must have shape \(2,\)"),
        (lambda: trace_matching(np.ones(2), np.ones(2), 1.0, 1.0), ValueError, r"mean must have shape \(B, d\)"),
        (lambda: trace_matching(np.ones(2), TWO, 1.0, -1.0), ValueError, "sigma must be positive"),
        (lambda: trace_matching(np.ones(2), TWO, np.ones(3), 1.0), ValueError, r"alpha must be .* shape \(2,\)"),
        (lambda: trace_matching(np.ones(2), TWO, torch.ones(2), 1.0), TypeError, "alpha must be in the .* of mean"),
        (lambda: trace_matching(np.ones(2), np.nan * TWO, 1.0, 1.0), ValueError, "mean must be finite, .* row 0"),
        (lambda: local_loss_trace(np.ones((2, 1)), 1.0, 3), ValueError, r"loss must have shape \(B,\)"),
        (lambda: local_loss_trace(np.ones(2), 1.0, 0), ValueError, "dim must be a positive integer"),
        (lambda: local_loss_trace(np.array([1.0, np.inf]), 1.0, 2), ValueError, "loss must be finite, .* row 1"),
        (lambda: EndpointFisher(ONE, TWO, 1.0, 1.0), ValueError, "endpoint must have the shape of mean"),
        (lambda: EndpointFisher(np.float32(TWO), TWO, 1.0, 1.0), TypeError, "endpoint must have the dtype of mean"),
        (lambda: EndpointFisher(TWO, TWO, 1.0, 1.0, "centered"), ValueError, "did you mean 'centred'"),
        (lambda: EndpointFisher(TWO, TWO, 1.0, 1.0, "calibrated"), ValueError, "posterior_trace must be given"),
        (lambda: EndpointFisher(TWO, TWO, 1.0, 1.0, "paper", np.ones(2)), ValueError, "must not be given"),
        (
            lambda: EndpointFisher(TWO, TWO, 1.0, 1.0, "calibrated", np.array([1.0, -2.0])),
            ValueError,
            "posterior_trace must be zero or positive, got -2 in row 1",
        ),
        (lambda: GaussianFisher(-np.ones(2), None, 1.0, 1.0), ValueError, "covariance_eigenvalues must be zero or"),
        (lambda: GaussianFisher(np.ones(0), None, 1.0, 1.0), ValueError, "covariance_eigenvalues must hold"),
        (lambda: GaussianFisher(np.ones(2), 1.1 * EYE, 1.0, 1.0), ValueError, "basis must have orthonormal columns"),
        (lambda: GaussianFisher(np.ones(2), TWO, 1.0, 1.0), ValueError, "basis must have orthonormal columns"),
        (lambda: GaussianFisher(np.ones(2), ONE, 1.0, 1.0), ValueError, r"basis must have shape \(d, 2\)"),
        (lambda: GaussianFisher(np.ones(2), None, np.ones(2), np.ones(3)), ValueError, "alpha must be a number or"),
        (lambda: GaussianFisher(np.ones(2), None, 1.0, 1.0, ONE[0], batch=3), ValueError, "posterior_trace must have"),
        (lambda: hutchinson_trace(lambda v: v, TWO, 1, 0), ValueError, "probes must be at least 2"),
        (lambda: hutchinson_trace(lambda v: v, TWO, 2.0, 0), ValueError, "probes must be a positive integer"),
        (lambda: hutchinson_trace(lambda v: v, TWO, 2, -1), ValueError, "seed must be a non-negative integer"),
        (lambda: hutchinson_trace(lambda v: v, TWO, 2, 0, "normal"), ValueError, "distribution must be one of"),
        (lambda: hutchinson_trace(lambda v: v[:, :, 0], TWO, 2, 0), ValueError, "matvec's result must have shape"),
        (lambda: hutchinson_trace(lambda v: v[:1], TWO, 2, 0), ValueError, r"matvec must return shape \(2, 2, 2\)"),
        (lambda: hutchinson_trace(EYE, TWO, 2, 0), TypeError, "matvec must be a SymmetricOperator or a function"),
        (lambda: hutchinson_trace(EndpointFisher(ONE, ONE, 1.0, 1.0), TWO, 2, 0), ValueError, "to match like"),
        (lambda: hutchpp_trace(lambda v: v, TWO, 3, 0), ValueError, "probes must be at least 4"),
        (lambda: hutchpp_trace(lambda v: v, TWO, 4, 0, shift=math.nan), ValueError, "shift must be finite"),
        (lambda: hutchpp_trace(lambda v: v, TWO, 4, 0, shift=np.ones(3)), ValueError, r"shift must have shape \(2,\)"),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
