"""Hypothesis strategies for priors, noise levels and queries: random ones and nasty ones."""

from __future__ import annotations

import numpy as np
from helpers import FORMS, SINGULAR_FORMS, Problem, covariances_of
from hypothesis import strategies as st

LAYOUTS = ("random", "one", "duplicates", "near-equal")
WEIGHTS = ("uniform", "random", "some-zero", "decades")


def powers(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers between 10^low and 10^high, all decades alike; 1 is the simplest."""
    return st.floats(low, high).map(lambda exponent: float(10.0**exponent))


@st.composite
def centres(draw, offsets=(0.0, 1e3)):
    """(K, d): one point, duplicates, points 1e-9 apart, on a line (d = 1), near the origin or far from it."""
    layout, dim = draw(st.sampled_from(LAYOUTS)), draw(st.integers(1, 3))
    count = 1 if layout == "one" else draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    points = rng.standard_normal((count, dim))
    if layout == "duplicates":
        points[1:] = points[rng.integers(0, max(1, count // 2), count - 1)]
    if layout == "near-equal":
        points = points[:1] + 1e-9 * points
    return draw(st.sampled_from(offsets)) + points


@st.composite
def log_weights(draw, count):
    """(K,) or None: equal, of one order, some zero, or spread over 300 decades; not normalised."""
    choice = draw(st.sampled_from(WEIGHTS))
    if choice == "uniform":
        return None
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logs = np.log(rng.uniform(0.05, 1.0, count))
    if choice == "some-zero":
        logs[rng.random(count) < 0.5] = -np.inf
        logs[rng.integers(count)] = 0.0
    if choice == "decades":
        logs = 300.0 * np.log(10.0) * (rng.random(count) - 1.0)
    return logs


@st.composite
def problems(
    draw, forms=(None, *FORMS, *SINGULAR_FORMS), offsets=(0.0, 1e3), sigmas=(-3.0, 3.0), alphas=(-3.0, 0.0)
) -> Problem:
    """Priors of every covariance form (None: point masses), at one noise level or one for each of four queries.

    The queries: drawn from q, on a component, midway between two components, and ten sigma away from one.
    """
    points = draw(centres(offsets))
    count, dim = points.shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    form = draw(st.sampled_from(forms))
    covariances = None if form is None else covariances_of(form, count, dim, rng)
    alpha, sigma = draw(powers(*alphas)), draw(powers(*sigmas))
    if draw(st.booleans()):
        alpha, sigma = alpha * np.array([1.0, 0.7, 0.4, 0.9]), sigma * np.array([1.0, 2.0, 0.5, 1.5])
    problem = Problem(
        points,
        np.zeros((4, dim)),
        rng.standard_normal((4, dim)),
        alpha,
        sigma,
        covariances,
        draw(log_weights(count)),
    )
    a, b = points[rng.integers(count)], points[rng.integers(count)]
    clean = np.stack([a, a, (a + b) / 2, b])
    levels = [level[:, None] for level in problem.levels]
    noise = np.array([[1.0], [0.0], [0.0], [10.0]]) * rng.standard_normal((4, dim))
    problem.x[:] = levels[0] * clean + levels[1] * noise
    return problem
