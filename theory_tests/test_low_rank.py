"""Matrices that differ from a multiple of the identity by low rank: found where they do, refused where they do not."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_matches, numbers
from scipy.linalg import eigh

from dfmath import GaussianMixture, PointMasses

DIM, SIGMA, ALPHA = 150, 0.02, 0.9


def setting(kind, dtype, variance):
    """Groups of five near points each: four dimensions, at most, in which F is not a multiple of the identity."""
    rng = np.random.default_rng(0)
    points = np.repeat(rng.standard_normal((12, DIM)), 5, axis=0) + 1e-3 * rng.standard_normal((60, DIM))
    x = ALPHA * points[::20] + SIGMA * rng.standard_normal((3, DIM))
    points, x = points.astype(dtype), x.astype(dtype)
    prior = (
        PointMasses(kind.put(points, dtype)) if variance is None else GaussianMixture(kind.put(points, dtype), variance)
    )
    return prior.diffuse(ALPHA, SIGMA).fisher(kind.put(x, dtype)), dense(points, x, variance or 0.0)


def dense(points, x, variance):
    """F from the definition, in extended precision for the weights."""
    points, x = points.astype(np.longdouble), x.astype(np.longdouble)
    s = np.longdouble(ALPHA) ** 2 * variance + np.longdouble(SIGMA) ** 2
    logits = -((x[:, None] - np.longdouble(ALPHA) * points) ** 2).sum(axis=2) / (2 * s)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    centred = points - (weights[:, :, None] * points).sum(axis=1, keepdims=True)
    scaled = (np.sqrt(weights)[:, :, None] * centred * np.longdouble(ALPHA) / s).astype(np.float64)
    return np.eye(DIM) / float(s) - np.swapaxes(scaled, 1, 2) @ scaled


@pytest.mark.parametrize("variance", [None, 1e-5])
def test_fisher_by_few_vectors(xp_kind, dtype, variance):
    fisher, wanted = setting(xp_kind, dtype, variance)
    like, rtol = fisher.matvec(xp_kind.put(np.zeros((3, DIM)), dtype)), 1e-5 if dtype == "float32" else 1e-10
    found = fisher.low_rank()
    assert found is not None and found.vectors.shape[2] < DIM // 8
    assert (numbers(found.values).min(axis=1) < -0.05 * numbers(found.shift)).all()  # there is something to find
    values = np.linalg.eigvalsh(wanted)
    assert_matches(fisher.eigvalsh(), values, rtol, like=like)
    assert_matches(fisher.logdet(), np.linalg.slogdet(wanted)[1], rtol, like=like)
    v = np.random.default_rng(1).standard_normal((3, DIM))
    assert_matches(
        fisher.solve(xp_kind.put(v, dtype)), np.linalg.solve(wanted, v[:, :, None])[:, :, 0], 20 * rtol, like=like
    )
    values, vectors = (numbers(part) for part in fisher.eigh())
    transposed = np.swapaxes(vectors, 1, 2)
    np.testing.assert_allclose(transposed @ vectors - np.eye(DIM), 0.0, atol=10 * rtol)
    np.testing.assert_allclose(
        (vectors * values[:, None, :]) @ transposed / wanted.max(), wanted / wanted.max(), atol=rtol
    )


def test_posterior_covariance_by_few_vectors(xp_kind, dtype):
    fisher, wanted = setting(xp_kind, dtype, 1e-5)
    p = fisher.posterior_covariance()
    true = SIGMA**2 / ALPHA**2 * (np.eye(DIM) - SIGMA**2 * wanted)
    assert p.low_rank() is not None
    like, rtol = fisher.matvec(xp_kind.put(np.zeros((3, DIM)), dtype)), 1e-4 if dtype == "float32" else 1e-9
    assert_matches(p.eigvalsh(), np.linalg.eigvalsh(true), rtol, like=like)
    assert_matches(p.logdet(), np.linalg.slogdet(true)[1], rtol, like=like)


def test_singular_covariances_of_points(xp_kind, dtype):
    """Fewer vectors than dimensions: log det is -inf, and solve says so."""
    p = setting(xp_kind, dtype, None)[0].posterior_covariance()
    assert p.low_rank() is not None
    assert (numbers(p.logdet()) == -np.inf).all()
    with pytest.raises(ValueError, match="not singular"):
        p.solve(xp_kind.put(np.ones((3, DIM)), dtype))


@pytest.mark.parametrize(
    ("dim", "sigma", "variance"), [(150, 3.0, None), (100, 1e-3, None), (150, 1e-3, np.linspace(0.1, 0.2, 300))]
)
def test_high_rank_is_refused(dim, sigma, variance):
    """High noise, few dimensions, and components that differ: matrices are dense, and results are theirs."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((300, dim))
    prior = PointMasses(points) if variance is None else GaussianMixture(points, variance)
    fisher = prior.diffuse(1.0, sigma).fisher(points[:2] + sigma * rng.standard_normal((2, dim)))
    assert fisher.low_rank() is None
    np.testing.assert_allclose(fisher.eigvalsh(), np.linalg.eigvalsh(fisher.to_dense()), rtol=1e-12)


def test_dimensions_whose_matrices_would_not_fit():
    """One point in 200,000 dimensions: F is I/sigma^2, and nothing of the size of a matrix is made."""
    fisher = PointMasses(np.zeros((1, 200_000))).diffuse(1.0, 0.5).fisher(np.ones((1, 200_000)))
    np.testing.assert_allclose(fisher.eigvalsh(), 4.0, rtol=1e-14)
    np.testing.assert_allclose(fisher.logdet(), 200_000 * np.log(4.0), rtol=1e-13)
    np.testing.assert_allclose(fisher.solve(np.ones((1, 200_000))), 0.25, rtol=1e-14)


def test_eigenvalues_agree_with_a_generalised_solver():
    """Against SciPy's symmetric solver on the dense matrix, for a rank just below what is looked for and just above."""
    rng = np.random.default_rng(0)
    for rank in (15, 30):
        points = np.zeros((rank + 1, 260))
        points[:, : rank + 1] = 1e-2 * np.eye(rank + 1)
        fisher = PointMasses(points).diffuse(1.0, 0.02).fisher(0.02 * rng.standard_normal((1, 260)))
        assert fisher.low_rank().vectors.shape[2] == (16 if rank == 15 else 32)
        np.testing.assert_allclose(fisher.eigvalsh()[0], eigh(fisher.to_dense()[0], eigvals_only=True), rtol=1e-12)
