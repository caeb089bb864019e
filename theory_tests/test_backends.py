"""Posterior moments: every backend, tile, order of merging and thread count gives the same, within bounded memory."""

from __future__ import annotations

import threading
import tracemalloc
from dataclasses import fields, replace
from functools import reduce
from itertools import pairwise, permutations

import array_api_strict
import numba
import numpy as np
import pytest
import torch
from dfmath.backends import array_api, available, backend_for, merge, numba_cpu, posterior_moments, use
from helpers import (
    FORMS,
    KINDS,
    NUMBA,
    QUANTITIES,
    SINGULAR_FORMS,
    Problem,
    accuracy_problem,
    assert_matches,
    computed,
    mixture_problem,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from strategies import problems

from dfmath import GaussianMixture, PointMasses

EVERYTHING = ("mean", "trace", "diagonal", "product", "dense")


def moments_of(problem, space="posterior", backend="array-api", want=EVERYTHING, tolerance=0.0):
    q = problem.marginal()
    probes = np.stack([problem.v, problem.x], axis=2)
    with use(backend):
        return posterior_moments(
            problem.x, q.components, q.alpha, q.sigma, want, space=space, probes=probes, tolerance=tolerance
        )


def parts_of(moments):
    """All arrays of a result, by name; the mean as one number."""
    values = {"log_mass": moments.log_mass + moments.log_mass_low, "mean": moments.mean}
    for which in ("within", "between"):
        second = getattr(moments, which)
        values |= {f"{which}.{field.name}": getattr(second, field.name) for field in fields(second)}
    return values


def assert_same(got, expected, rtol, sizes=None):
    """Every part, relative to its own size or that of the terms it is a sum of."""
    got, expected = parts_of(got), parts_of(expected)
    for name, value in expected.items():
        scale = 1.0 if name == "log_mass" else 1e-100 + (0.0 if sizes is None else sizes.get(name, 0.0))
        try:
            assert_matches(got[name], value, rtol, scale, like=value)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# Merging


def components_of(problem):
    return problem.marginal().components


def over(problem, start, stop, space):
    """Moments over some of the components alone."""
    q = problem.marginal()
    tile = q.components.tile(start, stop, np.float64)
    x, probes = problem.x, np.stack([problem.v, problem.x], axis=2)
    here = array_api.local(x, tile, q.alpha, q.sigma)
    return array_api.tile_moments(here, frozenset(EVERYTHING), space, probes), probes


@pytest.mark.parametrize("space", ["posterior", "score"])
@pytest.mark.parametrize("form", [None, *FORMS, *SINGULAR_FORMS])
def test_merging_is_commutative_and_associative(form, space):
    """One component at a time, in every order and both groupings, against one pass over all three."""
    problem = mixture_problem(form or "zero", np.array([0.3, 1.0, 5.0]), seed=1, alpha=np.array([1.0, 0.7, 0.2]))
    problem = problem if form else replace(problem, covariances=None)
    whole = over(problem, 0, 3, space)[0]
    parts = [over(problem, k, k + 1, space) for k in range(3)]
    probes, parts = parts[0][1], [part for part, _ in parts]
    join = lambda a, b: merge(a, b, frozenset(EVERYTHING), probes)  # noqa: E731
    for a, b, c in permutations(parts):
        assert_same(join(join(a, b), c), whole, 1e-12)
        assert_same(join(a, join(b, c)), whole, 1e-12)


def test_merging_with_nothing_changes_nothing():
    problem = mixture_problem("scalar", 1.0, seed=1)
    nothing = over(replace(problem, log_weights=np.array([-np.inf, 0.0, 0.0])), 0, 1, "posterior")[0]
    assert (nothing.log_mass == -np.inf).all()
    whole, probes = over(problem, 0, 3, "posterior")
    for merged in (
        merge(nothing, whole, frozenset(EVERYTHING), probes),
        merge(whole, nothing, frozenset(EVERYTHING), probes),
    ):
        assert_same(merged, whole, 0.0)
    both = merge(nothing, nothing, frozenset(EVERYTHING), probes)
    assert (both.log_mass == -np.inf).all() and not np.isnan(both.within.dense).any()


def test_covariance_of_two_halves_is_chans():
    """Cov = f_a Cov_a + f_b Cov_b + f_a f_b delta delta^T, by numbers: points -1 and 1 against 3 and 5."""
    points = np.array([[-1.0], [1.0], [3.0], [5.0]])
    problem = Problem(points, np.zeros((1, 1)), np.ones((1, 1)), 1e-9, 1.0)
    halves = [over(problem, 0, 2, "posterior"), over(problem, 2, 4, "posterior")]
    merged = merge(halves[0][0], halves[1][0], frozenset(EVERYTHING), halves[0][1])
    assert merged.mean[0, 0] == pytest.approx(2.0, rel=1e-8)
    assert merged.between.trace[0] == pytest.approx(5.0, rel=1e-8)


@given(problems(), st.sampled_from(["posterior", "score"]), st.randoms(use_true_random=False))
def test_any_partition_gives_the_whole(problem, space, random):
    """Nasty priors cut at random places and merged in random order."""
    count = len(problem.centres)
    cuts = sorted({0, count, *random.choices(range(count + 1), k=3)})
    pieces = [over(problem, a, b, space) for a, b in pairwise(cuts)]
    random.shuffle(pieces)
    merged = reduce(lambda a, b: merge(a, b, frozenset(EVERYTHING), pieces[0][1]), (piece for piece, _ in pieces))
    assert_same(merged, over(problem, 0, count, space)[0], 1e-10, sizes_of(problem, space))


def sizes_of(problem, space):
    """How large the terms of each part are: what rounding is relative to."""
    _, sizes = problem.truth()
    name, other = ("mean", "covariance") if space == "posterior" else ("score", "fisher")
    second = sizes[f"{other}_trace"] + 1e-13 * sizes[name] ** 2 * (problem.covariances is not None)
    v = np.abs(problem.v).max() + np.abs(problem.x).max()
    matrices = {f"{which}.{form}": second for which in ("within", "between") for form in ("trace", "diagonal", "dense")}
    return {"mean": sizes[name], **matrices, "within.product": v * second, "between.product": v * second}


# Backends, tiles and threads


@pytest.mark.parametrize("space", ["posterior", "score"])
@pytest.mark.parametrize("form", [None, "scalar", "per-component", "some-zero"])
def test_numba_is_the_reference(form, space):
    rng = np.random.default_rng(0)
    count, queries = 3000, 70
    c = {None: None, "scalar": 0.3}.get(form, rng.uniform(0.0, 2.0, count))
    if form == "some-zero":
        c[::2] = 0.0
    points = np.array([3.0, -2.0, 1.0]) + rng.standard_normal((count, 3))
    x = 0.9 * points[:queries] + 0.2 * rng.standard_normal((queries, 3))
    problem = Problem(points, x, rng.standard_normal(x.shape), 0.9, 0.2, c, np.log(rng.uniform(0.1, 1.0, count)))
    assert_same(moments_of(problem, space, "numba"), moments_of(problem, space), 1e-11)


@given(problems(forms=(None, "scalar", "per-component", "some-zero")), st.sampled_from(["posterior", "score"]))
def test_numba_is_the_reference_for_nasty_priors(problem, space):
    expected = moments_of(problem, space)
    assert_same(moments_of(problem, space, "numba"), expected, 1e-10, sizes_of(problem, space))


@pytest.mark.parametrize("dim", [1, 2, 3, 64])
@pytest.mark.parametrize("backend", ["numba", "array-api"])
def test_forms_of_second_moments_are_of_one_matrix(backend, dim):
    rng = np.random.default_rng(0)
    points = rng.standard_normal((500, dim))
    problem = Problem(points, 0.9 * points[:5], rng.standard_normal((5, dim)), 0.9, 1.0, rng.uniform(0.1, 1.0, 500))
    probes = np.stack([problem.v, problem.x], axis=2)
    got = moments_of(problem, "score", backend)
    for second in (got.within, got.between):
        np.testing.assert_allclose(second.dense, second.dense.transpose(0, 2, 1), rtol=1e-12)
        np.testing.assert_allclose(second.diagonal, np.diagonal(second.dense, axis1=1, axis2=2), rtol=1e-11)
        np.testing.assert_allclose(second.trace, np.trace(second.dense, axis1=1, axis2=2), rtol=1e-11)
        np.testing.assert_allclose(second.product, second.dense @ probes, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", available())
def test_nothing_is_computed_unasked(backend):
    problem = mixture_problem("scalar", 1.0, seed=1)
    bare = moments_of(problem, backend=backend, want=())
    assert bare.anchor is None and bare.shift is None
    assert all(getattr(bare.within, field.name) is None for field in fields(bare.within))
    full = moments_of(problem, backend=backend)
    np.testing.assert_allclose(bare.log_mass, full.log_mass, rtol=1e-14)
    one = moments_of(problem, backend=backend, want=("diagonal",))
    assert one.between.dense is None and one.between.trace is None and one.between.product is None
    np.testing.assert_array_equal(one.between.diagonal, full.between.diagonal)


def set_tiles(monkeypatch, size):
    """One component of one query in a tile at the smallest, or everything in one."""
    monkeypatch.setattr(array_api, "TILE_ELEMENTS", size)
    monkeypatch.setattr(array_api, "QUERY_TILE", max(1, min(64, size // 100)))
    monkeypatch.setattr(numba_cpu, "TILE_BYTES", 8 * size)


@pytest.mark.parametrize("size", [1, 1000, 30_000, 10**7])
@pytest.mark.parametrize("kind", KINDS[:2], ids=lambda kind: kind.name)
@pytest.mark.parametrize("form", [None, "scalar", "per-component", "diagonal", "full", "low-rank"])
def test_tiles_of_any_size_are_right(form, kind, size, monkeypatch):
    """Components of the size of sigma, 1e-8 of their distance to the origin, merged tile by tile: against the truth."""
    set_tiles(monkeypatch, size)
    sigma, count, rng = 1e-4, 30, np.random.default_rng(0)
    c = None if form is None else covariances(form, count, sigma, rng)
    points = 1e4 + sigma * rng.standard_normal((count, 3))
    x = 0.9 * points[:4] + sigma * rng.standard_normal((4, 3))
    problem = Problem(points, x, rng.standard_normal((4, 3)), 0.9, sigma, c)
    truth, sizes = TRUTHS.setdefault(form, problem.truth())
    with kind.context():
        got = computed(problem.marginal(), problem.x, problem.v)
        for name in QUANTITIES:
            assert_matches(got[name], truth[name], 1e-12, sizes[name], like=problem.x)


TRUTHS = {}


def covariances(form, count, sigma, rng):
    if form == "scalar":
        return sigma**2
    if form == "low-rank":
        return sigma**2 * rng.uniform(0.1, 2.0, (count, 3)), sigma * rng.standard_normal((count, 3, 1))
    shape = {"per-component": (count,), "diagonal": (count, 3)}.get(form)
    if shape:
        return sigma**2 * rng.uniform(0.0, 2.0, shape)
    a = rng.standard_normal((count, 3, 3))
    c = sigma**2 * (a @ a.transpose(0, 2, 1))
    return (c + c.transpose(0, 2, 1)) / 2


def test_results_do_not_depend_on_the_number_of_threads():
    """Bit for bit: each query is worked on by one thread from start to end."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((5000, 3))
    problem = Problem(points, 0.9 * points[:37], rng.standard_normal((37, 3)), 0.9, 0.3)
    many = numba.get_num_threads()
    results = []
    try:
        for threads in range(1, 1 + min(4, numba.config.NUMBA_NUM_THREADS)):
            numba.set_num_threads(threads)
            results.append(parts_of(moments_of(problem, "score", "numba")))
    finally:
        numba.set_num_threads(many)
    assert len(results) > 1 or numba.config.NUMBA_NUM_THREADS == 1
    for name, first in results[0].items():
        for other in results[1:]:
            np.testing.assert_array_equal(other[name], first, err_msg=name)


def test_a_query_does_not_depend_on_its_batch():
    """Alone or among others, in the compiled backend: bit for bit from differences, to rounding from products."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((5000, 3))
    for sigma, rounding in ((1e-6, 0.0), (0.3, 1e-13)):
        problem = Problem(points, 0.9 * points[:37], rng.standard_normal((37, 3)), 0.9, sigma)
        together = parts_of(moments_of(problem, "score", "numba"))
        for b in (0, 17, 36):
            alone = parts_of(moments_of(problem.rows(slice(b, b + 1)), "score", "numba"))
            for name, value in alone.items():
                size = np.abs(together[name][b]).max()
                np.testing.assert_allclose(value[0], together[name][b], rtol=0, atol=rounding * size, err_msg=name)


# Tolerance


@pytest.mark.parametrize("tolerance", [1e-12, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(("way", "rounding"), [("differences", 1e-14), ("products", 1e-12)])
def test_tolerance_is_honoured_and_what_is_left_out_certified(sigma, tolerance, way, rounding, monkeypatch):
    """Log mass and mean are off by no more than the certificate allows [MATH 4.8], and it is within the tolerance."""
    if way == "differences":
        monkeypatch.setattr(numba_cpu, "TRY", 0.0)
    rng = np.random.default_rng(0)
    points = rng.standard_normal((4000, 2))
    problem = Problem(points, 0.9 * points[:20], rng.standard_normal((20, 2)), 0.9, sigma)
    got, exact = (moments_of(problem, backend="numba", tolerance=t) for t in (tolerance, 0.0))
    assert ((exact.logit_error > 0) == (way == "products")).all()
    assert (exact.omitted == 0).all()
    assert (got.omitted <= tolerance).all()
    lost = -np.expm1(got.log_mass - exact.log_mass)
    assert (lost >= -rounding).all() and (lost <= got.omitted + rounding).all()
    diameter = 2 * np.linalg.norm(points, axis=1).max()
    off = np.linalg.norm(got.mean - exact.mean, axis=1)
    assert (off <= got.omitted * diameter + 10 * rounding).all()
    spread = np.linalg.norm(got.between.dense - exact.between.dense, 2, axis=(1, 2))
    assert (spread <= got.omitted * diameter**2 + 10 * rounding).all()


def test_a_generous_tolerance_does_leave_something_out():
    problem = accuracy_problem(np.random.default_rng(0).standard_normal((4000, 2)), 0.3, 1)
    got, exact = (moments_of(problem, backend="numba", tolerance=t) for t in (0.1, 0.0))
    assert (got.omitted > 0).all() and (np.abs(got.log_mass - exact.log_mass) > 1e-12).any()


def test_the_reference_leaves_nothing_out():
    problem = accuracy_problem(np.random.default_rng(0).standard_normal((400, 2)), 0.3, 1)
    got, exact = (moments_of(problem, tolerance=t) for t in (0.5, 0.0))
    assert (got.omitted == 0).all()
    assert_same(got, exact, 0.0)


def test_default_tolerance_leaves_out_what_rounding_hides():
    points = np.concatenate([np.zeros((1, 1)), np.linspace(1.0, 40.0, 500)[:, None]])
    q = PointMasses(points).diffuse(1.0, 1.0)
    np.testing.assert_allclose(
        q.posterior_mean(np.zeros((1, 1)))[0, 0], softmax(-0.5 * points[:, 0] ** 2) @ points[:, 0], rtol=1e-13
    )
    assert 0 < q.moments(np.zeros((1, 1)), ("mean",)).omitted[0] <= np.finfo(np.float64).eps
    assert 0 < q.moments(np.zeros((1, 1)), ("mean",), dtype=np.float32).omitted[0] <= np.finfo(np.float32).eps
    assert q.posterior_mean(np.zeros((1, 1), dtype=np.float32)).dtype == np.float32


# Choosing a backend


def chosen(array):
    return backend_for(array).__name__.rsplit(".", 1)[1]


def test_each_array_has_its_backend():
    assert chosen(np.zeros(1)) == "numba_cpu"
    assert chosen(torch.zeros(1)) == "device" and chosen(array_api_strict.zeros(1)) == "array_api"
    assert set(available()) == {"numba", "array-api", "device"}


def test_use_nests_and_ends_with_its_block():
    with use("array-api"):
        assert chosen(np.zeros(1)) == "array_api"
        with use("numba"):
            assert chosen(np.zeros(1)) == "numba_cpu"
        assert chosen(np.zeros(1)) == "array_api"
    assert chosen(np.zeros(1)) == "numba_cpu"


def test_use_ends_with_an_exception():
    with pytest.raises(KeyError), use("array-api"):
        raise KeyError
    assert chosen(np.zeros(1)) == "numba_cpu"


def test_use_is_of_this_thread_alone():
    seen = []
    with use("array-api"):
        thread = threading.Thread(target=lambda: seen.append(chosen(np.zeros(1))))
        thread.start()
        thread.join()
    assert seen == ["numba_cpu"]


def test_use_is_obeyed():
    """The results differ in their last digits, so that a backend that is ignored would show."""
    problem = accuracy_problem(np.random.default_rng(0).standard_normal((4000, 3)), 1.0, 1)
    with use("array-api"):
        reference = problem.marginal().score(problem.x)
    compiled = problem.marginal().score(problem.x)
    np.testing.assert_allclose(compiled, reference, rtol=1e-11)
    assert (compiled != reference).any()


def test_unknown_backends_are_refused_with_a_hint():
    with (
        pytest.raises(ValueError, match="one of array-api, device, numba, got 'numbas'; did you mean 'numba'"),
        use("numbas"),
    ):
        pass
    assert chosen(np.zeros(1)) == "numba_cpu"


@pytest.mark.parametrize("array", [torch.zeros((1, 2)), array_api_strict.zeros((1, 2))], ids=["torch", "strict"])
def test_numba_refuses_other_arrays(array):
    with use("numba"), pytest.raises(TypeError, match="array-api"):
        PointMasses(array).diffuse(1.0, 1.0).score(array)


# Inputs


@pytest.mark.parametrize(
    ("backend", "dtype"), [("numba", "float64"), ("array-api", "float64"), ("array-api", "float32")]
)
@pytest.mark.parametrize("form", [None, *FORMS])
def test_inputs_may_be_read_only_and_stay_as_they_are(backend, form, dtype):
    problem = mixture_problem(form or "zero", np.array([0.5, 1.0, 2.0]), seed=1, alpha=np.array([1.0, 0.7, 0.4]))
    problem = (problem if form else replace(problem, covariances=None)).as_dtype(dtype)
    frozen = NUMBA.put(problem.centres, dtype), NUMBA.put(problem.x, dtype), NUMBA.put(problem.v, dtype)
    for array in frozen:
        array.flags.writeable = False
    points, x, v = frozen
    with use(backend):
        c = problem.covariances
        if form is None:
            prior = PointMasses(points, log_weights=problem.log_weights.astype(dtype))
        elif isinstance(c, tuple):
            prior = replace(problem, centres=points).prior(NUMBA, dtype)
        else:
            prior = GaussianMixture(
                points, c.astype(dtype) if np.ndim(c) else c, log_weights=problem.log_weights.astype(dtype)
            )
        q = prior.diffuse(problem.alpha, problem.sigma)
        got = computed(q, x, v) | {"dense": q.fisher(x).to_dense()}
        expected = computed(problem.marginal(NUMBA, dtype), NUMBA.put(problem.x, dtype), NUMBA.put(problem.v, dtype))
    for name in QUANTITIES:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    for array, values in zip(frozen, (problem.centres, problem.x, problem.v), strict=True):
        np.testing.assert_array_equal(array, values)


@pytest.mark.parametrize("layout", ["fortran", "strided", "reversed", "memory-mapped"])
def test_memory_layout_does_not_matter(layout, tmp_path):
    rng = np.random.default_rng(0)
    points, x = rng.standard_normal((3000, 4)), rng.standard_normal((70, 4))
    expected = PointMasses(points).diffuse(0.9, 0.5).score(x)
    if layout == "memory-mapped":
        np.save(tmp_path / "points.npy", points)
        laid, y = np.load(tmp_path / "points.npy", mmap_mode="r"), x
    else:
        change = {
            "fortran": np.asfortranarray,
            "strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
            "reversed": lambda a: a[::-1].copy()[::-1],
        }[layout]
        laid, y = change(points), change(x)
        assert not laid.flags.c_contiguous
    got = PointMasses(laid).diffuse(0.9, 0.5).score(y)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


# Memory


@pytest.mark.parametrize(("covariance", "dtype"), [(None, "float32"), (0.3, "float64")])
@pytest.mark.parametrize(("backend", "mebibytes"), [("numba", 4), ("array-api", 24)])
def test_memory_does_not_grow_with_points_times_queries(backend, mebibytes, covariance, dtype):
    """200,000 x 8 points and 64 queries: weights alone, (B, N), would be 98 MiB; a tile of the reference is 4 MiB."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((200_000, 8)).astype(dtype)
    x = points[:64].copy()
    prior = PointMasses(points) if covariance is None else GaussianMixture(points, covariance)
    q = prior.diffuse(0.9, 1.0)
    with use(backend):
        PointMasses(points[:100]).diffuse(0.9, 1.0).fisher(x).to_dense()  # compilation is not what is measured
        tracemalloc.start()
        try:
            q.score(x)
            q.fisher(x).to_dense()
            peak = tracemalloc.get_traced_memory()[1] / 2**20
        finally:
            tracemalloc.stop()
    assert peak < mebibytes, f"{peak:.1f} MiB"


def test_the_memory_measurement_sees_dense_code():
    points = np.zeros((200_000, 1))
    tracemalloc.start()
    try:
        (points[:64, None, 0] - points[None, :, 0]).sum()
        assert tracemalloc.get_traced_memory()[1] > 90 * 2**20
    finally:
        tracemalloc.stop()


def crowded(d: int, each: bool) -> tuple:
    """Points in clusters, so that some queries have many near ones; a light one far away, and one of no weight."""
    rng = np.random.default_rng(5)
    centres = np.repeat(rng.standard_normal((40, d)), 30, axis=0) + 0.05 * rng.standard_normal((1200, d))
    logs = rng.standard_normal(1200)
    logs[3], logs[7] = -600.0, -np.inf
    variances = 0.01 * rng.random(1200) if each else None
    x = np.concatenate(
        [centres[[0, 3, 7, 600]], (centres[100] + centres[1000])[None] / 2, 30 * rng.standard_normal((2, d))]
    )
    return centres, logs, variances, x


@pytest.mark.parametrize("each", [False, True], ids=["points", "a variance each"])
@pytest.mark.parametrize("d", [64, 65, 257, 300])
@pytest.mark.parametrize("sigma", [1e-3, 0.05, 0.5, 3.0, 100.0])
def test_distances_left_unfinished_belong_to_components_without_weight(sigma, d, each):
    """The kernels stop summing a distance once its component cannot weigh anything; the reference sums all of them."""
    centres, logs, variances, x = crowded(d, each)
    prior = GaussianMixture(centres, variances, log_weights=logs) if each else PointMasses(centres, log_weights=logs)
    q, v = prior.diffuse(1.0, sigma, tolerance=1e-290), np.random.default_rng(1).standard_normal(x.shape)

    def everything():
        f = q.fisher(x)
        return (
            q.log_density(x),
            q.score(x),
            q.posterior_mean(x),
            f.matvec(v),
            f.trace(),
            f.posterior_covariance().trace(),
        )

    found = everything()
    with use("array-api"):
        for got, wanted in zip(found, everything(), strict=True):
            got, wanted = (a.reshape(len(x), -1) for a in (got, wanted))
            size = np.linalg.norm(wanted, axis=1)
            np.testing.assert_array_less(np.linalg.norm(got - wanted, axis=1), 1e-10 * size + 1e-250)
