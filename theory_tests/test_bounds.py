"""Every bound holds against errors of the worst direction, and is attained where it says so [MATH 1.6-1.7, 4.2-4.9]."""

from __future__ import annotations

import itertools
import math
import warnings

import array_api_strict
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfmath import bounds
from dfmath.approximations import EndpointFisher, local_loss_trace, trace_matching

SLACK = 1 + 1e-9
MANY = settings(max_examples=60, deadline=None)

levels = st.sampled_from([1e-3, 0.1, 1.0, 10.0])
fractions = st.floats(0, 1)
seeds = st.integers(0, 2**32 - 1)


class Posterior:
    """Point masses seen from one x, written down from the definitions with NumPy."""

    def __init__(self, points, x, alpha, sigma):
        gaps = (x - alpha * points) / sigma
        logits = -0.5 * np.sum(gaps**2, axis=1)
        w = np.exp(logits - logits.max())
        self.w, self.points, self.noise = w / w.sum(), points, gaps
        self.alpha, self.sigma, self.dim = alpha, sigma, points.shape[1]
        self.mean, self.eps = self.w @ points, self.w @ gaps
        centred = points - self.mean
        self.covariance = (self.w[:, None] * centred).T @ centred
        self.second_moment = float(self.w @ np.sum(points**2, axis=1))
        self.fisher = np.eye(self.dim) / sigma**2 - alpha**2 / sigma**4 * self.covariance
        self.trace = self.dim / sigma**2 - alpha**2 / sigma**4 * np.trace(self.covariance)


@st.composite
def posteriors(draw, offsets=(0.0, 1.0, 30.0)):
    """Nasty ones too: one dimension, one point, duplicates, offsets, and weights from all equal to one point alone."""
    rng = np.random.default_rng(draw(seeds))
    n, d = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    points = draw(st.sampled_from(offsets)) + rng.standard_normal((n, d))
    if n > 1 and draw(st.booleans()):
        points[1] = points[0]
    alpha, sigma = draw(st.sampled_from([0.05, 0.7, 1.0])), draw(levels)
    x = alpha * points[0] + sigma * draw(st.sampled_from([0.0, 1.0, 5.0])) * rng.standard_normal(d)
    return Posterior(points, x, alpha, sigma)


def direction(vector, seed):
    """A unit vector: along `vector`, against it, or anywhere."""
    rng = np.random.default_rng(seed)
    v = vector if seed % 3 < 2 and np.linalg.norm(vector) > 0 else rng.standard_normal(vector.shape)
    return (-1) ** (seed % 3) * v / np.linalg.norm(v)


def rounding(p, dim=4):
    """What float64 may lose in the trace of p's Fisher, and in what it is compared with."""
    return 1e-13 * dim * (p.alpha / p.sigma) ** 2 * (p.second_moment + 1) / p.sigma**2 + 1e-13 * dim / p.sigma**2


def matched_trace(p, t, m):
    return float(trace_matching(np.array([t]), m[None, :], p.alpha, p.sigma)[0])


# 4.2


@MANY
@given(posteriors(), fractions, fractions, seeds)
def test_trace_matching_error_covers_networks_that_err_in_any_direction(p, d1, d2, seed):
    m = p.mean + p.sigma / p.alpha * d2 * direction(p.mean, seed)
    t = p.second_moment / p.dim + (-1) ** (seed % 2) * d1
    error = abs(matched_trace(p, t, m) - p.trace)
    for norm in (np.linalg.norm(p.mean), np.linalg.norm(m)):
        assert error <= SLACK * bounds.trace_matching_error(d1, d2, norm, p.alpha, p.sigma, p.dim) + rounding(p)


@MANY
@given(posteriors(), fractions, fractions)
def test_trace_matching_error_is_attained_when_the_errors_align(p, d1, d2):
    length = np.linalg.norm(p.mean)
    m = p.mean * (1 + p.sigma / p.alpha * d2 / length)
    error = matched_trace(p, p.second_moment / p.dim - d1, m) - p.trace
    bound = bounds.trace_matching_error(d1, d2, length, p.alpha, p.sigma, p.dim)
    assert error == pytest.approx(bound, rel=1e-9, abs=rounding(p))


def test_trace_matching_error_as_it_is_printed():
    a, s, d, m, d1, d2 = 0.6, 0.3, 7, 2.0, 0.01, 0.2
    printed = a**2 / s**4 * d * d1 + 2 * a * m / s**3 * d2 + d2**2 / s**2
    assert bounds.trace_matching_error(d1, d2, m, a, s, d) == pytest.approx(printed, rel=1e-14)


# 4.3


def local_loss(p, eps):
    """E[|eps - eps_th|^2 given x] from its definition, over the points that x may have come from."""
    return float(p.w @ np.sum((p.noise - eps) ** 2, axis=1))


@MANY
@given(posteriors(), fractions, fractions, seeds, st.sampled_from([-1.0, -0.3, 0.0, 0.3, 1.0]))
def test_local_loss_error_covers_networks_that_err_in_any_direction(p, d1, d2, seed, side):
    loss = local_loss(p, p.eps + d2 * direction(p.eps, seed)) + side * p.dim * d1
    error = float(local_loss_trace(np.array([loss]), p.sigma, p.dim)[0]) - p.trace
    slack = rounding(p) + 1e-12 * loss / p.sigma**2
    assert abs(error) <= SLACK * bounds.local_loss_error(d1, d2, p.sigma, p.dim) + slack
    assert error <= SLACK * p.dim * d1 / p.sigma**2 + slack


@MANY
@given(posteriors(), fractions, fractions, seeds)
def test_local_loss_error_is_attained_from_below(p, d1, d2, seed):
    loss = local_loss(p, p.eps + d2 * direction(p.eps, seed)) + p.dim * d1
    error = p.trace - float(local_loss_trace(np.array([loss]), p.sigma, p.dim)[0])
    bound = bounds.local_loss_error(d1, d2, p.sigma, p.dim)
    assert error == pytest.approx(bound, rel=1e-9, abs=rounding(p) + 1e-12 * loss / p.sigma**2)


def test_local_loss_is_second_order_where_trace_matching_is_first():
    halved = [bounds.local_loss_error(0.0, d2, 0.1, 3) for d2 in (1e-4, 5e-5)]
    assert halved[0] / halved[1] == pytest.approx(4)
    halved = [bounds.trace_matching_error(0.0, d2, 1.0, 1.0, 0.1, 3) for d2 in (1e-4, 5e-5)]
    assert halved[0] / halved[1] == pytest.approx(2, rel=1e-3)


# 4.5


def endpoint_difference(p, xh, m):
    f = EndpointFisher(xh[None, :], m[None, :], p.alpha, p.sigma, "paper").to_dense()[0]
    return np.linalg.norm(f - p.fisher)


def paper_endpoint_error(radius, d2, alpha, sigma):
    first = math.sqrt(2) * alpha**2 * radius**2 / sigma**4
    return first + 2 * alpha * radius * d2 / sigma**3 + d2**2 / sigma**2


@MANY
@given(posteriors(), st.floats(0, 3), seeds, st.booleans())
def test_endpoint_error_covers_every_end_point_in_the_ball(p, d2, seed, orthogonal):
    radius = float(np.max(np.linalg.norm(p.points, axis=1)))
    xh = radius * direction(p.mean, seed)
    if orthogonal and p.dim > 1:
        xh = radius * direction(xh - (xh @ p.mean) / (p.mean @ p.mean) * p.mean, 0)
    m = p.mean + p.sigma / p.alpha * d2 * direction(p.mean, seed // 3)
    bound = bounds.endpoint_error(radius, d2, p.alpha, p.sigma)
    assert endpoint_difference(p, xh, m) <= SLACK * bound + rounding(p)
    assert bound <= SLACK * paper_endpoint_error(radius, d2, p.alpha, p.sigma)


@pytest.mark.parametrize("d2", [0.0, 0.3, 4.0])
def test_endpoint_error_is_attained_by_a_point_at_right_angles_to_the_end(d2):
    alpha, sigma, radius = 0.8, 0.5, 3.0
    p = Posterior(np.array([[radius, 0.0]]), np.zeros(2), alpha, sigma)
    m = np.array([radius + sigma / alpha * d2, 0.0])
    bound = bounds.endpoint_error(radius, d2, alpha, sigma)
    assert endpoint_difference(p, np.array([0.0, radius]), m) == pytest.approx(bound, rel=1e-12)


def test_endpoint_error_improves_on_the_paper_where_both_terms_count():
    ratio = paper_endpoint_error(1.0, 1.0, 1.0, 1.0) / bounds.endpoint_error(1.0, 1.0, 1.0, 1.0)
    assert ratio == pytest.approx((math.sqrt(2) + 3) / math.sqrt(17))
    assert bounds.endpoint_error(2.0, 0.0, 1.0, 0.5) == pytest.approx(paper_endpoint_error(2.0, 0.0, 1.0, 0.5))


# 4.7


def symmetric(seed, d):
    a = np.random.default_rng(seed).standard_normal((d, d))
    return a + a.T


def hermite_grid(d):
    """Nodes and weights that integrate polynomials of degree 5 in each of d standard normals exactly."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = np.array(list(itertools.product(nodes, repeat=d)))
    mass = np.prod(np.array(list(itertools.product(weights / weights.sum(), repeat=d))), axis=1)
    return grid, mass


def sign_grid(d):
    grid = np.array(list(itertools.product([-1.0, 1.0], repeat=d)))
    return grid, np.full(len(grid), 1 / len(grid))


@pytest.mark.parametrize(("distribution", "grid"), [("rademacher", sign_grid), ("gaussian", hermite_grid)])
@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_hutchinson_variance_is_that_of_all_probes(distribution, grid, d):
    f = symmetric(d, d)
    probes, mass = grid(d)
    samples = np.einsum("ki,ij,kj->k", probes, f, probes)
    mean = mass @ samples
    assert mean == pytest.approx(np.trace(f), rel=1e-12)
    variance = bounds.hutchinson_variance(np.sum(f**2), np.sum(np.diag(f) ** 2), distribution)
    assert variance == pytest.approx(mass @ (samples - mean) ** 2, rel=1e-11, abs=1e-11)


# 4.8


def split(points, w, kept):
    """(delta, |m - m_S|, |P - P_S|) for weights w and the mask of what is kept."""

    def moments(w):
        m = w @ points / w.sum()
        centred = points - m
        return m, (w[:, None] * centred).T @ centred / w.sum()

    (m, p), (ms, ps) = moments(w), moments(w * kept)
    return float(w @ ~kept), np.linalg.norm(m - ms), np.linalg.norm(p - ps, 2)


def diameter(points):
    return float(np.max(np.linalg.norm(points[:, None, :] - points[None, :, :], axis=2)))


@MANY
@given(seeds, st.integers(2, 6), st.integers(1, 3), st.sampled_from([0.01, 1.0, 100.0]), st.booleans())
def test_dropped_components_move_mean_and_covariance_by_no_more_than_the_bounds(seed, n, d, scale, vertices):
    rng = np.random.default_rng(seed)
    points = scale * (rng.integers(0, 2, (n, d)) if vertices else rng.standard_normal((n, d))).astype(float)
    w = rng.dirichlet(np.full(n, rng.choice([0.1, 1.0])))
    kept = np.arange(n) < rng.integers(1, n)
    if w[kept].sum() < 1e-9:
        w = np.full(n, 1 / n)
    delta, mean_error, covariance_error = split(points, w, kept)
    mean_bound, covariance_bound = bounds.dropped_components(delta, diameter(points))
    assert mean_error <= SLACK * mean_bound + 1e-12 * scale
    assert covariance_error <= SLACK * covariance_bound + 1e-12 * scale**2


@pytest.mark.parametrize("delta", [0.0, 1e-6, 0.1, 0.5, 0.8, 0.999])
def test_dropped_components_bounds_are_attained(delta):
    points, far = np.array([[0.0], [2.0], [0.0]]), min(delta, 0.5)
    kept = np.array([True, False, False])
    mean_bound, covariance_bound = bounds.dropped_components(delta, 2.0)
    _, _, covariance_error = split(points, np.array([1 - delta, far, delta - far]), kept)
    assert covariance_error == pytest.approx(covariance_bound, rel=1e-12, abs=1e-15)
    _, mean_error, _ = split(points, np.array([1 - delta, delta, 0.0]), kept)
    assert mean_error == pytest.approx(mean_bound, rel=1e-12, abs=1e-15)


def test_dropped_components_bounds_grow_with_the_mass_and_stop_at_all_of_it():
    grid = np.linspace(0, 2, 201)
    mean_bound, covariance_bound = bounds.dropped_components(grid, 3.0)
    assert np.all(np.diff(mean_bound) >= 0) and np.all(np.diff(covariance_bound) >= 0)
    assert mean_bound[-1] == 3.0 and covariance_bound[-1] == 9.0 / 4
    pairs = [bounds.dropped_components(float(delta), 3.0) for delta in grid]
    np.testing.assert_allclose(np.array(pairs).T, [mean_bound, covariance_bound], rtol=1e-15)
    assert np.all(covariance_bound <= grid * 9.0)


@MANY
@given(st.lists(st.floats(-800, 800), max_size=6), st.lists(st.floats(-800, 800), min_size=1, max_size=4), fractions)
def test_omitted_mass_covers_what_was_left_out(left_out, kept, looseness):
    with mpmath.workdps(50):
        heavy = mpmath.fsum(mpmath.exp(v) for v in kept)
        light = mpmath.fsum(mpmath.exp(v) for v in left_out)
        truth = float(light / (heavy + light))
        sole = float(light / (mpmath.exp(max(kept)) + light))
    upper = np.array(left_out, dtype=float).reshape(-1) + looseness
    assert truth <= SLACK * bounds.omitted_mass(upper, max(kept)) + 1e-300
    assert bounds.omitted_mass(upper, max(kept)) <= 1
    attained = float(bounds.omitted_mass(upper - looseness, max(kept)))
    assert attained == pytest.approx(sole, rel=1e-9, abs=1e-300)


def test_omitted_mass_by_rows_with_nothing_and_everything_left_out():
    upper = np.array([[0.0, 0.0], [-np.inf, -np.inf], [1e6, -np.inf], [-1e6, -np.inf]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = bounds.omitted_mass(upper, np.array([0.0, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(result, [2 / 3, 0, 1, 0], rtol=1e-15)
    assert bounds.omitted_mass(np.zeros((3, 0)), 0.0).tolist() == [0, 0, 0]
    assert bounds.omitted_mass(np.full(5, -3.0), 0.0) <= 5 * math.exp(-3)
    assert bounds.omitted_mass(np.full(5, -30.0), 0.0) == pytest.approx(5 * math.exp(-30), rel=1e-9)


# 4.9


@MANY
@given(seeds, st.integers(1, 8), st.floats(0, 5), st.sampled_from([0.1, 30.0]))
def test_weight_factor_covers_any_errors_in_the_logits(seed, n, e, spread):
    rng = np.random.default_rng(seed)
    logits = spread * rng.standard_normal(n)
    off = rng.choice([-e, e], n)
    w, v = (np.exp(a - a.max() - np.log(np.sum(np.exp(a - a.max())))) for a in (logits, logits + off))
    factor = bounds.weight_factor(e) * SLACK
    assert np.all(v <= w * factor) and np.all(w <= v * factor)


def test_weight_factor_is_approached_by_a_light_component():
    e = 0.7
    light, heavy = math.exp(-30), 1.0
    before = light / (light + heavy)
    after = light * math.exp(e) / (light * math.exp(e) + heavy * math.exp(-e))
    assert after / before == pytest.approx(bounds.weight_factor(e), rel=1e-9)


def test_weight_factor_overflows_quietly_and_passes_nan():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bounds.weight_factor(1e4) == math.inf
        result = bounds.weight_factor(np.array([0.0, 1.0, 1e4, np.inf, np.nan]))
    np.testing.assert_allclose(result, [1, math.exp(2), np.inf, np.inf, np.nan], rtol=1e-15)


# 1.6, 1.7


@MANY
@given(posteriors())
def test_fisher_spectrum_holds_the_eigenvalues(p):
    lower, upper = bounds.fisher_spectrum(diameter(p.points), p.alpha, p.sigma)
    values = np.linalg.eigvalsh(p.fisher)
    assert np.all(values >= lower - rounding(p)) and np.all(values <= upper + rounding(p))


def test_fisher_spectrum_is_attained_by_two_equal_points():
    p = Posterior(np.array([[-1.0, 0.0], [2.0, 4.0]]), np.array([0.5, 2.0]) * 0.9, 0.9, 0.4)
    np.testing.assert_allclose(np.linalg.eigvalsh(p.fisher), bounds.fisher_spectrum(5.0, 0.9, 0.4), rtol=1e-12)


@MANY
@given(posteriors())
def test_posterior_trace_in_ball_holds(p):
    radius = float(np.max(np.linalg.norm(p.points, axis=1)))
    bound = bounds.posterior_trace_in_ball(radius, float(np.linalg.norm(p.mean)))
    assert np.trace(p.covariance) <= bound + 1e-13 * (radius**2 + 1)


def test_posterior_trace_in_ball_is_attained_on_the_sphere():
    sphere = np.array([[3.0, 0.0], [0.0, 3.0], [-3.0, 0.0]])
    p = Posterior(sphere, np.array([0.3, 0.4]), 1.0, 2.0)
    bound = bounds.posterior_trace_in_ball(3.0, np.linalg.norm(p.mean))
    assert np.trace(p.covariance) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 4), (3, 5), (6, 2), (5, 4)])
def test_fisher_rank_is_attained_by_points_in_general_position(n, d):
    points = np.random.default_rng(7).standard_normal((n, d))
    p = Posterior(points, np.zeros(d), 1.0, 2.0)
    assert np.linalg.matrix_rank(p.covariance, tol=1e-9) == bounds.fisher_rank(n, d) == min(d, n - 1)


# Numbers and arrays


CALLS = {
    "trace_matching_error": lambda v: bounds.trace_matching_error(v, v, v, v, v, 3),
    "local_loss_error": lambda v: bounds.local_loss_error(v, v, v, 3),
    "endpoint_error": lambda v: bounds.endpoint_error(v, v, v, v),
    "hutchinson_variance": lambda v: bounds.hutchinson_variance(v, 0.25 * v),
    "dropped_components": lambda v: bounds.dropped_components(v, v),
    "weight_factor": lambda v: bounds.weight_factor(v),
    "fisher_spectrum": lambda v: bounds.fisher_spectrum(v, v, v),
    "posterior_trace_in_ball": lambda v: bounds.posterior_trace_in_ball(v, 0.5 * v),
}
LIBRARIES = {"numpy": np, "array-api-strict": array_api_strict, "torch": torch}


def parts(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", CALLS)
def test_arrays_give_what_numbers_give_in_their_own_namespace_and_dtype(name, library, dtype):
    xp, values = LIBRARIES[library], [0.3, 0.5, 2.0]
    results = parts(CALLS[name](xp.asarray(values, dtype=getattr(xp, dtype))))
    expected = zip(*(parts(CALLS[name](v)) for v in values), strict=True)
    for result, numbers in zip(results, expected, strict=True):
        assert type(result) is type(xp.asarray(values)) and result.dtype == getattr(xp, dtype)
        np.testing.assert_allclose(result.tolist() if xp is torch else np.asarray(result), numbers, rtol=3e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_omitted_mass_in_every_namespace(library):
    xp = LIBRARIES[library]
    upper = xp.asarray([[-1.0, -2.0], [3.0, -math.inf]], dtype=xp.float64)
    result = bounds.omitted_mass(upper, xp.asarray([0.0, 1.0], dtype=xp.float64))
    q = [math.exp(-1) + math.exp(-2), math.exp(2)]
    np.testing.assert_allclose(np.asarray(result), [v / (1 + v) for v in q], rtol=1e-14)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bounds.trace_matching_error(-1.0, 0, 0, 1, 1, 2), ValueError, "d1 must be zero or positive, got -1"),
        (lambda: bounds.trace_matching_error(0.0, 0, 0, 1, 0.0, 2), ValueError, "sigma must be positive, got 0"),
        (lambda: bounds.trace_matching_error(0.0, 0, 0, 1, 1, 0), ValueError, "dim must be a positive integer"),
        (lambda: bounds.local_loss_error("much", 0, 1, 2), TypeError, "d1 must be a number or an array, got str"),
        (lambda: bounds.endpoint_error(np.array([1.0, -2.0]), 0, 1, 1), ValueError, "radius .* got -2 in row 1"),
        (lambda: bounds.endpoint_error(1, 0, True, 1), TypeError, "alpha must be a number"),
        (lambda: bounds.hutchinson_variance(1, 1, "radmacher"), ValueError, "did you mean 'rademacher'"),
        (lambda: bounds.omitted_mass([1.0], 0.0), TypeError, "upper_logits must be an array"),
        (lambda: bounds.omitted_mass(torch.tensor(1.0), 0.0), ValueError, r"upper_logits must have shape \(..., n\)"),
        (lambda: bounds.fisher_rank(0, 3), ValueError, "components must be a positive integer"),
        (lambda: bounds.weight_factor(-0.1), ValueError, "logit_error must be zero or positive"),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
