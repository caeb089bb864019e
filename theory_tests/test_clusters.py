"""Clusters with radii: what a ball's distance leaves out does not matter, and results stay what they are."""

from __future__ import annotations

import numpy as np
import pytest
from clouds import asked, cloud, clouds, exact_logits
from dfmath.backends import clusters as rooms
from dfmath.backends import numba_cpu
from dfmath.backends.clusters import make_clusters
from dfmath.backends.index import index_of
from dfmath.backends.threaded import threads
from hypothesis import given, settings
from hypothesis import strategies as st

import dfmath.flow
from dfmath import GaussianMixture, PointMasses, backends, probability_flow


@given(**clouds, clusters=st.integers(1, 12), uneven=st.sampled_from([0.0, 10.0]), far=st.sampled_from([0.0, 1.0, 1e3]))
@settings(max_examples=250)
def test_what_is_left_out_does_not_matter(seed, count, dim, offset, scale, noise, dtype, clusters, uneven, far):
    """Everything left out is lighter than the best by exp(-cut), and every row says what it holds [MATH 4.8]."""
    points = cloud(seed, count, dim, offset, scale, dtype)
    rng, alpha, sigma = np.random.default_rng(seed + 1), 0.7, scale * noise
    x = alpha * points[rng.integers(len(points), size=3)].astype(np.float64)
    x += max(sigma, far * scale) * rng.standard_normal((3, dim))
    weights = np.exp(uneven * rng.standard_normal(len(points))) * (rng.random(len(points)) > 0.1)
    weights = weights / weights.sum() if weights.any() else None
    ask = asked(points, x, alpha, sigma, tolerance=1e-9, weights=weights)
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.setattr(rooms, "FEWEST", 24)
        few, listed = make_clusters(ask.about_index, min(clusters, len(points)), seed).near(
            ask, numba_cpu._problem(ask)
        )
    assert few.all()
    exact = exact_logits(points, ask.components.log_weights[0], ask.queries, alpha, sigma)
    for row, held in enumerate(listed):
        held = held[held >= 0]
        assert len(set(held)) == len(held)
        left_out = np.setdiff1d(np.arange(len(points)), held)
        assert (exact[row, left_out] <= exact[row].max() - ask.cut[row]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_balls_hold_their_points(dtype):
    points = cloud(3, 500, 7, 1e4, 1.0, dtype)
    found = make_clusters(asked(points, points[:1], 1.0, 0.1).about_index, 40, seed=0)
    assert sorted(found.members.order) == list(range(len(points)))
    for centre, radius, start, stop in zip(
        found.centres, found.radii, found.members.starts[:-1], found.members.starts[1:], strict=True
    ):
        own = points[found.members.order[start:stop]].astype(np.longdouble)
        distances = np.sqrt(((own - centre) ** 2).sum(axis=1))
        assert distances.max() <= radius <= 1.001 * distances.max() + 1e-10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0, np.geomspace(0.01, 10.0, 16)])
def test_results_do_not_change(dtype, sigma):
    """Beside the array-API reference, at noise levels where all, some and none of the points are left out."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((2000, 3)).astype(dtype)
    prior = PointMasses(points, weights=rng.random(2000)).cluster()
    x = prior.diffuse(1.0, sigma).sample(16, seed=0)
    found = prior.diffuse(1.0, sigma)
    with backends.use("array-api"):
        truth = PointMasses(points.astype(np.float64), prior.weights).diffuse(1.0, sigma)
        wanted = [truth.posterior_mean(x.astype(np.float64)), truth.fisher(x.astype(np.float64)).trace()]
    rtol = 1e-5 if dtype == np.float32 else 1e-10
    np.testing.assert_allclose(found.posterior_mean(x), wanted[0], rtol=rtol, atol=rtol)
    np.testing.assert_allclose(found.fisher(x).trace(), wanted[1], rtol=rtol, atol=rtol * 3 / np.min(sigma) ** 2)


def test_few_components_are_looked_at():
    points = np.random.default_rng(0).standard_normal((5000, 2))
    x = points[:32] + 0.01
    kept = PointMasses(points).cluster().diffuse(1.0, 0.01).evaluate(x, ["trace"])
    assert (kept.exact_components < 500).all()


@pytest.mark.parametrize("clustered", [1, 3, 10**6])
@pytest.mark.parametrize("points", [np.zeros((1, 2)), np.zeros((9, 2)), np.eye(3)])
def test_small_data(points, clustered):
    prior = PointMasses(points).cluster(clustered)
    x = points[:1] + 0.1
    wanted = PointMasses(points).diffuse(1.0, 0.1).posterior_mean(x)
    np.testing.assert_allclose(prior.diffuse(1.0, 0.1).posterior_mean(x), wanted, rtol=1e-12)


def test_flows_do_not_change(monkeypatch):
    """Clusters come before lists, and lists where clusters leave too much."""
    points = np.random.default_rng(0).standard_normal((5000, 2))
    z = PointMasses(points).diffuse(1.0, 2.0).sample(4, seed=0)
    found = probability_flow(PointMasses(points).cluster(), z, 2.0, 1e-3, jacobian=True)
    monkeypatch.setattr(dfmath.flow, "memory_for", lambda *_: None)
    wanted = probability_flow(PointMasses(points), z, 2.0, 1e-3, jacobian=True)
    np.testing.assert_allclose(found.x, wanted.x, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found.jacobian, wanted.jacobian, rtol=1e-6, atol=1e-8)


def test_the_same_seed_gives_the_same_clusters():
    points = np.random.default_rng(0).standard_normal((400, 2))
    found = [make_clusters(asked(points, points[:1], 1.0, 0.1).about_index, 9, seed).radii for seed in (1, 1, 2)]
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].shape != found[2].shape or (found[0] != found[2]).any()


def test_kernel_density_estimates_have_clusters_and_mixtures_do_without():
    points = np.random.default_rng(0).standard_normal((300, 2))
    estimate = GaussianMixture(points, 0.1).cluster()
    assert index_of(estimate.components).clusters.count == round(2 * np.sqrt(300))
    wide = GaussianMixture(points, np.linspace(0.1, 0.2, 300))
    assert wide.cluster() is wide


@pytest.mark.parametrize(("count", "seed", "word"), [(0, 0, "count"), (1.5, 0, "count"), (3, -1, "seed")])
def test_bad_input(count, seed, word):
    with pytest.raises((TypeError, ValueError), match=word):
        PointMasses(np.zeros((2, 1))).cluster(count, seed)
