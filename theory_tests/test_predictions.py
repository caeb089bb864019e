"""Conversions between predictions, against the linear system they solve and against Gaussian data."""

import math

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from dfmath.predictions import convert

mp.dps = 60
NAMES = ("eps", "score", "x0", "v", "flow")
NAMESPACES = {"numpy": np, "strict": array_api_strict, "torch": torch}
PAIRS = [(source, target) for source in NAMES for target in NAMES]
quick = settings(deadline=None, max_examples=30)
levels = st.floats(1e-3, 100.0)
values = st.floats(-10.0, 10.0)


def definition(name, x0, eps, alpha, sigma):
    """What each prediction is, as the sources define it."""
    if name == "v":
        return alpha * eps - sigma * x0
    if name == "flow":
        return eps - x0
    return {"eps": eps, "x0": x0, "score": -eps / sigma}[name]


def solved(value, x, alpha, sigma, source, target):
    """The target by solving for (x0, eps) with LU, all in arbitrary precision; and the size of its terms."""
    a = definition(source, mpf(1), mpf(0), alpha, sigma)
    b = definition(source, mpf(0), mpf(1), alpha, sigma)
    inverse = mp.inverse(mp.matrix([[alpha, sigma], [a, b]]))
    terms = [
        definition(target, inverse[0, j], inverse[1, j], alpha, sigma) * right for j, right in enumerate([x, value])
    ]
    return sum(terms), sum(abs(term) for term in terms)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@quick
@given(value=values, x=values, alpha=levels, sigma=levels)
def test_conversion_solves_the_linear_system(source, target, value, x, alpha, sigma):
    got = convert(np.asarray([value]), np.asarray([x]), alpha, sigma, source, target)
    want, size = solved(mpf(value), mpf(x), mpf(alpha), mpf(sigma), source, target)
    assert abs(mpf(float(got[0])) - want) <= 1e-15 * (2 * size + mpf("1e-40"))


@pytest.mark.parametrize(("source", "target"), PAIRS)
@quick
@given(x0=values, eps=values, alpha=levels, sigma=levels)
def test_there_and_back(source, target, x0, eps, alpha, sigma):
    x = np.asarray([alpha * x0 + sigma * eps])
    value = np.asarray([definition(source, x0, eps, alpha, sigma)])
    back = convert(convert(value, x, alpha, sigma, source, target), x, alpha, sigma, target, source)
    scale = 10.0 * (1.0 + max(alpha, sigma)) ** 2 / min(alpha, sigma, 1.0) ** 3
    np.testing.assert_allclose(back, value, rtol=0, atol=1e-14 * scale)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_gaussian_data(source, target):
    """For q0 = N(0, c^2) the score is -x/(alpha^2 c^2 + sigma^2), and every ideal prediction is as simple."""
    c2, alpha, sigma = 2.25, 0.6, 1.7
    x = np.linspace(-3.0, 3.0, 7)
    marginal = alpha**2 * c2 + sigma**2
    mean, noise = alpha * c2 * x / marginal, sigma * x / marginal
    ideal = {
        "score": -x / marginal,
        "x0": mean,
        "eps": noise,
        "v": alpha * noise - sigma * mean,
        "flow": noise - mean,
    }
    got = convert(ideal[source], x, alpha, sigma, source, target)
    np.testing.assert_allclose(got, ideal[target], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", NAMESPACES)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_levels_per_query_and_types(source, target, library, dtype):
    xp = NAMESPACES[library]
    rng = np.random.default_rng(7)
    x, value = rng.normal(size=(2, 3, 2, 4)).astype(dtype)
    alpha, sigma = np.asarray([0.9, 1.0, 0.3]), np.asarray([0.1, 5.0, 0.8])  # float64 whatever x is
    got = convert(*map(xp.asarray, (value, x, alpha, sigma)), source, target)
    assert type(got) is type(xp.asarray(x))
    assert (got.dtype, tuple(got.shape)) == (getattr(xp, dtype), x.shape)
    for i in range(3):
        want = convert(value[i].astype(float), x[i].astype(float), float(alpha[i]), float(sigma[i]), source, target)
        tolerance = 1e-6 if dtype == "float32" else 1e-14
        np.testing.assert_allclose(np.asarray(got[i, ...]), want, rtol=tolerance, atol=60 * tolerance)


@pytest.mark.parametrize("level", [0.5, np.float64(0.5), np.float32(0.5), np.asarray(0.5)])
def test_scalar_levels_do_not_widen_the_data(level):
    x = np.ones((2, 3), dtype=np.float32)
    for source, target in PAIRS:
        got = convert(x, x, level, level, source, target)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, convert(x, x, 0.5, 0.5, source, target))


def test_other_devices_than_the_default():
    xp, device = array_api_strict, array_api_strict.Device("device1")
    x, level = xp.ones((3, 2), device=device), xp.asarray([0.1, 0.5, 0.9], device=device)
    for source, target in PAIRS:
        assert convert(x, x, level, level, source, target).device == device
    with pytest.raises(ValueError, match=r"index 0$"):
        convert(x, x, level - 1.0, level, "eps", "x0")
    with pytest.raises(ValueError, match=r"^alpha must be on the device of x"):
        convert(x, x, xp.ones(3), level, "eps", "x0")


def test_torch_differentiates():
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alpha = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    value = torch.ones_like(x).requires_grad_()
    for source, target in PAIRS:
        assert torch.autograd.gradcheck(lambda v, a, s=source, t=target: convert(v, x, a, 1.5, s, t), (value, alpha))


ONE, X = np.asarray([[1.0], [2.0]]), np.asarray([[3.0], [5.0]])


@pytest.mark.parametrize(
    ("source", "target", "alpha", "sigma", "want"),
    [
        ("score", "eps", 1.0, 0.0, 0 * ONE),  # eps = -sigma score
        ("score", "x0", 2.0, 0.0, X / 2),
        ("eps", "x0", 2.0, 0.0, X / 2),
        ("eps", "score", 0.0, 2.0, -ONE / 2),
        ("x0", "eps", 0.0, 2.0, X / 2),
        ("x0", "score", 0.0, 2.0, -X / 4),
        ("v", "x0", 1.0, 0.0, X),
        ("v", "eps", 1.0, 0.0, ONE),
        ("v", "x0", 0.0, 1.0, -ONE),
        ("v", "eps", 0.0, 1.0, X),
        ("flow", "x0", 1.0, 0.0, X),
        ("flow", "eps", 1.0, 0.0, ONE + X),
        ("flow", "x0", 0.0, 1.0, X - ONE),
        ("eps", "eps", 0.0, 0.0, ONE),
        ("x0", "x0", 1.0, 0.0, ONE),
    ],
)
def test_ends_of_a_schedule_where_they_are_regular(source, target, alpha, sigma, want):
    np.testing.assert_allclose(convert(ONE, X, alpha, sigma, source, target), want, rtol=1e-15)


SINGULAR = [
    *[(source, "score", 1.0, 0.0) for source in ("eps", "x0", "v", "flow")],
    *[(source, target, 0.0, 1.0) for source in ("eps", "score") for target in ("x0", "v", "flow")],
    *[("x0", target, 1.0, 0.0) for target in ("eps", "v", "flow")],
    *[(source, "x0", 0.0, 0.0) for source in ("v", "flow")],
]


@pytest.mark.parametrize(("source", "target", "alpha", "sigma"), SINGULAR)
def test_singular_conversions_are_refused(source, target, alpha, sigma):
    message = f"^{source} cannot be turned into {target} where .* = 0"
    with pytest.raises(ValueError, match=message):
        convert(ONE, X, alpha, sigma, source, target)
    per_query = np.asarray([0.5, alpha]), np.asarray([0.5, sigma])
    with pytest.raises(ValueError, match=message + ": index 1$"):
        convert(ONE, X, *per_query, source, target)


BAD = [
    ({"source": "noise"}, ValueError, r"^source must be one of eps, score, x0, v, flow, got 'noise'"),
    ({"target": "epsilon"}, ValueError, r"^target must be one of .*did you mean 'eps'"),
    ({"value": ONE[:1]}, ValueError, r"^value must have the shape of x, \(2, 1\)"),
    ({"value": ONE.astype(np.float32)}, TypeError, r"^value must have the dtype of x, float64"),
    ({"value": torch.ones(2, 1)}, TypeError, r"^value must be in the array namespace of x"),
    ({"value": [[1.0], [2.0]]}, TypeError, r"^value must be an array, got list"),
    ({"x": 1.0}, TypeError, r"^x must be an array, got float"),
    ({"x": X.astype(int), "value": ONE.astype(int)}, TypeError, r"^x must be real floating"),
    ({"alpha": torch.ones(2)}, TypeError, r"^alpha must be in the array namespace of x"),
    ({"alpha": [0.5, 0.5]}, TypeError, r"^alpha must be a number or an array, got list"),
    ({"alpha": np.ones((2, 1))}, ValueError, r"^alpha must have shape \(\) or \(2,\)"),
    ({"alpha": np.ones(3)}, ValueError, r"^alpha must have shape \(\) or \(2,\)"),
    ({"sigma": np.asarray([1, 2])}, TypeError, r"^sigma must be real floating"),
    ({"alpha": -0.5}, ValueError, r"^alpha must be finite and not negative"),
    ({"sigma": math.nan}, ValueError, r"^sigma must be finite and not negative"),
    ({"sigma": np.asarray([1.0, math.inf])}, ValueError, r"^sigma must be finite and not negative, got inf: index 1$"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_input_is_refused_by_name(change, kind, message):
    arguments = {"value": ONE, "x": X, "alpha": 0.5, "sigma": 0.5, "source": "eps", "target": "x0"}
    with pytest.raises(kind, match=message):
        convert(**(arguments | change))
