"""The transport check: indices on made matrices, the gap against POT, and known verdicts [MATH 3.1-3.5]."""

from __future__ import annotations

import math
import warnings

import numpy as np
import ot
import pytest
from scipy.integrate import solve_ivp

from dfmath import GaussianMixture, PointMasses, ot_check
from dfmath.flow import probability_flow
from dfmath.priors import Prior
from dfmath.theorems.maps import OFFICIAL_INDEX, lattice_starts
from dfmath.transport import (
    asymmetry,
    asymmetry_offdiagonal,
    min_eigenvalue,
    official_points,
    official_schedules,
    transport_gap,
)


def _rotation(angle: float) -> np.ndarray:
    return np.array([[[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]])


@pytest.mark.parametrize("angle", [0.0, 0.1, 1.0, math.pi / 2])
def test_indices_of_a_rotation(angle: float) -> None:
    matrix = _rotation(angle)
    np.testing.assert_allclose(asymmetry(matrix), [math.sin(angle)], atol=1e-15)
    np.testing.assert_allclose(asymmetry_offdiagonal(matrix), [math.sqrt(2.0) if angle else 0.0], rtol=1e-12)
    np.testing.assert_allclose(min_eigenvalue(matrix), [math.cos(angle)], atol=1e-15)


def test_offdiagonal_index_by_its_formula() -> None:
    b = np.array([[0.0, 2.0, -1.0], [0.5, 0.0, 3.0], [1.0, 1.0, 0.0]])
    wanted = np.linalg.norm(b - b.T) / (math.sqrt(2) * np.linalg.norm(b))
    np.testing.assert_allclose(asymmetry_offdiagonal((b + np.diag([5.0, -7.0, 2.0]))[None]), [wanted], rtol=1e-14)


def test_offdiagonal_noise_below_the_floor_is_zero() -> None:
    matrix = np.eye(2)[None] + np.array([[[0.0, 1e-12], [-1e-12, 0.0]]])
    assert asymmetry_offdiagonal(matrix, floor=1e-9)[0] == 0.0
    assert asymmetry_offdiagonal(matrix)[0] > 1.0


def test_gap_against_exact_optimal_transport() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 3)), rng.standard_normal((40, 3)) + 1.0
    cost = ot.dist(a, b)
    best = ot.emd2(np.full(40, 1 / 40), np.full(40, 1 / 40), cost)
    np.testing.assert_allclose(transport_gap(a, b), (np.trace(cost) / 40 - best) / best, rtol=1e-10)


@pytest.mark.parametrize("name", official_schedules())
def test_official_experiment_is_one_value_for_all_schedules(name: str) -> None:
    options = {"n": 6, "seed": 1, "start": "gaussian"}
    canonical = ot_check(official_points(), **options)
    native = ot_check(official_points(), schedule=official_schedules()[name], **options)
    difference = np.abs(native.asymmetry_offdiagonal.values - canonical.asymmetry_offdiagonal.values)
    assert difference.max() < 1e-6
    assert not native.is_transport


def _official_indices(starts: np.ndarray) -> np.ndarray:
    """Both indices of the published experiment at starts (n, 2), by its equations in NumPy and SciPy's integrator."""
    points, n = np.array([[0.5, 0.0], [0.0, -0.5], [0.0, 0.0]]), len(starts)

    def slope(log_rho: float, state: np.ndarray) -> np.ndarray:
        z, a = state[: 2 * n].reshape(n, 2), state[2 * n :].reshape(n, 2, 2)
        logits = (z @ points.T - (points**2).sum(axis=1) / 2) * math.exp(-2 * log_rho)
        w = np.exp(logits - logits.max(axis=1)[:, None])
        w /= w.sum(axis=1)[:, None]
        off = points - (w @ points)[:, None, :]
        covariance = np.einsum("nk,nki,nkj->nij", w, off, off)
        return np.concatenate([(z - w @ points).ravel(), (a - covariance @ a * math.exp(-2 * log_rho)).ravel()])

    state = np.concatenate([starts.ravel(), np.tile(np.eye(2).ravel(), n)])
    ends = solve_ivp(slope, np.log([80.0, 0.02]), state, method="DOP853", rtol=1e-9, atol=1e-12, t_eval=[np.log(0.02)])
    a = ends.y[2 * n :, 0].reshape(n, 2, 2)
    skew, off = np.abs(a[:, 0, 1] - a[:, 1, 0]), np.hypot(a[:, 0, 1], a[:, 1, 0])
    return np.stack([skew / off, skew / (math.sqrt(2.0) * np.linalg.norm(a, axis=(1, 2)))])


def test_official_value() -> None:
    """The numbers of [MATH 3.5] by quadrature: four lattices of 4096 starts, whose spread tells their error."""
    rng = np.random.default_rng(0)
    means = np.stack([_official_indices(lattice_starts(4096, 80.0, rng.random(2))).mean(axis=1) for _ in range(4)])
    error = means.std(axis=0, ddof=1) / 2
    assert error[0] < 1e-4 and error[1] < 3e-5
    np.testing.assert_allclose(means.mean(axis=0), [OFFICIAL_INDEX, 0.02135], atol=1e-4)


def test_official_indices_are_those_of_another_integrator() -> None:
    report = ot_check(official_points(), n=100, seed=2, start="gaussian")
    found = np.stack([report.asymmetry_offdiagonal.values, report.asymmetry.values])
    np.testing.assert_allclose(found, _official_indices(report.starts), atol=1e-6)


def test_starts_of_the_lattice_lie_evenly_in_the_gaussian() -> None:
    """Moments of N(0, 9 I) up to the fourth, far nearer than random starts would have them."""
    x, y = lattice_starts(4096, 3.0, (0.3, 0.6)).T
    moments = {"x": x, "y": y, "xx": x**2, "xy": x * y, "xxyy": (x * y) ** 2, "xxxx": x**4}
    wanted = {"x": 0.0, "y": 0.0, "xx": 9.0, "xy": 0.0, "xxyy": 81.0, "xxxx": 243.0}
    for name, values in moments.items():
        assert abs(values.mean() - wanted[name]) < 0.2 * values.std() / 64, name


def test_points_on_a_line_are_transported() -> None:
    report = ot_check(official_points(collinear=True), n=20, start="gaussian")
    assert report.is_transport
    assert report.asymmetry_offdiagonal.values.max() < 1e-8
    assert report.transport_gap < 1e-8


def test_gaussian_data_are_transported() -> None:
    factor = np.random.default_rng(3).standard_normal((3, 3))
    report = ot_check(GaussianMixture(np.zeros((1, 3)), (factor @ factor.T)[None]), n=12)
    assert report.is_transport
    assert report.min_eigenvalue.values.min() > 0


def test_verdict_follows_its_tolerance() -> None:
    points = PointMasses(np.array([[0.5, 0.0], [0.0, -0.5], [0.0, 0.0]]))
    worst = float(ot_check(points, n=4, seed=5).asymmetry.values.max())
    assert not ot_check(points, n=4, seed=5, tolerance=0.9 * worst).is_transport
    assert ot_check(points, n=4, seed=5, tolerance=1.1 * worst).is_transport


def test_means_and_standard_errors() -> None:
    index = ot_check(official_points(), n=5, seed=6).asymmetry
    np.testing.assert_allclose(index.mean, np.mean(index.values))
    np.testing.assert_allclose(index.standard_error, np.std(index.values, ddof=1) / math.sqrt(5))


def test_symmetric_and_antisymmetric_matrices() -> None:
    symmetric = np.array([[[2.0, -1.0, 0.5], [-1.0, -3.0, 0.0], [0.5, 0.0, 1.0]]])
    turned = np.array([[[0.0, 1.0], [-1.0, 0.0]]])
    assert asymmetry(symmetric)[0] == asymmetry_offdiagonal(symmetric)[0] == 0.0
    assert asymmetry(turned)[0] == 1.0
    np.testing.assert_allclose(min_eigenvalue(symmetric), np.linalg.eigvalsh(symmetric)[:, 0], rtol=1e-14)
    skewed = symmetric + np.array([[[0.0, 4.0, 1.0], [-4.0, 0.0, -2.0], [-1.0, 2.0, 0.0]]])
    np.testing.assert_allclose(min_eigenvalue(skewed), min_eigenvalue(symmetric), rtol=1e-14)
    assert asymmetry(np.zeros((1, 2, 2)))[0] == asymmetry_offdiagonal(np.eye(2)[None])[0] == 0.0


def test_one_index_depends_on_the_axes_and_the_other_does_not() -> None:
    matrix, turn = np.array([[[3.0, 1.0], [0.2, 1.0]]]), _rotation(0.4)
    turned = turn @ matrix @ turn.transpose(0, 2, 1)
    np.testing.assert_allclose(asymmetry(turned), asymmetry(matrix), rtol=1e-13)
    assert abs(asymmetry_offdiagonal(turned)[0] - asymmetry_offdiagonal(matrix)[0]) > 0.05


def test_gap_is_zero_for_the_best_matching_alone() -> None:
    points = np.random.default_rng(1).standard_normal((20, 2))
    assert transport_gap(points, 3.0 * points + 1.0) == pytest.approx(0.0, abs=1e-14)
    assert transport_gap(points, 3.0 * points[::-1] + 1.0) > 0.1


PRODUCT = np.array([[x, y] for x in (-1.0, 0.2, 1.0) for y in (0.0, 2.0)])


@pytest.mark.parametrize(
    ("prior", "verdict"),
    [
        (PointMasses(np.array([[-1.0], [0.3], [2.0]])), True),
        (PointMasses(PRODUCT), True),
        (PointMasses(PRODUCT, weights=np.outer([1.0, 2.0, 3.0], [0.2, 0.8]).ravel()), True),
        (PointMasses(PRODUCT, weights=np.arange(1.0, 7.0)), False),
        (GaussianMixture(np.array([[1.0, 2.0], [-1.0, 0.0], [0.5, 1.5]]), 0.1), True),
        (GaussianMixture(np.array([[1.0, 2.0], [-1.0, 0.0], [0.5, 1.0]]), 0.1), False),
    ],
    ids=["one dimension", "product", "weighted product", "no product", "mixture on a line", "mixture off it"],
)
def test_sufficient_conditions(prior: Prior, verdict: bool) -> None:
    """Commuting posterior covariances make the flow a transport map [MATH 3.2]; a hair beside them it is none."""
    report = ot_check(prior, rho_max=20.0, n=6, seed=3)
    assert report.is_transport == verdict, report.asymmetry.values
    assert (report.min_eigenvalue.values > -1e-9).all() or not verdict


def test_jacobians_are_the_slopes_of_the_map() -> None:
    """Central differences of the ends by the starts, so that symmetry is said of the right matrix."""
    report, h = ot_check(official_points(), rho_max=20.0, rho_min=0.3, n=3), 1e-4
    slopes = []
    for step in h * np.eye(2):
        ends = [
            probability_flow(official_points(), report.starts + sign * step, 20.0, 0.3, rtol=1e-11, atol=1e-13).x
            for sign in (1, -1)
        ]
        slopes.append((ends[0] - ends[1]) / (2 * h))
    scale = np.abs(report.jacobians).max()
    np.testing.assert_allclose(report.jacobians, np.stack(slopes, axis=2), atol=1e-5 * scale)


@pytest.mark.parametrize("start", ["marginal", "gaussian"])
def test_starts_come_from_where_they_are_said_to(start: str) -> None:
    far = PointMasses(np.array([[1000.0, 0.0]]))
    starts = ot_check(far, rho_max=50.0, rho_min=1.0, n=40, seed=4, start=start).starts
    mean = np.array([1000.0 if start == "marginal" else 0.0, 0.0])
    assert (np.abs(starts.mean(axis=0) - mean) <= 6 * 50.0 / 40**0.5).all()
    again = ot_check(far, rho_max=50.0, rho_min=1.0, n=40, seed=4, start=start).starts
    np.testing.assert_array_equal(starts, again)


def test_gap_is_infinite_where_the_best_matching_is_free_and_the_given_one_is_not():
    points = np.random.default_rng(3).standard_normal((5, 2))
    assert transport_gap(points, points[::-1]) == math.inf
    assert transport_gap(points, points) == 0.0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e4])
def test_a_range_that_does_not_span_the_data_is_told(scale):
    """In other units the same points get another verdict from the same levels: then there is a warning."""
    prior = PointMasses(scale * np.array([[0.0, 1.2], [-1.0, -0.6], [1.1, -0.5]]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ot_check(prior, n=2)
    told = [str(warning.message) for warning in caught if "does not span the data" in str(warning.message)]
    assert len(told) == (0 if scale == 1.0 else 1)
    assert found.is_transport == (scale != 1.0)
    if told:
        size = scale * np.sqrt((1.2**2 + 1.0 + 0.36 + 1.21 + 0.25) / 3)
        spanning = ot_check(prior, rho_max=60 * size, rho_min=0.02 * size, n=2)
        assert not spanning.is_transport


def test_one_point_has_no_size_to_span():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ot_check(PointMasses(np.ones((1, 2))), n=2).is_transport
