"""Priors: normalised weights, and samples whose moments are the exact ones [MATH 1.3-1.5].

Samples are compared along fixed directions, where first and second moments of a mixture and the variances of their
estimates are known in closed form; six standard errors are allowed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import FORMS, NUMBA, SINGULAR_FORMS, Problem, assert_matches, mixture_problem, numbers
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import multivariate_normal
from strategies import problems

from dfmath import GaussianMixture, LowRank, PointMasses
from dfmath import draws as draws_module

DIRECTIONS = np.array(
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, -1.0], [1.0, -2.0, 3.0]]
)
COUNT = 40_000


def problem_of(form, sigma=0.7, alpha=0.9):
    problem = mixture_problem("zero" if form is None else form, sigma, seed=8, alpha=alpha)
    return replace(problem, covariances=None) if form is None else problem


def check_moments(samples, weights, means, covariances):
    """First and second moments of u . x for each direction u, within six standard errors of their exact values."""
    projected = samples @ DIRECTIONS.T
    m = means @ DIRECTIONS.T  # (K, directions)
    s2 = np.einsum("ui,kij,uj->ku", DIRECTIONS, covariances, DIRECTIONS)
    moments = [m, m**2 + s2, None, m**4 + 6 * m**2 * s2 + 3 * s2**2]
    first, second, fourth = (weights @ moment for moment in (moments[0], moments[1], moments[3]))
    n = len(samples)
    for got, exact, variance in [
        (projected.mean(axis=0), first, second - first**2),
        ((projected**2).mean(axis=0), second, fourth - second**2),
    ]:
        allowed = 6 * np.sqrt(variance.clip(0) / n) + 1e-12 * np.abs(exact)
        assert (np.abs(got - exact) <= allowed).all(), f"{(got - exact) / allowed * 6} standard errors"


def posterior(problem, b):
    """Weights, means and covariances of x0 given x, as MATH 1.5 prints them."""
    a, s = (float(level[b]) for level in problem.levels)
    c, x, eye = problem.dense_covariances, problem.x[b], np.eye(3)
    spread = a**2 * c + s**2 * eye
    r = x - a * problem.centres
    gain = a * c @ np.linalg.inv(spread)
    means = problem.centres + np.einsum("kij,kj->ki", gain, r)
    square = np.einsum("ki,kij,kj->k", r, np.linalg.inv(spread), r)
    weights = softmax(problem.logs - 0.5 * (square + np.linalg.slogdet(spread)[1]))
    return weights, means, c - a * gain @ c


# Weights


@given(problems(), st.sampled_from(["float64", "float32"]))
def test_weights_are_normalised(problem, dtype):
    weights = problem.as_dtype(dtype).prior(NUMBA, dtype).weights
    assert weights.shape == (len(problem.centres),) and (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0, abs=1e-14)
    np.testing.assert_allclose(weights, softmax(problem.as_dtype(dtype).logs), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("factor", [1e-200, 1.0, 1e200])
def test_weights_of_any_size_are_normalised(factor):
    prior = PointMasses(np.eye(3), weights=factor * np.array([1.0, 0.0, 3.0]))
    np.testing.assert_allclose(prior.weights, [0.25, 0.0, 0.75], rtol=1e-12)  # the logarithms are up to 460


def test_many_equal_weights_are_uniform():
    np.testing.assert_allclose(PointMasses(np.zeros((7, 2))).weights, np.full(7, 1 / 7), rtol=1e-15)


def test_shape_dtype_and_count(xp_kind, dtype):
    problem = problem_of("full")
    prior = problem.prior(xp_kind, dtype)
    assert (prior.dim, prior.count) == (3, 3)
    assert prior.dtype == xp_kind.put(np.zeros(1), dtype).dtype


def test_points_are_kept_not_copied():
    points = np.eye(3)
    assert PointMasses(points).points is points


# Samples


@pytest.mark.parametrize("form", [None, *FORMS, *SINGULAR_FORMS])
def test_samples_of_the_prior(form):
    problem = problem_of(form)
    weights = softmax(problem.logs)
    check_moments(problem.prior().sample(COUNT, seed=1), weights, problem.centres, problem.dense_covariances)


@pytest.mark.parametrize("form", [None, *FORMS, *SINGULAR_FORMS])
def test_samples_of_the_noised_density(form):
    problem = problem_of(form)
    spread = 0.9**2 * problem.dense_covariances + 0.7**2 * np.eye(3)
    check_moments(problem.marginal().sample(COUNT, seed=2), softmax(problem.logs), 0.9 * problem.centres, spread)


@pytest.mark.parametrize("form", [None, *FORMS, *SINGULAR_FORMS])
def test_samples_of_the_posterior(form):
    """Each query has its own noise level."""
    problem = problem_of(form, np.array([0.3, 0.8, 2.0]), np.array([1.0, 0.6, 0.3]))
    samples = problem.marginal().sample_posterior(problem.x, COUNT, seed=3)
    assert samples.shape == (3, COUNT, 3)
    for b in range(3):
        check_moments(samples[b], *posterior(problem, b))


@pytest.mark.parametrize("form", [None, "full", "low-rank"])
def test_every_kind_of_array_gives_the_same_samples(form, xp_kind, dtype):
    problem = problem_of(form).as_dtype(dtype)
    prior, expected = problem.prior(xp_kind, dtype), problem.prior(NUMBA)
    like = xp_kind.put(problem.x, dtype)
    rtol = 1e-5 if xp_kind.unit > 1e-10 else 4 * float(np.finfo(dtype).eps)
    assert_matches(prior.sample(50, 4), expected.sample(50, 4), 20 * rtol, 1.0, like=like)
    q, expected = problem.marginal(xp_kind, dtype), problem.marginal()
    assert_matches(q.sample(50, 4), expected.sample(50, 4), 20 * rtol, 1.0, like=like)
    samples = expected.sample_posterior(problem.x, 20, 4)
    assert_matches(q.sample_posterior(like, 20, 4), samples, 20 * rtol, 1.0, like=like)


@pytest.mark.parametrize("form", ["full", "low-rank"])
def test_samples_do_not_depend_on_signs_of_eigenvectors(form):
    """Which sign an eigenvector or a singular vector gets is up to the library, and to its number of threads."""
    problem = problem_of(form)
    normals, extra = (
        np.random.default_rng(0).standard_normal((3, 3, width)) for width in (3, problem.prior().components.rank)
    )
    found = problem.prior().components
    here = found.at(problem.x, np.full((3, 1, 1), 0.9), np.full((3, 1, 1), 0.7))
    draws = here.draw(normals, extra)
    signs = np.array([1.0, -1.0, -1.0])
    if form == "full":
        other = replace(found, basis=found.basis * signs)
        np.testing.assert_allclose(other.draw_prior(normals, extra), found.draw_prior(normals, extra), rtol=1e-12)
        again = other.at(problem.x, here.alpha, here.sigma).draw(normals, extra)
    else:
        here.basis = here.basis * signs[: here.basis.shape[3]]
        here.inside = here.inside * signs[: here.basis.shape[3]]
        here.turn = here.turn * signs[: here.turn.shape[2], None]
        again = here.draw(normals, extra)
    np.testing.assert_allclose(again, draws, rtol=1e-10)
    assert np.abs(draws).max() > 0.1


def test_seeds_decide():
    problem = problem_of("full")
    prior, q = problem.prior(), problem.marginal()
    for draw in (prior.sample, q.sample, lambda n, seed: q.sample_posterior(problem.x, n, seed)):
        np.testing.assert_array_equal(draw(10, 5), draw(10, 5))
        assert not np.isclose(draw(10, 5), draw(10, 6)).any()


def test_noise_does_not_depend_on_what_it_is_added_to():
    """The two streams of one seed are independent: no correlation between any coordinates of x0 and eps."""
    prior = GaussianMixture(np.zeros((1, 3)), 1.0)
    clean = prior.sample(COUNT, 7)
    noise = (prior.diffuse(0.9, 0.7).sample(COUNT, 7) - 0.9 * clean) / 0.7
    np.testing.assert_array_less(np.abs(clean.T @ noise) / COUNT, 6 / COUNT**0.5)
    np.testing.assert_array_less(np.abs(noise.T @ noise / COUNT - np.eye(3)), 6 * (2 / COUNT) ** 0.5)


def test_each_sample_of_the_noised_density_has_its_own_level():
    levels = np.repeat([[1.0, 0.1], [0.2, 5.0]], COUNT // 2, axis=0)
    samples = problem_of(None).prior().diffuse(levels[:, 0].copy(), levels[:, 1].copy()).sample(COUNT, 8)
    weights, centres = softmax(problem_of(None).logs), problem_of(None).centres
    for half, (alpha, sigma) in enumerate([(1.0, 0.1), (0.2, 5.0)]):
        part = samples[half * COUNT // 2 : (half + 1) * COUNT // 2]
        check_moments(part, weights, alpha * centres, np.stack([sigma**2 * np.eye(3)] * 3))


@pytest.mark.parametrize("form", [None, "full"])
def test_components_without_weight_are_never_drawn(form):
    problem = replace(problem_of(form), log_weights=np.array([-np.inf, 0.0, -np.inf]))
    alone = replace(problem, centres=problem.centres[1:2], log_weights=np.zeros(1))
    if form == "full":
        alone = replace(alone, covariances=problem.covariances[1:2])
    np.testing.assert_allclose(problem.prior().sample(100, 0), alone.prior().sample(100, 0), rtol=1e-12)
    x = problem.x
    np.testing.assert_allclose(
        problem.marginal().sample_posterior(x, 100, 0), alone.marginal().sample_posterior(x, 100, 0), rtol=1e-9
    )


def test_posterior_draws_come_in_proportion_at_low_noise(xp_kind):
    """Weights 1:3 of two points at equal distance, and none of a third far away."""
    dtype = xp_kind.dtypes[0]
    points = xp_kind.put(np.array([[1.0], [-1.0], [5.0]]), dtype)
    prior = PointMasses(points, weights=xp_kind.put(np.array([1.0, 3.0, 1e6]), dtype))
    draws = numbers(prior.diffuse(1.0, 0.05).sample_posterior(xp_kind.put(np.zeros((1, 1)), dtype), 4000, 9))
    assert set(np.unique(draws)) == {-1.0, 1.0}
    assert abs((draws == 1.0).mean() - 0.25) <= 6 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize("form", [None, "full", "low-rank"])
def test_chunks_do_not_show_in_samples(form, monkeypatch):
    """Samples are drawn in blocks of bounded memory; their seams keep the distribution, and order."""
    monkeypatch.setattr(draws_module, "_CHUNK", 9 * 100)
    problem = problem_of(form)
    check_moments(problem.prior().sample(COUNT, 1), softmax(problem.logs), problem.centres, problem.dense_covariances)
    draws = problem.marginal().sample_posterior(problem.x, 4001, 2)
    for b in range(3):
        check_moments(draws[b], *posterior(problem, b))


def test_posterior_draws_over_many_tiles():
    """More components than a tile holds: cumulative weights carry over from tile to tile."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((100_000, 3))
    problem = Problem(points, 0.5 * points[:2], np.zeros((2, 3)), 0.5, 1.0)
    draws = problem.marginal().sample_posterior(problem.x, 2000, 3)
    for b in range(2):
        logits = -0.5 * np.sum((problem.x[b] - 0.5 * points) ** 2, axis=1)
        check_moments(draws[b], softmax(logits), points, np.zeros((1, 3, 3)))


# Other ways in


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical", "tied"])
def test_mixtures_fitted_by_scikit_learn(covariance_type):
    """Same density as scikit-learn's own `score_samples`."""
    adapters = pytest.importorskip("dfmath.integrations.sklearn")
    from sklearn.mixture import GaussianMixture as Fitted

    data = np.random.default_rng(0).standard_normal((300, 3)) @ np.diag([1.0, 0.5, 2.0]) + np.array([3.0, 0.0, -1.0])
    fitted = Fitted(3, covariance_type=covariance_type, random_state=0).fit(data)
    prior = adapters.mixture_from_sklearn(fitted)
    density = prior.diffuse(1.0, 0.0).log_density(data[:20])
    np.testing.assert_allclose(density, fitted.score_samples(data[:20]), rtol=1e-10)


@pytest.mark.parametrize("form", ["scalar", "diagonal", "full", "low-rank"])
def test_mixtures_for_scikit_learn(form):
    """Its own density, responsibilities and precisions, of the prior's components."""
    adapters = pytest.importorskip("dfmath.integrations.sklearn")
    problem = problem_of(form)
    prior = problem.prior()
    fitted = adapters.mixture_to_sklearn(prior)
    q = prior.diffuse(1.0, 0.0)
    np.testing.assert_allclose(fitted.score_samples(problem.x), q.log_density(problem.x), rtol=1e-9)
    shares = fitted.predict_proba(problem.x)
    parts = [multivariate_normal(m, c) for m, c in zip(problem.centres, problem.dense_covariances, strict=True)]
    wanted = softmax(problem.logs) * np.stack([part.pdf(problem.x) for part in parts], axis=1)
    np.testing.assert_allclose(shares, wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-8, atol=1e-12)
    again = adapters.mixture_from_sklearn(fitted)
    np.testing.assert_allclose(
        again.diffuse(0.9, 0.7).score(problem.x), prior.diffuse(0.9, 0.7).score(problem.x), rtol=1e-9
    )


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical", "tied"])
def test_mixtures_of_scikit_learn_return_as_they_were(covariance_type):
    """With every fitted array and count of parameters; a shared matrix comes back as one for each component."""
    adapters = pytest.importorskip("dfmath.integrations.sklearn")
    from sklearn.mixture import GaussianMixture as Fitted

    data = np.random.default_rng(0).standard_normal((300, 3)) @ np.diag([1.0, 0.5, 2.0]) + np.array([3.0, 0.0, -1.0])
    fitted = Fitted(3, covariance_type=covariance_type, random_state=0).fit(data)
    again = adapters.mixture_to_sklearn(adapters.mixture_from_sklearn(fitted))
    shared = covariance_type == "tied"
    assert again.covariance_type == ("full" if shared else covariance_type)
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        wanted = getattr(fitted, name)
        wanted = np.repeat(wanted[None], 3, axis=0) if shared and name[:3] in ("cov", "pre") else wanted
        np.testing.assert_allclose(getattr(again, name), wanted, rtol=1e-9, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(again.score_samples(data), fitted.score_samples(data), rtol=1e-10)
    more = 2 * 6 * np.log(len(data)) if shared else 0.0  # two more matrices of six numbers
    assert again.bic(data) == pytest.approx(fitted.bic(data) + more, rel=1e-10)


@pytest.mark.parametrize("covariances", [0.7, np.array([0.7, 0.7, 0.7])], ids=["shared", "each"])
def test_spherical_mixtures_for_scikit_learn(covariances):
    """One variance for each component, and so many parameters."""
    adapters = pytest.importorskip("dfmath.integrations.sklearn")
    prior = GaussianMixture(np.random.default_rng(0).standard_normal((3, 4)), covariances)
    fitted = adapters.mixture_to_sklearn(prior)
    assert fitted.covariance_type == "spherical"
    np.testing.assert_array_equal(fitted.covariances_, np.full(3, 0.7))
    np.testing.assert_allclose(fitted.precisions_, np.full(3, 1.0 / 0.7))
    x = prior.sample(50, 0)
    density = prior.diffuse(1.0, 0.0).log_density(x)
    np.testing.assert_allclose(fitted.score_samples(x), density, rtol=1e-9)
    parameters = 3 * 4 + 3 + 2
    assert fitted.bic(x) == pytest.approx(parameters * np.log(50) - 2.0 * density.sum(), rel=1e-9)


def test_singular_mixtures_are_not_for_scikit_learn():
    adapters = pytest.importorskip("dfmath.integrations.sklearn")
    for covariances in (0.0, np.zeros((2, 3, 3))):
        with pytest.raises(ValueError, match="positive volume"):
            adapters.mixture_to_sklearn(GaussianMixture(np.zeros((2, 3)), covariances))
    with pytest.raises(TypeError, match="prior must be an instance"):
        adapters.mixture_to_sklearn(PointMasses(np.eye(3)))


def test_files(tmp_path):
    """What is saved is what is read."""
    problem = problem_of("full")
    np.save(tmp_path / "points.npy", problem.centres)
    weights = np.array([1.0, 2.0, 3.0])
    np.savez(tmp_path / "weighted.npz", points=problem.centres, weights=weights)
    np.savez(tmp_path / "mixture.npz", means=problem.centres, covariances=problem.covariances, weights=weights)
    for read, same in [
        (PointMasses.from_file(tmp_path / "points.npy"), PointMasses(problem.centres)),
        (PointMasses.from_file(tmp_path / "weighted.npz"), PointMasses(problem.centres, weights)),
        (
            GaussianMixture.from_file(tmp_path / "mixture.npz"),
            GaussianMixture(problem.centres, problem.covariances, weights),
        ),
    ]:
        np.testing.assert_array_equal(read.diffuse(0.9, 0.7).score(problem.x), same.diffuse(0.9, 0.7).score(problem.x))


def test_low_rank_is_diagonal_plus_factors():
    """Two ways to say the same covariance."""
    problem = problem_of("low-rank")
    diagonal, factors = problem.covariances
    dense = GaussianMixture(problem.centres, problem.dense_covariances, log_weights=problem.log_weights)
    low = GaussianMixture(problem.centres, LowRank(diagonal, factors), log_weights=problem.log_weights)
    x = problem.x
    np.testing.assert_allclose(low.diffuse(0.9, 0.7).score(x), dense.diffuse(0.9, 0.7).score(x), rtol=1e-12)
