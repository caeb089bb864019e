"""One conformance suite for every symmetric operator, against its dense matrix from elsewhere [MATH 1.2-1.7, 4.4-4.6b].

For the diffusion Fisher and the posterior covariance that is the Hessian of a plain dense log density by automatic
differentiation; for the approximations, their printed formulas.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from helpers import FORMS, NUMBA, SINGULAR_FORMS, assert_matches, mixture_problem, numbers
from scipy.sparse.linalg import LinearOperator, eigsh

from dfmath import PointMasses
from dfmath.approximations import EndpointFisher, GaussianFisher
from dfmath.approximations.endpoint import VARIANTS

PRIORS = ["point-masses", *FORMS, *SINGULAR_FORMS]
NAMES = [
    *(f"fisher-{form}" for form in PRIORS),
    *(f"covariance-{form}" for form in PRIORS),
    *(f"endpoint-{variant}" for variant in VARIANTS),
    "gaussian-diagonal",
    "gaussian-complete",
    "gaussian-low-rank",
    "gaussian-low-rank-traced",
]
ALPHA, SIGMA = np.array([1.0, 0.75, 0.5]), np.array([0.5, 1.0, 2.0])


def exact_problem(form):
    problem = mixture_problem("zero" if form == "point-masses" else form, SIGMA, seed=2, alpha=ALPHA)
    return replace(problem, covariances=None) if form == "point-masses" else problem


class Model:
    """An operator under test, and the dense matrices (B, d, d) that it stands for."""

    def __init__(self, name, kind=NUMBA, dtype="float64"):
        family, _, rest = name.partition("-")
        make = {"fisher": self.exact, "covariance": self.exact, "endpoint": self.endpoint, "gaussian": self.gaussian}
        self.operator, self.dense = make[family](family, rest, lambda values: kind.put(values, dtype), kind, dtype)
        self.rtol = 2e-5 if kind.unit > 1e-10 else {"float64": 1e-11, "float32": 5e-7}[dtype]
        self.size = np.abs(self.dense).max(axis=(1, 2))
        self.like = kind.put(np.zeros(1), dtype)
        self.put = lambda values: kind.put(values, dtype)

    def exact(self, family, form, put, kind, dtype):
        problem = exact_problem(form).as_dtype(dtype)
        fisher = problem.marginal(kind, dtype).fisher(put(problem.x))
        operator = fisher if family == "fisher" else fisher.posterior_covariance()
        return operator, dense_truth(family, form, dtype)

    def endpoint(self, family, variant, put, kind, dtype):
        rng = np.random.default_rng(0)
        ends, means = rng.standard_normal((2, 3, 3)).astype(dtype)
        told = np.array([0.3, 2.0, 0.7], dtype) if variant == "calibrated" else None
        levels = put(ALPHA), put(SIGMA)
        operator = EndpointFisher(put(ends), put(means), *levels, variant, None if told is None else put(told))
        ends, means = ends.astype(float), means.astype(float)
        u = ends - means

        def outer(a, b):
            return a[:, :, None] * b[:, None, :]

        if variant == "paper":
            p = outer(ends, ends) - outer(means, means)
        elif variant == "centred":
            p = outer(u, u)
        else:
            p = (told.astype(float) / np.sum(u**2, axis=1))[:, None, None] * outer(u, u)
        return operator, fisher_of(p)

    def gaussian(self, family, rest, put, kind, dtype):
        rank = 2 if rest.startswith("low-rank") else 3
        c = np.array([2.0, 0.5, 0.0])[:rank]
        basis = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0][:, :rank].astype(dtype)
        told = np.array([0.25, 0.5, 1.0]) if rest.endswith("traced") else None
        given = None if rest == "diagonal" else put(basis)
        levels = put(ALPHA), put(SIGMA)
        operator = GaussianFisher(put(c), given, *levels, None if told is None else put(told))
        u = np.eye(3) if given is None else basis.astype(float)
        rho2 = (SIGMA / ALPHA)[:, None] ** 2
        spectrum = rho2 * c / (c + rho2)
        if told is not None:
            spectrum *= np.minimum(told / spectrum.sum(axis=1), 1 + rho2[:, 0] / c.max())[:, None]
        return operator, fisher_of((u * spectrum[:, None, :]) @ u.T)


@cache
def dense_truth(family, form, dtype):
    problem = exact_problem(form).as_dtype(dtype)
    return problem.hessians() if family == "fisher" else problem.posterior_covariances()


def fisher_of(p):
    """I/sigma^2 - (alpha^2/sigma^4) P."""
    a, s = ALPHA[:, None, None], SIGMA[:, None, None]
    return np.eye(3) / s**2 - a**2 / s**4 * p


@pytest.fixture(params=NAMES)
def model(request, xp_kind, dtype):
    return Model(request.param, xp_kind, dtype)


def test_matvec_trace_diagonal_and_dense(model):
    f, dense, scale = model.operator, model.dense, model.size
    assert f.shape == dense.shape and f.dtype == model.like.dtype
    v = np.random.default_rng(3).integers(-4, 5, (3, 3)).astype(float)
    product = (dense @ v[:, :, None])[:, :, 0]
    assert_matches(f.matvec(model.put(v)), product, model.rtol, 12 * scale, like=model.like)
    assert_matches(f.trace(), np.trace(dense, axis1=1, axis2=2), model.rtol, 3 * scale, like=model.like)
    assert_matches(f.diagonal(), np.diagonal(dense, axis1=1, axis2=2), model.rtol, scale, like=model.like)
    assert_matches(f.to_dense(), dense, model.rtol, scale, like=model.like)


@pytest.mark.parametrize("columns", [1, 3, 5])
def test_product_with_matrices(model, columns):
    """As many columns as rows, too: a transposed block would have the right shape."""
    v = np.random.default_rng(4).integers(-4, 5, (3, 3, columns)).astype(float)
    assert_matches(model.operator @ model.put(v), model.dense @ v, model.rtol, 12 * model.size, like=model.like)


def test_dense_matrices_are_symmetric(model):
    dense = numbers(model.operator.to_dense())
    assert_matches(dense, dense.transpose(0, 2, 1), model.rtol, model.size, like=dense)


def test_eigenvalues_and_eigenvectors(model):
    values = np.linalg.eigvalsh(model.dense)
    assert_matches(model.operator.eigvalsh(), values, model.rtol, model.size, like=model.like)
    got, vectors = model.operator.eigh()
    assert_matches(got, values, model.rtol, model.size, like=model.like)
    assert (np.diff(numbers(got), axis=1) >= 0).all()
    q = numbers(vectors)
    assert_matches(vectors, q, 0.0, like=model.like)
    np.testing.assert_allclose(q.transpose(0, 2, 1) @ q, np.stack([np.eye(3)] * 3), atol=5 * model.rtol)
    rebuilt = (q * numbers(got)[:, None, :]) @ q.transpose(0, 2, 1)
    assert_matches(rebuilt, model.dense, 5 * model.rtol, model.size, like=rebuilt)


def test_logdet(model):
    """Log of a positive determinant; the other signs have tests of their own."""
    sign, logs = np.linalg.slogdet(model.dense)
    spectrum = np.abs(np.linalg.eigvalsh(model.dense))
    steep = spectrum.min(axis=1) < 1e-6 * spectrum.max(axis=1)
    expected = np.where(sign < 0, np.nan, logs)
    got = numbers(model.operator.logdet())
    stiffness = (spectrum.max(axis=1) / np.maximum(spectrum.min(axis=1), 1e-300))[~steep]
    assert_matches(got[~steep], expected[~steep], 3 * model.rtol, np.maximum(1.0, stiffness), like=got[~steep])
    assert_matches(model.operator.logdet(), got, 0.0, like=model.like)


def test_solve(model):
    spectrum = np.abs(np.linalg.eigvalsh(model.dense))
    singular = spectrum.min(axis=1) < 1e-12 * spectrum.max(axis=1)
    v = np.random.default_rng(5).integers(-4, 5, (3, 3)).astype(float)
    if singular.any():
        pytest.skip("singular: see the test of what solve refuses")
    expected = np.linalg.solve(model.dense, v[:, :, None])[:, :, 0]
    stiffness = (spectrum.max(axis=1) / spectrum.min(axis=1)).max()
    assert_matches(model.operator.solve(model.put(v)), expected, 3 * model.rtol * stiffness, like=model.like)


def test_each_row_alone(model):
    """A row keeps its own noise level."""
    v = np.random.default_rng(6).integers(-4, 5, (1, 3)).astype(float)
    for b in range(3):
        row, dense = model.operator.row(b), model.dense[b : b + 1]
        assert row.shape == (1, 3, 3) and type(row) is type(model.operator)
        assert_matches(row.to_dense(), dense, model.rtol, model.size[b], like=model.like)
        assert_matches(row.matvec(model.put(v)), v @ dense[0], model.rtol, 12 * model.size[b], like=model.like)


def test_to_scipy(model):
    """A LinearOperator on NumPy vectors, for SciPy's own algorithms."""
    for b in range(3):
        operator, dense = model.operator.to_scipy(b), model.dense[b]
        assert isinstance(operator, LinearOperator) and operator.shape == (3, 3) and operator.dtype == np.float64
        block = np.arange(6.0).reshape(3, 2)
        tolerance = {"rtol": 0, "atol": 20 * model.rtol * model.size[b]}
        np.testing.assert_allclose(operator @ block, dense @ block, **tolerance)
        np.testing.assert_allclose(operator @ block[:, 0], dense @ block[:, 0], **tolerance)
        np.testing.assert_allclose(operator.rmatvec(block[:, 1]), dense.T @ block[:, 1], **tolerance)
        largest = eigsh(operator, k=1, which="LA", v0=np.ones(3))[0][0]
        assert largest == pytest.approx(np.linalg.eigvalsh(dense)[-1], abs=20 * model.rtol * model.size[b])


# Signs of determinants

CORNERS = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
PAIR = np.array([[1.0, 0.0], [-1.0, 0.0]])


def fisher(points, sigma, kind=NUMBA, dtype="float64"):
    x = kind.put(np.zeros((1, points.shape[1])), dtype)
    return PointMasses(kind.put(points, dtype)).diffuse(1.0, sigma).fisher(x), x


def test_logdet_of_a_negative_determinant_is_nan(xp_kind, dtype):
    """Between two points F has one negative eigenvalue: 4 - 16 and 4."""
    f, x = fisher(PAIR, 0.5, xp_kind, dtype)
    assert_matches(f.eigvalsh(), np.array([[-12.0, 4.0]]), 1e-6, like=x)
    assert_matches(f.logdet(), np.array([np.nan]), 0.0, like=x)


def test_logdet_of_two_negative_eigenvalues_is_finite(xp_kind, dtype):
    f, x = fisher(CORNERS, 0.5, xp_kind, dtype)
    assert_matches(f.eigvalsh(), np.array([[-12.0, -12.0]]), 1e-6, like=x)
    assert_matches(f.logdet(), np.array([2 * math.log(12.0)]), 1e-6, like=x)


def test_logdet_of_a_singular_matrix_is_minus_infinity(xp_kind, dtype):
    f, x = fisher(PAIR, 0.5, xp_kind, dtype)
    assert_matches(f.posterior_covariance().logdet(), np.array([-np.inf]), 0.0, like=x)


def test_logdet_of_a_small_positive_determinant(xp_kind):
    """No early answer where the determinant itself underflows."""
    f, x = fisher(np.zeros((1, 200)), 100.0, xp_kind, xp_kind.dtypes[0])
    assert_matches(f.logdet(), np.array([-400 * math.log(100.0)]), 1e-5 if xp_kind.unit > 1e-10 else 1e-13, like=x)


def test_solve_refuses_singular_matrices_and_names_the_row(xp_kind):
    dtype = xp_kind.dtypes[0]
    x = xp_kind.put(np.array([[0.0, 0.0], [0.3, 0.0]]), dtype)
    sigma = xp_kind.put(np.array([0.5, 1.0]), dtype)
    f = PointMasses(xp_kind.put(PAIR, dtype)).diffuse(1.0, sigma).fisher(x)
    assert_matches(
        f.solve(x), numbers(x) / np.linalg.eigvalsh(numbers(f.to_dense())).min(axis=1)[:, None], 1e-5, like=x
    )
    with pytest.raises(ValueError, match="row 0"):
        f.posterior_covariance().solve(x)


# What holds for F and P alone


@pytest.mark.parametrize("form", PRIORS)
def test_order_of_matrices(form):
    """0 <= P and F <= I/sigma^2 [MATH 1.2]."""
    problem = exact_problem(form)
    f = problem.marginal().fisher(problem.x)
    assert (f.posterior_covariance().eigvalsh() >= -1e-15).all()
    assert (f.eigvalsh() <= (1 + 1e-14) / SIGMA[:, None] ** 2).all()


def test_spectrum_of_bounded_support():
    """P <= (D^2/4) I, attained between two points [MATH 1.7a]."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((20, 3))
    points /= np.linalg.norm(points, axis=1).max()
    x = 0.2 * rng.standard_normal((50, 3))
    p = PointMasses(points).diffuse(1.0, 0.3).fisher(x).posterior_covariance()
    assert (p.eigvalsh() <= 1.0).all()
    pair = fisher(PAIR, 0.1)[0].posterior_covariance()
    assert pair.eigvalsh()[0, -1] == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_fisher_of_log_concave_data_is_not_negative(form):
    """One Gaussian, and two one-dimensional ones too near for a second mode [MATH 1.7c]."""
    problem = mixture_problem(form, SIGMA, seed=2, alpha=ALPHA)
    one = replace(problem, log_weights=np.array([0.0, -np.inf, -np.inf]))
    assert (one.marginal().fisher(one.x).eigvalsh() > 0).all()
    near = PointMasses(np.array([[-1.0], [1.0]])).diffuse(1.0, 1.0)  # 1/s^2 - 1/s^4 sech^2(x/s^2) >= 0
    x = np.linspace(-3.0, 3.0, 61)[:, None]
    np.testing.assert_allclose(near.fisher(x).trace(), np.tanh(x[:, 0]) ** 2, rtol=1e-12, atol=1e-15)


def test_both_share_one_marginal():
    problem = exact_problem("full")
    f = problem.marginal().fisher(problem.x)
    p = f.posterior_covariance().to_dense()
    a, s = ALPHA[:, None, None], SIGMA[:, None, None]
    np.testing.assert_allclose(f.to_dense(), np.eye(3) / s**2 - a**2 / s**4 * p, rtol=1e-11, atol=1e-11)


def test_log_determinant_of_a_singular_covariance():
    """Three points span two dimensions of three; far away, the posterior is one point."""
    points = np.random.default_rng(0).standard_normal((3, 3))
    q = PointMasses(points).diffuse(1.0, 1.0)
    found = q.fisher(np.stack([points[0], 1e6 * points[1]])).posterior_covariance().logdet()
    np.testing.assert_array_equal(found, -np.inf)
