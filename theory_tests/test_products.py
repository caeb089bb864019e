"""Moments by matrix products, and the screens that leave few components to take up from differences."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from clouds import asked, cloud, clouds, exact_logits, exact_residuals
from dfmath.backends import bfloat16, index, numba_cpu, posterior_moments, products, screening, use
from dfmath.backends.index import Index, index_of
from dfmath.backends.numba_arithmetic import exp_in_place
from dfmath.backends.threaded import all_pairs, chunked, threads, weighted_sums
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numba import njit

from dfmath import GaussianMixture, PointMasses

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


def screened(ask, kind, monkeypatch):
    """All upper bounds of a screen, (B, N)."""
    monkeypatch.setattr(index, "SAMPLE", 1)
    monkeypatch.setattr(index, "SKETCH_LEAST", 1)
    monkeypatch.setattr(index, "SKETCH_SHARE", 2)
    here, count = Index(ask.components), ask.components.count
    if kind == "sketch" and here.sketch is None:
        return None
    screen = screening.Screen(numba_cpu._problem(ask), here, kind)
    upper, _ = screen.bounds(here.whole, 0, count, np.full(len(ask.queries), -np.inf))
    return np.concatenate(list(upper), axis=1)[:, :count]


KINDS = ["sketch", pytest.param("bfloat16", marks=needs_torch), "float32"]


@pytest.mark.parametrize("kind", KINDS)
@given(**clouds)
@settings(max_examples=80)
def test_bounds_are_above_the_logits(kind, seed, count, dim, offset, scale, noise, dtype):
    """For every component and query, however near, far or crowded [MATH 4.8]."""
    points = cloud(seed, count, dim, offset, scale, dtype)
    rng, alpha, sigma = np.random.default_rng(seed + 1), 0.7, scale * noise
    x = alpha * points[rng.integers(len(points), size=3)].astype(np.float64) + sigma * rng.standard_normal((3, dim))
    ask = asked(points, x, alpha, sigma)
    with pytest.MonkeyPatch.context() as patch:
        upper = screened(ask, kind, patch)
    if upper is None:
        return
    exact = exact_logits(points, ask.components.log_weights[0], x, alpha, sigma)
    assert (upper >= exact).all()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_bounds_without_their_rounding_terms_are_not(kind, monkeypatch):
    """The test above can fail: bounds from the product alone are below some logits, of queries near a point each."""
    points = cloud(0, 24, 200, 0.0, 1.0, np.float32)
    x = 0.7 * points.astype(np.float64) + 0.001 * np.random.default_rng(0).standard_normal(points.shape)
    ask = asked(points, x, 0.7, 0.001)
    monkeypatch.setattr(screening, "gamma", lambda terms, unit: 0.0)
    monkeypatch.setattr(bfloat16, "error", lambda dim: 2.0**-12)
    upper = screened(ask, kind, monkeypatch)
    assert (upper < exact_logits(points, ask.components.log_weights[0], x, 0.7, 0.001)).any()


@needs_torch
def test_bfloat16_is_rounded_as_torch_does():
    """To nearest, ties to even, and back without loss; chunks beyond the last point stay as they are."""
    import torch

    rng = np.random.default_rng(0)
    x, points = (rng.standard_normal((count, 300)).astype(np.float32) for count in (5, 37))
    x[0, :4] = [1.0 + 2.0**-8, 1.0 + 3.0 * 2.0**-8, -1.0 - 2.0**-8, 0.0]  # two ties, a negative one
    out = np.full((4, 5, 10), np.float32(7.0))
    bfloat16.all_pairs(x, points, out)
    rounded = torch.from_numpy(x).to(torch.bfloat16), torch.from_numpy(points).to(torch.bfloat16)
    wanted = (rounded[0] @ rounded[1].T).float().numpy()
    np.testing.assert_array_equal(np.concatenate(list(out), axis=1)[:, :37], wanted)
    assert (out[3, :, 7:] == 7.0).all()


@needs_torch
def test_a_cpu_with_matrix_units_gets_the_same_results(monkeypatch):
    """The bfloat16 screen leaves few points over and changes nothing; float32 is asked what it can't tell apart."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((3000, 300)).astype(np.float32)
    q, asked_for = PointMasses(points), []
    plain = screening.Screen.bounds

    def counting(self, *args):
        asked_for.append(self.kind)
        return plain(self, *args)

    monkeypatch.setattr(bfloat16, "matrix_units", lambda: True)
    monkeypatch.setattr(numba_cpu, "TRY", 0.0)
    monkeypatch.setattr(screening.Screen, "bounds", counting)
    for sigma, kinds in ((0.3, {"bfloat16"}), (20.0, {"bfloat16", "float32"})):
        asked_for.clear()
        x = points[:20] + sigma * rng.standard_normal((20, 300)).astype(np.float32)
        found = q.diffuse(1.0, sigma).evaluate(x, ["trace"])
        assert set(asked_for) == kinds
        with use("array-api"):
            wanted = q.diffuse(1.0, sigma).evaluate(x, ["trace"])
        np.testing.assert_allclose(found.score, wanted.score, rtol=1e-5, atol=1e-5 * np.abs(wanted.score).max())
        np.testing.assert_allclose(found.trace, wanted.trace, rtol=1e-5)


@given(**clouds)
@settings(max_examples=80)
def test_errors_of_product_logits_are_certified(seed, count, dim, offset, scale, noise, dtype):
    """log q from products alone, whether or not it would be used, within its own bound [MATH 4.9]."""
    points = cloud(seed, count, dim, offset, scale, dtype)
    rng, alpha, sigma = np.random.default_rng(seed + 1), 0.7, scale * noise
    x = alpha * points[rng.integers(len(points), size=3)].astype(np.float64) + sigma * rng.standard_normal((3, dim))
    exact = exact_logits(points, PointMasses(points).components.log_weights[0], x, alpha, sigma)
    top = exact.max(axis=1, keepdims=True)
    wanted = top[:, 0] + np.log(np.exp(exact - top).sum(axis=1))
    for working in (np.float32, np.float64):
        ask = asked(points, x, alpha, sigma, float(np.finfo(working).eps), tolerance=0.0)
        assert ask.dtype == working
        if not np.isfinite(products.logit_error(ask)).all():
            continue
        way = products.Products(ask)
        with threads(1):
            way.run()
        found = way.moments()
        slack = 1e-13 * (1.0 + np.abs(wanted))  # of the constant, which every way shares
        assert (np.abs(found.log_mass - wanted) <= found.logit_error + slack).all()


@pytest.mark.parametrize("space", ["score", "posterior"])
@pytest.mark.parametrize("noise", [0.003, 0.05, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("variance", [None, 0.04])
@pytest.mark.parametrize("columns", [1, 6])
def test_both_ways_are_the_reference(space, noise, variance, columns, monkeypatch):
    """Every form, by products, by differences, and by what is chosen, in both precisions; few probes and many."""
    rng = np.random.default_rng(0)
    points, v = 2.0 + rng.standard_normal((700, 6)), rng.standard_normal((9, 6, columns))
    prior = PointMasses(points) if variance is None else GaussianMixture(points, variance)
    x = 0.9 * points[:9] + noise * rng.standard_normal((9, 6))
    ask = (x, prior.components, np.array([0.9]), np.array([noise]), ("trace", "diagonal", "product", "dense"))
    with use("array-api"):
        wanted = posterior_moments(*ask, space=space, probes=v)
    for attempts, precision, rtol in ((0.0, 2e-16, 1e-10), (20.0, 2e-16, 1e-10), (20.0, 1.2e-7, 1e-5)):
        monkeypatch.setattr(numba_cpu, "TRY", attempts)
        found = posterior_moments(*ask, space=space, probes=v, tolerance=1e-290, precision=precision)
        for name in ("trace", "diagonal", "product", "dense"):
            got, true = (getattr(m.between, name).reshape(9, -1) for m in (found, wanted))
            beside = np.linalg.norm(true, axis=1) + np.linalg.norm(wanted.within.dense, axis=(1, 2))
            beside = beside * (np.linalg.norm(v, axis=(1, 2)) if name == "product" else 1.0)
            assert (np.linalg.norm(got - true, axis=1) <= rtol * np.maximum(beside, 1e-290)).all(), (name, attempts)
        assert (np.linalg.norm(found.mean - wanted.mean, axis=1) <= rtol * np.linalg.norm(wanted.mean, axis=1)).all()


@pytest.mark.parametrize("count", [3, 40, 2500])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variances", [False, True])
def test_products_with_many_probes(count, dtype, variances):
    """F times a matrix: from few vectors, from more than dimensions, from products of coordinates kept and not kept."""
    rng = np.random.default_rng(0)
    points, matrix = rng.standard_normal((count, 9)).astype(dtype), rng.standard_normal((30, 9, 9)).astype(dtype)
    x = (points[rng.integers(count, size=30)] + 0.1 * rng.standard_normal((30, 9))).astype(dtype)
    sigma = np.geomspace(0.01, 10.0, 30)  # every share of the weights is zero for some of the queries
    own = rng.uniform(0.01, 0.1, count).astype(dtype)
    q = (GaussianMixture(points, own) if variances else PointMasses(points)).diffuse(np.ones(30), sigma)
    found = q.fisher(x) @ matrix
    with use("array-api"):
        wanted = q.fisher(x).to_dense().astype(np.float64) @ matrix
    size = np.linalg.norm(wanted, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(found / size, wanted / size, atol=1e-5 if dtype == "float32" else 1e-10)


def test_the_sketch_leaves_results_alone(monkeypatch):
    """High dimensions and many points: bounds along principal directions change nothing, and leave little to do."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((10, 240))
    points = (rng.standard_normal((4500, 10)) @ basis + 0.1 * rng.standard_normal((4500, 240))).astype(np.float32)
    q = PointMasses(points).diffuse(1.0, 0.05)
    x = points[:300] + 0.05 * rng.standard_normal((300, 240)).astype(np.float32)
    monkeypatch.setattr(numba_cpu, "TRY", 0.0)
    found = q.evaluate(x, ["trace"])
    assert index_of(q.components).sketch is not None
    assert found.exact_components.mean() < 0.05 * len(points)
    with use("array-api"):
        wanted = q.evaluate(x[:20], ["trace"])
    np.testing.assert_allclose(found.score[:20], wanted.score, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.trace[:20], wanted.trace, rtol=1e-6)


def test_evaluate_is_what_the_methods_say():
    rng = np.random.default_rng(0)
    points, v = rng.standard_normal((50, 3)), rng.standard_normal((4, 3, 2))
    q, x = PointMasses(points).diffuse(0.8, 0.5), rng.standard_normal((4, 3))
    found, fisher = q.evaluate(x, ["trace", "diagonal", "product", "dense"], v), q.fisher(x)
    for got, wanted in (
        (found.log_density, q.log_density(x)),
        (found.score, q.score(x)),
        (found.posterior_mean, q.posterior_mean(x)),
        (found.trace, fisher.trace()),
        (found.diagonal, fisher.diagonal()),
        (found.product, fisher @ v),
        (found.dense, fisher.to_dense()),
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-12)
    assert q.evaluate(x, ()).trace is None


@pytest.mark.parametrize(
    ("want", "probes", "message"),
    [
        (["trace", "hessian"], None, "want must be of trace, diagonal, product, dense, got 'hessian'"),
        (["product"], None, "probes belong to 'product': give both or neither"),
        (["trace"], np.zeros((4, 3, 1)), "probes belong to 'product': give both or neither"),
        (["product"], np.zeros((4, 2, 1)), "probes must have shape (4, 3, k), got array of shape (4, 2, 1)"),
    ],
)
def test_evaluate_says_what_is_wrong(want, probes, message):
    q = PointMasses(np.eye(3)).diffuse(1.0, 1.0)
    with pytest.raises(ValueError) as caught:
        q.evaluate(np.zeros((4, 3)), want, probes)
    assert message.split(", got")[0] in str(caught.value)


BLAS = """
from threadpoolctl import threadpool_info
from dfmath.backends.threaded import threads

def blas():
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

before = blas()
with threads(1):
    inside = blas()
print(set(before), set(inside), blas() == before)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="BLAS has one thread anyway")
def test_blas_has_one_thread_inside_and_its_own_again_outside():
    """In a process of its own: what else has been loaded, or still works in the background, has a say in this one."""
    options = {"OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", BLAS], env={**os.environ, **options}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "{2} {1} True\n"


OVERLAPPING = """
from threadpoolctl import threadpool_info
from dfmath.backends.threaded import threads

def blas():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

first, second, seen = threads(1), threads(1), []
for step in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
    step()
    seen.append(blas())
second.__exit__(None, None, None)
print(seen, blas())
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="BLAS has one thread anyway")
def test_blas_is_held_until_the_last_of_several_callers_leaves():
    """As Python threads do that evaluate at once: one comes while another is inside, and stays longer."""
    options = {"OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", OVERLAPPING], env={**os.environ, **options}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[{1}, {1}, {1}] {2}\n"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65])
def test_chunked_products(count):
    rng = np.random.default_rng(count)
    x, y = rng.standard_normal((3, 7)), rng.standard_normal((count, 7))
    out, total = chunked(3, count, np.float64), np.ones((3, 7))
    all_pairs(x, y, out)
    np.testing.assert_allclose(np.concatenate(list(out), axis=1)[:, :count], x @ y.T, rtol=1e-13)
    weighted_sums(out, y, total)
    np.testing.assert_allclose(total, 1.0 + (x @ y.T) @ y, rtol=1e-12)


MEMORY = """
import sys, threading
import numpy as np
from dfmath import PointMasses

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

few = np.eye(64, dtype=np.float32)
PointMasses(few).diffuse(1.0, 1.0).evaluate(np.zeros((300, 64), np.float32), ["trace"])  # compilation is not measured
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], anonymous() - before)

watcher = threading.Thread(target=watch)
watcher.start()
y = np.load(sys.argv[1], mmap_mode="r")
rng, sigma = np.random.default_rng(1), float(sys.argv[2])
x = y[rng.integers(len(y), size=4096)] + np.float32(sigma) * rng.standard_normal((4096, 64)).astype(np.float32)
PointMasses(y).diffuse(1.0, sigma).evaluate(x, ["trace"])
done.set()
watcher.join()
print(peak[0] / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell anonymous memory apart")
@pytest.mark.parametrize("sigma", [0.05, 10.0])
def test_memory_beside_a_mapped_file(sigma, tmp_path):
    """2,000,000 x 64 points from a file and 4096 queries, at low noise and at high: less than 300 MiB beside it."""
    rng, path = np.random.default_rng(0), tmp_path / "points.npy"
    y = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(2_000_000, 64))
    centres = rng.standard_normal((2000, 64)).astype(np.float32)
    for rows in np.split(y, 20):
        rows[:] = centres[rng.integers(2000, size=len(rows))] + 0.3 * rng.standard_normal(rows.shape)
    y.flush()
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path), str(sigma)], capture_output=True, text=True, timeout=1800, check=True
    )
    assert 1.0 < float(done.stdout) < 300.0, done.stdout


@pytest.mark.slow
@given(**{**clouds, "count": st.integers(1, 12), "dim": st.sampled_from([1, 2, 7, 40])})
@settings(max_examples=10_000)
def test_error_bounds_are_never_below_the_error(seed, count, dim, offset, scale, noise, dtype):
    """F v of default float32 and float64 results: 10,000 cases [MATH 4.8, 4.9].

    Residuals are exact, the rest of the truth is in extended precision.
    """
    points = cloud(seed, count, dim, offset, scale, dtype)
    rng, alpha, sigma = np.random.default_rng(seed + 1), 0.7, scale * noise
    assume(sigma**-2 < 1e37 or dtype == np.float64)  # F must be a number in the result's dtype
    x = alpha * points[rng.integers(len(points), size=2)] + sigma * rng.standard_normal((2, dim))
    x, v = x.astype(dtype), rng.standard_normal((2, dim)).astype(dtype)
    fisher = PointMasses(points).diffuse(alpha, sigma).fisher(x)
    spread = np.longdouble(sigma) ** 2
    squares = (exact_residuals(x, alpha, points) ** 2).sum(axis=2)
    logits = (squares.min(axis=1, keepdims=True) - squares) / (2 * spread)
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    offsets = points.astype(np.longdouble)[None] - points.astype(np.longdouble)[logits.argmax(axis=1)][:, None]
    centred = offsets - (weights[:, :, None] * offsets).sum(axis=1, keepdims=True)
    along = (centred * v[:, None, :].astype(np.longdouble)).sum(axis=2)
    covariance = (weights[:, :, None] * centred * along[:, :, None]).sum(axis=1)
    wanted = v / spread - (np.longdouble(alpha) / spread) ** 2 * covariance
    error = np.linalg.norm((fisher.matvec(v) - wanted).astype(np.float64), axis=1)
    length = np.linalg.norm(v.astype(np.float64), axis=1)
    assert (error <= fisher.error_bound().astype(np.float64) * length * (1 + 1e-6)).all()


@pytest.mark.parametrize(("dtype", "lowest"), [(np.float64, -700.0), (np.float32, -85.0)])
def test_exponentials_are_right_to_two_units_in_the_last_place(dtype, lowest):
    @njit
    def exponentials(values, powers):
        exp_in_place(values, powers)

    x = np.append(np.linspace(lowest, 0.0, 100_001), -np.geomspace(1e-30, 1.0, 1000)).astype(dtype)
    found = x.copy()
    exponentials(found, np.empty(len(x), dtype=np.int32))
    wanted = np.exp(x.astype(np.longdouble))
    assert (np.abs(found - wanted) <= 2 * np.finfo(dtype).eps * wanted).all()


@pytest.mark.parametrize("sigma", [0.06, 0.14, 0.3])
def test_many_components_that_single_precision_confuses_are_taken_from_double_products(sigma):
    """Right to 1e-5, without taking components up one by one; where few matter, they are."""
    rng = np.random.default_rng(0)
    points = (3.0 + rng.random((20_000, 2))).astype(np.float32)
    x = (points[:32] + sigma * rng.standard_normal((32, 2))).astype(np.float32)
    found = PointMasses(points).diffuse(1.0, sigma).evaluate(x)
    with use("array-api"):
        wanted = PointMasses(points.astype(np.float64)).diffuse(1.0, sigma).evaluate(x.astype(np.float64))
    assert (found.exact_components == 0).mean() > 0.9
    np.testing.assert_allclose(found.trace, wanted.trace, rtol=1e-5, atol=1e-5 / sigma**2)
    np.testing.assert_allclose(found.score, wanted.score, rtol=1e-5, atol=1e-5 / sigma)
    few = PointMasses(points).diffuse(1.0, 1e-3).evaluate(points[:32])
    assert (few.exact_components > 0).all()
