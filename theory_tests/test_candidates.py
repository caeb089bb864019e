"""Lists of components made at one place, used at others: nothing that matters there is missing."""

from __future__ import annotations

import numpy as np
import pytest
from clouds import asked, cloud, clouds, exact_logits
from dfmath.backends import candidates, numba_cpu
from dfmath.backends.candidates import Candidates
from dfmath.backends.threaded import threads
from hypothesis import given, settings
from hypothesis import strategies as st

import dfmath.flow
from dfmath import PointMasses, probability_flow


@pytest.fixture
def short_lists(monkeypatch):
    """Lists so short that something is left out of them."""
    monkeypatch.setattr(candidates, "FEWEST", 2)
    monkeypatch.setattr(candidates, "LEAST", 8)
    monkeypatch.setattr(numba_cpu, "LEAST", 8)


def moved(lists, points, seed, share):
    """Places off the segments by as much as the lists allow: towards the nearest point not listed, or anywhere."""
    rng = np.random.default_rng(seed)
    along = lists.anchors - lists.places
    off = rng.standard_normal(along.shape)
    for row in range(len(off)):
        others = np.delete(points.astype(np.float64), lists.listed[row], axis=0) - lists.anchors[row]
        if rng.integers(4) > 0:
            off[row] = others[np.argmin(np.linalg.norm(others, axis=1))]
    off *= (share * np.maximum(lists.within, 0.0) / np.maximum(np.linalg.norm(off, axis=1), 1e-300))[:, None]
    return lists.places + rng.choice([0.0, 0.3, 1.0], size=(len(along), 1)) * along + off


@given(
    **clouds,
    share=st.sampled_from([0.0, 0.5, 0.999]),
    less=st.sampled_from([1.0, 0.9, 0.1]),
    uneven=st.sampled_from([0.0, 10.0]),
)
@settings(max_examples=250)
def test_what_is_not_listed_does_not_matter(seed, count, dim, offset, scale, noise, dtype, share, less, uneven):
    """Everything left out is lighter than the best by exp(-cut), wherever a list claims to hold [MATH 4.8]."""
    points = cloud(seed, count, dim, offset, scale, dtype)
    rng, alpha, sigma = np.random.default_rng(seed + 1), 0.7, scale * noise
    x = alpha * points[rng.integers(len(points), size=3)].astype(np.float64) + sigma * rng.standard_normal((3, dim))
    weights = np.exp(uneven * rng.standard_normal(len(points)))
    how, memory = {"tolerance": 1e-9, "weights": weights / weights.sum()}, Candidates()
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.setattr(candidates, "FEWEST", 2)
        if len(points) > 1:
            memory.learn(asked(points, x, alpha, sigma, **how))
    if memory.lists is None:
        return
    later = asked(points, alpha * moved(memory.lists, points, seed, share), alpha, less * sigma, **how)
    covered, listed = memory.covering(later)
    exact = exact_logits(points, later.components.log_weights[0], later.queries, alpha, less * sigma)
    for row in np.flatnonzero(covered):
        left_out = np.setdiff1d(np.arange(len(points)), listed[row])
        slack = 1e-13 * np.abs(exact[row]).max()  # x and alpha z differ by rounding
        assert (exact[row, left_out] <= exact[row].max() - later.cut[row] + slack).all()


def test_lists_cover_what_is_near_and_nothing_else():
    points = cloud(0, 24, 7, 0.0, 1.0, np.float64)
    x = 0.7 * points[[0, 9, 17]] + 1e-3
    memory = Candidates()
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.setattr(candidates, "FEWEST", 8)
        memory.learn(asked(points, x, 0.7, 0.01, tolerance=1e-9))

    def covered(x, sigma, tolerance=1e-9):
        return memory.covering(asked(points, x, 0.7, sigma, tolerance=tolerance))[0]

    assert (memory.lists.within > 0.1).all()
    assert covered(x, 0.01).all()
    assert covered(0.7 * points[[0, 9, 17]], 0.001).all()
    for elsewhere in (x + 10.0, 0.7 * points[[20, 1, 5]] + 20.0):
        assert not covered(elsewhere, 0.01).any()
    assert not covered(x, 0.014, tolerance=0.5).any()
    assert not covered(x, 0.01, tolerance=1e-30).any()


@pytest.mark.parametrize(("place", "sigma", "heavier"), [(-0.5, 0.146, 0.0), (0.4, 0.08, 0.0), (0.0, 0.1118, 8.0)])
def test_ends_of_segments_and_weights_count(place, sigma, heavier):
    """Between 0 and 1 the second point matters at one end or the other, or because it is heavier: it must be listed."""
    points, x = np.array([[0.0], [1.0], [-50.0], [60.0], [70.0]]), np.array([[place]])
    weights = np.exp([0.0, heavier, 0.0, 0.0, 0.0])
    how, memory = {"tolerance": 1e-9, "weights": weights / weights.sum()}, Candidates()
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.setattr(candidates, "FEWEST", 1)
        memory.learn(asked(points, x, 1.0, sigma, **how))
    ends = [asked(points, end, 1.0, sigma, **how) for end in (x, np.zeros((1, 1)))]
    logs = ends[0].components.log_weights[0]
    gaps = [np.diff(exact_logits(points, logs, end.queries, 1.0, sigma)[0, 1::-1])[0] for end in ends]
    assert 0.0 < min(gaps) < ends[0].cut[0]
    assert not any(memory.covering(end)[0].any() for end in ends)


@pytest.mark.parametrize(("start", "end"), [(2.0, 1e-3), (1e-3, 0.3)])
@pytest.mark.parametrize("options", [{}, {"jacobian": True}, {"log_density": True}])
def test_flows_do_not_change(start, end, options, short_lists, monkeypatch):
    """A flow that remembers is the flow that does not; and it does remember."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((300, 5))
    z = PointMasses(points).diffuse(1.0, start).sample(6, seed=0)
    covered = []

    class Counting(Candidates):
        def covering(self, ask):
            found = super().covering(ask)
            covered.append(found[0].sum())
            return found

    monkeypatch.setattr(numba_cpu, "Candidates", Counting)
    found = probability_flow(PointMasses(points), z, start, end, **options)
    monkeypatch.setattr(dfmath.flow, "memory_for", lambda *_: None)
    wanted = probability_flow(PointMasses(points), z, start, end, **options)
    assert sum(covered) > (0.6 if end > start else 0.3) * found.evaluations.sum()
    np.testing.assert_allclose(found.x, wanted.x, rtol=1e-7 if end > start else 1e-10, atol=1e-10)
    if "jacobian" in options:
        size = np.abs(wanted.jacobian).max()
        np.testing.assert_allclose(found.jacobian / size, wanted.jacobian / size, atol=1e-7)
    if "log_density" in options:
        np.testing.assert_allclose(found.log_density_change, wanted.log_density_change, atol=1e-6)


def test_few_components_are_not_remembered():
    few, many = (PointMasses(np.zeros((count, 2))).components for count in (10, candidates.LEAST))
    assert numba_cpu.memory_for(few, 1.0) is None
    assert isinstance(numba_cpu.memory_for(many, 1.0), Candidates)
