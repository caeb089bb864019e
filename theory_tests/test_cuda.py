"""The fused CUDA kernels: their own source, run on the host thread by thread, beside exact sums and the reference."""

from __future__ import annotations

import math
import shutil
import subprocess
from fractions import Fraction

import cuda_on_host
import numpy as np
import pytest
import torch
from dfmath.backends import array_api, cuda, cuda_passes, device, device_tiles, merge, use
from dfmath.backends.device_tiles import Law, Tile
from test_device import agree, asked, cloud

from dfmath import PointMasses

pytestmark = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="needs g++ to compile the kernels for the host")
FORMS = frozenset({"mean", "trace", "product", "diagonal"})


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_on_host.Host(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def kernels(library, monkeypatch):
    """Kernels for tensors of the CPU."""
    library.backwards, library.started = False, []
    monkeypatch.setattr(cuda, "usable", lambda array: isinstance(array, torch.Tensor))
    monkeypatch.setattr(cuda, "launch", library.launch)
    return library


def tile(count=9000, queries=3, dtype=torch.float32, seed=0):
    """Products of nothing in particular, some components weightless, over three blocks of columns."""
    rng = np.random.default_rng(seed)
    logs = np.where(rng.random(count) < 0.1, -math.inf, rng.standard_normal(count))
    law = Law(*(torch.from_numpy(rng.random(queries)) for _ in range(4)), 1e-3, 1e-2)
    products = torch.from_numpy(10.0 * rng.standard_normal((queries, count))).to(dtype)
    return Tile(100, products, torch.from_numpy(rng.random(count)), torch.from_numpy(logs), law)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_passes_over_tiles_are_those_of_the_array_lines(kernels, dtype, monkeypatch):
    top, cut = torch.tensor([30.0, 20.0, 25.0], dtype=torch.float64), torch.full((3,), 12.0, dtype=torch.float64)

    def both():
        return device_tiles.largest_lower_bound(tile(dtype=dtype)), *device_tiles.weights_and_sums(
            tile(dtype=dtype), top, cut
        )

    ours = both()
    monkeypatch.setattr(cuda, "usable", lambda array: False)
    theirs = both()
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-7 if mine.dtype == torch.float32 else 1e-13, atol=0.0)
    assert (theirs[1] == 0.0).any() and (theirs[1] > 0.0).any()


@pytest.mark.parametrize("most", [9000, 40])
@pytest.mark.parametrize("margin", [3.0, 12.0, math.inf])
def test_candidates_are_listed_in_order(kernels, monkeypatch, most, margin):
    """The same list as the array lines make, also where it has no room for all, and behind what is in it already."""
    found = []
    for fused in (True, False):
        monkeypatch.setattr(cuda, "usable", lambda array, fused=fused: fused)
        part = tile()
        threshold = device_tiles.largest_lower_bound(part) - margin
        kept = torch.tensor([0, 2, 39])
        listed = torch.full((3, most), -1)
        for _ in range(2):
            kept = device_tiles.take_candidates(part, threshold, kept, listed)
        found.append((kept, listed))
    (ours, mine), (theirs, wanted) = found
    assert torch.equal(ours, theirs) and torch.equal(mine, wanted)
    assert (ours > 0).all() and int(mine.max()) >= 100


def test_distances_are_right_to_twice_the_precision(kernels):
    rng = np.random.default_rng(1)
    points = 1e3 + 1e-3 * rng.standard_normal((20, 300))
    x, alpha = points[:2] * 0.8 + 1e-9 * rng.standard_normal((2, 300)), np.array([0.8, 0.7])
    listed = np.array([[0, 5, -1, 19], [3, 1, 1, -1]])
    high, low = cuda_passes.squared_distances(*map(torch.from_numpy, (x, alpha, points, listed)))
    for b in range(2):
        for place, k in enumerate(listed[b]):
            gaps = [Fraction(u) - Fraction(alpha[b]) * Fraction(v) for u, v in zip(x[b], points[k], strict=True)]
            exact = sum(gap * gap for gap in gaps) if k >= 0 else Fraction(0)
            found = Fraction(float(high[b, place])) + Fraction(float(low[b, place]))
            assert abs(found - exact) <= exact * Fraction(1, 2**90)


def test_sums_over_lists_are_those_of_numpy(kernels):
    rng = np.random.default_rng(2)
    points = rng.standard_normal((50, 200)).astype(np.float32)
    listed = np.array([[4, 9, 30, -1], [0, 1, 2, 49]])
    weights = np.where(listed < 0, 0.0, rng.random((2, 4)))
    anchors, probes = np.array([9, 49]), rng.standard_normal((2, 200, 3))
    few = [torch.from_numpy(a) for a in (points, listed, anchors)]
    offsets = points.astype(np.float64)[listed] - points.astype(np.float64)[anchors][:, None, :]
    first, second = cuda_passes.sums_of_offsets(*few, torch.from_numpy(weights))
    np.testing.assert_allclose(first, np.einsum("bl,bld->bd", weights, offsets), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(second, np.einsum("bl,bld->bd", weights, offsets**2), rtol=1e-12)
    along = np.where(listed[:, :, None] < 0, 0.0, np.einsum("bld,bdp->blp", offsets, probes))
    found = cuda_passes.along_probes(*few, torch.from_numpy(probes))
    np.testing.assert_allclose(found, along, rtol=1e-12, atol=1e-12)
    factors = weights[:, :, None] * along
    products = cuda_passes.sums_of_products(*few, torch.from_numpy(factors))
    np.testing.assert_allclose(products, np.einsum("blp,bld->bdp", factors, offsets), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("space", ["score", "posterior"])
@pytest.mark.parametrize("kind", ["digits", "pixels", "pairs", "line"])
def test_every_level_is_as_the_reference_has_it(kernels, kind, space):
    for sigma in (3.0, 0.3, 0.02):
        *arguments, options = asked(cloud(kind), sigma, space=space, count=5)
        agree((*arguments, options | {"want": FORMS}), 1e-9)


def test_single_precision_and_mixtures(kernels):
    for sigma in (3.0, 0.3, 0.02):
        *arguments, options = asked(cloud("digits"), sigma, "float32", count=5)
        agree((*arguments, options | {"want": FORMS}), 1e-5)
    *arguments, options = asked(cloud("digits"), 0.3, space="posterior", count=5, variance=0.01)
    agree((*arguments, options | {"want": FORMS}), 1e-9)


def test_nothing_depends_on_the_order_of_threads_and_blocks(kernels):
    """Turned round, every thread and block comes in another order: the results have the same bits."""
    found = []
    for backwards in (False, True):
        kernels.backwards = backwards
        for sigma, dtype in ((0.02, "float64"), (0.3, "float64"), (20.0, "float32"), (20.0, "float64")):
            *arguments, options = asked(cloud("digits"), sigma, dtype, count=4)
            found.append(device.posterior_moments(*arguments, **options | {"want": FORMS}))
    for ours, theirs in zip(found[:4], found[4:], strict=True):
        assert torch.equal(ours.log_mass, theirs.log_mass) and torch.equal(ours.mean, theirs.mean)
        assert torch.equal(ours.between.product, theirs.between.product)
        assert torch.equal(ours.between.diagonal, theirs.between.diagonal)
    families = {name.removesuffix("_float").removesuffix("_double") for name in kernels.signatures}
    assert {name.removesuffix("_float").removesuffix("_double") for name in kernels.started} == families


def test_dense_matrices_are_gathered(kernels):
    agree(asked(cloud("digits"), 0.05, count=3), 1e-9)


def test_points_in_any_order_of_memory(kernels):
    """Tensors that are views, such as transposed ones, are laid out before their memory is read."""
    held = torch.from_numpy(np.ascontiguousarray(cloud("digits").T)).T
    assert not held.is_contiguous()
    x = held[:3] + 0.02
    found = PointMasses(held).diffuse(1.0, 0.05).score(x)
    assert any(name.startswith("squared_distances") for name in kernels.started)
    with use(array_api.name):
        wanted = PointMasses(held).diffuse(1.0, 0.05).score(x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to compile for devices")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
def test_kernels_compile_for_devices(tmp_path, architecture):
    target = tmp_path / "kernels.ptx"
    flags = ["-std=c++17", "-fmad=false", f"-arch={architecture}", "-Werror", "all-warnings"]
    subprocess.run([shutil.which("nvcc"), "-ptx", *flags, "-o", target, cuda.SOURCE], check=True, capture_output=True)
    assert target.read_text().count(".entry") == 14


def test_means_are_kept_in_two_terms(kernels):
    """Far from the origin what joins two halves of the components is the difference of their means."""
    points = cloud("digits")[:600] + 1e6
    points = np.concatenate([points, points + 1e-4])
    x, whole, alpha, sigma, options = asked(points, 0.01, space="posterior", count=4, variance=1e-6)
    options |= {"want": frozenset({"trace"})}
    wanted = array_api.posterior_moments(x, whole, alpha, sigma, **options)
    halves = [whole.tile(start, start + 600, torch.float64) for start in (0, 600)]
    parts = [device.posterior_moments(x, half, alpha, sigma, **options) for half in halves]
    assert kernels.started.count("sums_of_offsets_double") == 2
    found = merge(*parts, options["want"])
    torch.testing.assert_close(found.between.trace, wanted.between.trace, rtol=1e-9, atol=0.0)
