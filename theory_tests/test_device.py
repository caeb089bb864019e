"""The backend of accelerators, on torch tensors of the CPU: every way it takes, its bounds, and full memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dfmath.backends import array_api, device, device_precision, device_products, use
from dfmath.backends.device_index import index_of
from dfmath.backends.diagonal import Diagonal
from dfmath.backends.moments import covariance_forms, fisher_forms
from hypothesis import given
from hypothesis import strategies as st

from dfmath import GaussianMixture, PointMasses
from dfmath.datasets import digits

WANT = frozenset({"mean", "trace", "product", "diagonal", "dense"})
LEVELS = (20.0, 3.0, 1.0, 0.5, 0.2, 0.05, 0.01)


def cloud(kind):
    """Points (N, d) of a kind that is hard in its own way."""
    rng = np.random.default_rng(0)
    return {
        "digits": digits()[:900],
        "far away": digits()[:900] + 1e3,
        "pixels": 127.5 * (digits()[:900] + 1.0),
        "plane": rng.standard_normal((5000, 2)) + np.array([3.0, -2.0]),
        "pairs": np.repeat(rng.standard_normal((400, 5)), 2, axis=0) + 1e-9 * rng.standard_normal((800, 5)),
        "one place": np.ones((600, 3)),
        "line": rng.standard_normal((800, 1)),
    }[kind]


def asked(points, sigma, dtype="float64", space="score", count=12, variance=None):
    """A question about some queries of the noised density, as the marginal would put it."""
    held = torch.tensor(points, dtype=getattr(torch, dtype))
    prior = PointMasses(held) if variance is None else GaussianMixture(held, variance)
    x = prior.diffuse(0.8, sigma).sample(count, seed=1).to(torch.float64)
    precision = float(torch.finfo(held.dtype).eps)
    options = {
        "want": WANT,
        "space": space,
        "probes": torch.from_numpy(np.random.default_rng(2).standard_normal((count, points.shape[1], 2))),
        "tolerance": 0.1 * precision if space == "score" else 1e-290,
        "precision": precision,
    }
    levels = [torch.tensor([value], dtype=torch.float64) for value in (0.8, sigma)]
    return x, prior.components, *levels, options


def agree(question, rtol):
    """The backend's moments are the reference's."""
    *arguments, options = question
    found, wanted = (module.posterior_moments(*arguments, **options) for module in (device, array_api))
    forms = fisher_forms if options["space"] == "score" else covariance_forms
    scale = 1.0 / float(arguments[3][0]) ** 2 if options["space"] == "score" else 1e-280
    for name in sorted(options["want"] - {"mean"}):
        ours, theirs = getattr(forms(found), name), getattr(forms(wanted), name)
        size = theirs.abs().reshape(len(theirs), -1).amax(dim=1).clamp_min(scale)
        gap = (ours - theirs).abs().reshape(len(theirs), -1).amax(dim=1)
        assert (gap <= rtol * size).all(), (name, float((gap / size).max()))
    torch.testing.assert_close(found.log_mass, wanted.log_mass, rtol=rtol, atol=rtol)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=rtol, atol=rtol * float(wanted.mean.abs().max()))
    return found


@pytest.mark.parametrize("space", ["score", "posterior"])
@pytest.mark.parametrize("kind", ["digits", "far away", "pixels", "plane", "pairs", "one place", "line"])
def test_every_level_is_as_the_reference_has_it(kind, space):
    for sigma in LEVELS:
        agree(asked(cloud(kind), sigma, space=space), 1e-9)


@pytest.mark.parametrize("kind", ["digits", "pixels", "plane"])
def test_single_precision_is_right_to_its_promise(kind):
    for sigma in LEVELS:
        agree(asked(cloud(kind), sigma, "float32"), 1e-5)


def test_mixtures_of_one_variance():
    for space in ("score", "posterior"):
        agree(asked(cloud("digits"), 0.5, space=space, variance=0.3), 1e-9)


def test_all_three_ways_are_taken(monkeypatch):
    """Products where all matter, candidates where few do, the reference where neither will do."""
    taken = []
    for module, name in ((device, "_gathered"), (device, "_by_reference"), (device_products.DeviceProducts, "moments")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, original=original, name=name: taken.append(name) or original(*a))
    found = {}
    for sigma in (20.0, 0.5, 0.01):
        taken.clear()
        agree(asked(cloud("digits"), sigma), 1e-9)
        found[sigma] = set(taken)
    assert found[20.0] == {"moments"} and "_gathered" in found[0.01] and "_by_reference" not in found[0.01]
    taken.clear()
    agree(asked(cloud("digits"), 0.2, space="posterior"), 1e-9)
    assert "_by_reference" in taken


def test_queries_take_different_ways_in_one_call():
    x, components, _, _, options = asked(cloud("digits"), 1.0, count=7)
    sigma = torch.tensor(LEVELS, dtype=torch.float64)
    agree((x, components, torch.full_like(sigma, 0.8), sigma, options), 1e-9)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 3, 60]),
    st.floats(-3.0, 3.0),
    st.floats(-6.0, 4.0),
    st.floats(-3.0, 2.0),
)
def test_bounds_contain_the_logits(seed, dim, log_scale, log_offset, log_sigma):
    rng = np.random.default_rng(seed)
    points = 10.0**log_scale * rng.standard_normal((40, dim)) + 10.0**log_offset * rng.standard_normal(dim)
    x = torch.from_numpy(points[:5] + 10.0**log_sigma * rng.standard_normal((5, dim)))
    held = torch.from_numpy(points)
    parts = Diagonal(
        held[None], torch.full((1, 40), -math.log(40.0), dtype=torch.float64), torch.zeros(1, 1, 1).double()
    )
    ones = torch.ones(5, dtype=torch.float64)
    ask = device.Ask(x, parts, index_of(parts), ones, 10.0**log_sigma * ones, WANT, "score", None, 0.0, 0.0)
    (tile,) = device._tiles(ask)
    logits, error = tile.logits, tile.errors()
    gaps = x.numpy().astype(np.longdouble)[:, None, :] - points.astype(np.longdouble)[None]
    spread = np.longdouble(10.0**log_sigma) ** 2
    centred = x.numpy().astype(np.longdouble) - index_of(parts).centre.numpy()  # |p|^2/(2 S) is what all share
    true = (
        -(gaps**2).sum(axis=2) / (2.0 * spread) + ((centred**2).sum(axis=1) / (2.0 * spread))[:, None] - math.log(40.0)
    )
    assert (np.abs(true - logits.numpy()) <= error.numpy() * (1.0 + 1e-12) + 1e-300).all()


def test_what_is_left_out_is_certified():
    x, components, alpha, sigma, options = asked(cloud("digits"), 0.3)
    found = device.posterior_moments(x, components, alpha, sigma, **options | {"tolerance": 1e-3})
    wanted = array_api.posterior_moments(x, components, alpha, sigma, **options)
    lost = 1.0 - torch.exp(found.log_mass - wanted.log_mass)
    assert (found.omitted > 0.0).all() and (lost <= found.omitted + 1e-12).all() and (lost > 1e-14).any()


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_less_precise_products_are_known_of(setting):
    """torch may be set to round the factors of float32 products: results are as right as without."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert device_precision.factor_rounding(torch.zeros(1)) > 0.0
        for dtype, rtol in (("float64", 1e-9), ("float32", 1e-5)):
            for sigma in (3.0, 0.5, 0.05):
                agree(asked(cloud("digits"), sigma, dtype), rtol)
    finally:
        torch.set_float32_matmul_precision(before)


def test_gradients_with_respect_to_data_are_the_references():
    points = torch.tensor(digits()[:600], requires_grad=True)
    x = points.detach()[:4] + 0.5
    gradients = []
    for name in ("device", "array-api"):
        with use(name):
            value = PointMasses(points).diffuse(1.0, 0.5).log_density(x).sum()
        gradients.append(torch.autograd.grad(value, points)[0])
    torch.testing.assert_close(*gradients)


def test_full_memory_makes_tiles_smaller(monkeypatch):
    """What does not fit is tried again in halves, and said."""
    tiles, whole = [], device_products.DeviceProducts.run

    def crowded(self):
        tiles.append(self.tile)
        if self.tile > 500:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        whole(self)

    monkeypatch.setattr(device_products.DeviceProducts, "run", crowded)
    monkeypatch.setattr(device_products, "PRODUCT", 12 * 64 * 2000)
    monkeypatch.setattr("dfmath.backends.device_memory.LEAST", 2**10)
    with pytest.warns(RuntimeWarning, match=r"device cpu had no room for the usual tiles: they are 1/4 as large now"):
        agree(asked(cloud("digits"), 20.0), 1e-9)
    assert tiles[:3] == [2000, 1000, 500]
    monkeypatch.setattr(
        device_products.DeviceProducts, "run", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("x"))
    )
    with pytest.raises(
        MemoryError, match="must have room for tiles of 1024 numbers and a block of queries, got: x; give fewer"
    ):
        agree(asked(cloud("digits"), 20.0), 1e-9)


def test_few_components_and_other_forms_go_to_the_reference(monkeypatch):
    monkeypatch.setattr(device, "_by_what_suits", None)
    points = torch.from_numpy(digits())
    for prior in (PointMasses(points[:100]), GaussianMixture(points, torch.full_like(points, 0.1))):
        with use("device"):
            assert torch.isfinite(prior.diffuse(1.0, 0.5).score(points[:2])).all()
    with use("device"):
        assert np.isfinite(PointMasses(digits()).diffuse(1.0, 0.5).score(digits()[:2])).all()
