"""Data in parts, in files and on Dask: the same results as in one array, what is wrong in one part, what is lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from dfmath.backends.out_of_core import StreamedParts
from hypothesis import given
from hypothesis import strategies as st

from dfmath import GaussianMixture, LowRank, PointMasses, ot_check, probability_flow, scattered
from dfmath.cli import main
from dfmath.datasets import digits
from dfmath.row_files import dask_points, open_rows
from dfmath.theorems.run import model, verify

POINTS = np.random.default_rng(0).standard_normal((401, 5))
WEIGHTS = np.where(np.arange(401) < 130, 0.0, np.random.default_rng(1).random(401))  # the first part has none


@pytest.fixture
def small_parts(monkeypatch):
    """Files are read a few rows at a time."""
    monkeypatch.setattr(scattered, "PART_BYTES", 128 * 5 * 8)


def saved(folder, kind, points=POINTS):
    """The points in a file of this kind."""
    if kind == "npy":
        np.save(folder / "points.npy", points)
        return folder / "points.npy"
    if kind == "zarr":
        zarr = pytest.importorskip("zarr")
        zarr.save_array(str(folder / "points.zarr"), points)
        return folder / "points.zarr"
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(list(points), type=pyarrow.list_(pyarrow.from_numpy_dtype(points.dtype)))
    number = pyarrow.array(np.arange(len(points)))
    table = pyarrow.table({"x": column, "number": number})
    parquet.write_table(table, folder / "points.parquet", row_group_size=90)
    return folder / "points.parquet"


def chunked(values, rows):
    array = pytest.importorskip("dask.array")
    return array.from_array(values, chunks=(rows, *values.shape[1:]))


def compare(one, parts, x, sigma, rtol=1e-12):
    """Everything that is asked of a marginal, and samples to the last component."""
    p, q = one.diffuse(0.9, sigma), parts.diffuse(0.9, sigma)
    for name in ("log_density", "score", "posterior_mean"):
        close(getattr(q, name)(x), getattr(p, name)(x), rtol)
    for ours, theirs in ((q.fisher(x), p.fisher(x)), *(((m.fisher(x).posterior_covariance()) for m in (q, p)),)):
        scale = np.abs(theirs.to_dense()).max()
        for form in ("to_dense", "diagonal", "trace", "eigvalsh"):
            np.testing.assert_allclose(getattr(ours, form)(), getattr(theirs, form)(), rtol=rtol, atol=rtol * scale)
        close(ours.matvec(x), theirs.matvec(x), rtol)
    np.testing.assert_allclose(q.sample_posterior(x, 20, seed=1), p.sample_posterior(x, 20, seed=1), rtol=1e-10)
    np.testing.assert_array_equal(parts.sample(50, seed=2), one.sample(50, seed=2))
    np.testing.assert_allclose(parts.weights, one.weights, rtol=1e-13)


def close(ours, theirs, rtol):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("kind", ["npy", "zarr", "parquet"])
def test_files_that_are_read_anew_are_as_arrays(small_parts, tmp_path, kind, weights):
    column = "x" if kind == "parquet" else None
    path = saved(tmp_path, kind)
    streamed = PointMasses.from_file(path, column, weights, memory=0)
    assert isinstance(streamed.components, StreamedParts) and len(streamed.components.outline.counts) == 4
    one = PointMasses(POINTS, weights)
    for sigma in (3.0, 0.5, 0.05):
        compare(one, streamed, one.diffuse(0.9, sigma).sample(7, seed=0), sigma)
    loaded = PointMasses.from_file(path, column, weights)
    np.testing.assert_array_equal(loaded.points, POINTS)
    np.testing.assert_array_equal(np.asarray(streamed.points), POINTS)
    np.testing.assert_array_equal(streamed.points[100:300], POINTS[100:300])


@pytest.mark.parametrize("memory", [0, 2**30])
def test_files_for_another_library(small_parts, tmp_path, memory):
    """Points go where they are wanted as they are read; queries and results are there."""
    import torch

    like, weights = torch.empty(0), np.arange(1.0, 402.0)
    prior = PointMasses.from_file(saved(tmp_path, "npy"), weights=weights, memory=memory, like=like)
    x = torch.from_numpy(POINTS[:6] + 0.1)
    found = prior.diffuse(1.0, 0.5).fisher(x)
    wanted = PointMasses(POINTS, weights).diffuse(1.0, 0.5).fisher(x.numpy())
    assert isinstance(found.trace(), torch.Tensor) and prior.dtype == torch.float64
    np.testing.assert_allclose(found.to_dense().numpy(), wanted.to_dense(), rtol=1e-10, atol=1e-10)
    assert prior.sample(3, seed=0).shape == (3, 5)


def test_files_in_single_precision(small_parts, tmp_path):
    points = POINTS.astype(np.float32)
    streamed = PointMasses.from_file(saved(tmp_path, "npy", points), memory=0)
    q, x = PointMasses(points.astype(np.float64)).diffuse(1.0, 0.5), points[:9] + np.float32(0.1)
    found = streamed.diffuse(1.0, 0.5).evaluate(x, ["trace"])
    assert found.score.dtype == np.float32
    np.testing.assert_allclose(found.trace, q.fisher(x.astype(np.float64)).trace(), rtol=1e-5)


def test_flows_bounds_and_spans_of_files(small_parts, tmp_path):
    one, streamed = PointMasses(POINTS), PointMasses.from_file(saved(tmp_path, "npy"), memory=0)
    x = one.diffuse(1.0, 3.0).sample(3, seed=0)
    ours, theirs = (probability_flow(p, x, 3.0, 0.3, jacobian=True, log_density=True) for p in (streamed, one))
    for name in ("x", "jacobian", "log_density_change"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-7, atol=1e-9)
    checks = [ot_check(p, rho_max=5.0, n=4).asymmetry.mean for p in (streamed, one)]
    assert checks[0] == pytest.approx(checks[1], rel=1e-6)
    fishers = [p.diffuse(1.0, 0.5).fisher(x) for p in (streamed, one)]
    bounds = [f.error_bound() for f in fishers]
    assert (bounds[0] < 1e-9).all() and (np.abs(bounds[0] / bounds[1] - 1.0) < 1.0).all()
    for form in ("centred", "data", "orthonormal"):
        span = fishers[0].span(form=form)
        dense = span.shift[:, None, None] * np.eye(5) + np.einsum(
            "bk,bki,bkj->bij", span.coefficients, span.vectors, span.vectors
        )
        np.testing.assert_allclose(dense, fishers[1].to_dense(), rtol=1e-9, atol=1e-9)


def test_parts_are_read_ahead_and_let_go(small_parts, tmp_path):
    """No more parts than three are held at a time, whatever their number."""
    streamed = PointMasses.from_file(saved(tmp_path, "npy", np.tile(POINTS, (5, 1))), memory=0)
    load, held, most = streamed.components.load, [], [0]

    class Watched(np.ndarray):
        def __del__(self):
            held.pop()

    def watched(i):
        part = load(i)
        held.append(i)
        object.__setattr__(part, "mark", np.zeros(1).view(Watched))
        most[0] = max(most[0], len(held))
        return part

    streamed.components.load = watched
    streamed.diffuse(1.0, 0.5).score(POINTS[:4])
    assert 2 <= most[0] <= 4 and len(streamed.components.outline.counts) == 16


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_any_chunks_give_the_same(rows, seed):
    rng = np.random.default_rng(seed)
    points, weights = rng.standard_normal((9, 2)) + 1e3, np.maximum(rng.random(9) - 0.3, 0.0) + 1e-12
    one, parts = PointMasses(points, weights), PointMasses(chunked(points, rows), weights)
    x = one.diffuse(1.0, 0.3).sample(4, seed=0)
    p, q = one.diffuse(1.0, 0.3), parts.diffuse(1.0, 0.3)
    close(q.score(x), p.score(x), 1e-11)
    close(q.fisher(x).to_dense(), p.fisher(x).to_dense(), 1e-11)


def covariances(form):
    rng = np.random.default_rng(3)
    roots = 0.3 * rng.standard_normal((20, 4, 4))
    return {
        "scalar": 0.2,
        "spherical": 0.1 + rng.random(20),
        "diagonal": 0.1 + rng.random((20, 4)),
        "full": roots @ roots.transpose(0, 2, 1) + 0.05 * np.eye(4),
        "low rank": LowRank(0.1 + rng.random((20, 4)), rng.standard_normal((20, 4, 2))),
    }[form]


@pytest.mark.parametrize("rows", [1, 7, 20])
@pytest.mark.parametrize("form", ["scalar", "spherical", "diagonal", "full", "low rank"])
def test_mixtures_in_chunks(form, rows):
    rng = np.random.default_rng(4)
    means, weights, given = rng.standard_normal((20, 4)), rng.random(20), covariances(form)
    one = GaussianMixture(means, given, weights)
    there = given if isinstance(given, float | LowRank) else chunked(given, 3)  # rechunked as the means are
    parts = GaussianMixture(chunked(means, rows), there, chunked(weights, 6))
    compare(one, parts, one.diffuse(0.9, 0.5).sample(5, seed=0), 0.5)
    assert parts.components.common == one.components.common
    for start, stop in ((0, 20), (3, 9), (8, 9), (6, 20)):  # also from the middle of a part, and over several
        ours, theirs = (prior.components.tile(start, stop, np.float64) for prior in (parts, one))
        for name, whole in vars(theirs).items():
            np.testing.assert_allclose(np.broadcast_to(getattr(ours, name), whole.shape), whole, rtol=1e-14)


def test_empty_chunks_do_no_harm():
    array = chunked(POINTS, 100)
    kept = array[array[:, 0] < 10.0]
    kept.compute_chunk_sizes()
    none = array[:0]
    import dask.array

    prior = PointMasses(dask.array.concatenate([none, kept, none]))
    np.testing.assert_allclose(
        prior.diffuse(1.0, 0.5).score(POINTS[:3]), PointMasses(POINTS).diffuse(1.0, 0.5).score(POINTS[:3]), rtol=1e-12
    )


# What is wrong in one part


def spoilt(value=np.nan, row=257):
    points = POINTS.copy()
    points[row, 2] = value
    return points


def test_a_bad_row_of_a_file_is_named_where_it_is_read(small_parts, tmp_path):
    q = PointMasses.from_file(saved(tmp_path, "npy", spoilt()), memory=0).diffuse(1.0, 0.5)
    with pytest.raises(ValueError, match=r"points\.npy': points must be finite, got NaN or infinity in row 257$"):
        q.score(POINTS[:2])


def test_a_file_that_shrinks_is_noticed(small_parts, tmp_path):
    path = saved(tmp_path, "npy")
    q = PointMasses.from_file(path, memory=0).diffuse(1.0, 0.5)
    os.truncate(path, path.stat().st_size - 150 * 5 * 8)
    with pytest.raises(ValueError, match="must hold 401 rows as when it was opened, got no more than 251: it shrank"):
        q.score(POINTS[:2])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: PointMasses(chunked(spoilt(), 100)),
            "chunk 2: points must be finite, got NaN or infinity in row 257$",
        ),
        (lambda: PointMasses(chunked(POINTS, 100).rechunk({1: 2})), r"in one chunk along axis 1, got 3; .*rechunk"),
        (
            lambda: PointMasses(chunked(POINTS, 100)[chunked(POINTS, 100)[:, 0] > 0]),
            "known chunk sizes, .*compute_chunk",
        ),
        (lambda: PointMasses(chunked(POINTS, 100), np.zeros(401)), "weights must give some point positive weight"),
        (
            lambda: PointMasses(chunked(POINTS, 100), np.ones(400)),
            "weights must have 401 rows, one for each row of points",
        ),
        (
            lambda: PointMasses(chunked(POINTS, 100), -np.ones(401)),
            r"chunk \d: weights must be non-negative .* in row \d*0$",
        ),
        (lambda: PointMasses(chunked(np.ones((4, 2), int), 2)), "points must have dtype float32 or float64"),
        (lambda: PointMasses(chunked(np.ones(4), 2)), r"points must have shape \(N, d\)"),
        (
            lambda: GaussianMixture(chunked(POINTS, 100), np.where(np.arange(401) == 305, -1.0, 1.0)),
            "chunk 3: covariances must be non-negative and finite, got -1 in component 305$",
        ),
        (
            lambda: PointMasses(chunked(POINTS, 100)).diffuse(1.0, 0.5).score(chunked(POINTS, 100)),
            "x must be in the array",
        ),
    ],
)
def test_bad_chunks_are_refused(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (
            lambda f: np.save(f / "a.npy", np.asfortranarray(POINTS)),
            {"path": "a.npy"},
            "must be a .npy file in C order",
        ),
        (lambda f: np.save(f / "a.npy", POINTS.astype(int)), {"path": "a.npy"}, "dtype float32 or float64"),
        (lambda f: np.save(f / "a.npy", POINTS[0]), {"path": "a.npy"}, r"must have shape \(N, d\)"),
        (lambda f: (f / "a.npy").write_bytes(b"text"), {"path": "a.npy"}, "another kind of file"),
        (lambda f: (f / "a.parquet").write_bytes(b"text"), {"path": "a.parquet"}, "must be a Parquet file"),
        (lambda f: saved(f, "parquet"), {"path": "points.parquet"}, "column must name one of x, number .* got None"),
        (lambda f: saved(f, "parquet"), {"path": "points.parquet", "column": "y"}, "column must name one of x, number"),
        (lambda f: saved(f, "parquet"), {"path": "points.parquet", "column": "number"}, "must hold lists of float"),
        (lambda f: saved(f, "npy"), {"path": "points.npy", "column": "x"}, "column belongs to .parquet files"),
        (lambda f: saved(f, "zarr", POINTS[0]), {"path": "points.zarr"}, r"must have shape \(N, d\)"),
        (lambda f: (f / "empty").mkdir(), {"path": "empty"}, "which is a folder and no Zarr store"),
        (lambda f: None, {"path": "nowhere.npy"}, "which does not exist"),
        (lambda f: saved(f, "npy"), {"path": "points.npy", "weights": np.ones(3)}, r"weights must have shape \(401,\)"),
    ],
)
def test_bad_files_are_refused(tmp_path, spoil, options, words):
    spoil(tmp_path)
    with pytest.raises((ValueError, TypeError), match=words):
        PointMasses.from_file(tmp_path / options.pop("path"), **options, memory=0)


def test_rows_are_read_by_slices(tmp_path):
    rows = open_rows(saved(tmp_path, "npy"))
    assert (
        rows[400:500].shape == (1, 5) and rows[:0].shape == (0, 5) and len(rows) == 401 and rows.nbytes == POINTS.nbytes
    )
    with pytest.raises(TypeError, match="slices of rows"):
        rows[3]


def test_dask_reads_files(tmp_path):
    array = dask_points(saved(tmp_path, "npy"), chunk_bytes=100 * 5 * 8)
    assert array.chunks == ((100, 100, 100, 100, 1), (5,))
    np.testing.assert_array_equal(array.compute(), POINTS)


# A cluster


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as machines,
        distributed.Client(machines) as client,
    ):
        yield client


def test_theorems_hold_on_two_processes(cluster):
    subject, only = model(digits()[:120], backend="dask"), ["1.1", "1.2", "1.3", "1.6", "4.8"]
    found = verify(subject, (10.0, 0.5, 0.05), only=only)
    assert [r.theorem.number for r in found if r.verdict != "pass"] == [] and len(found) == len(only)


@pytest.mark.slow
def test_all_theorems_hold_on_two_processes(cluster):
    for mixture in (None, 4):
        found = verify(model(digits()[:200], mixture, backend="dask"))
        assert [r.theorem.number for r in found if r.verdict == "fail"] == []


def test_a_killed_worker_changes_nothing(cluster):
    points = np.random.default_rng(0).standard_normal((20_000, 32))
    one, there = PointMasses(points), PointMasses(chunked(points, 1000))
    x = one.diffuse(1.0, 0.8).sample(64, seed=0)
    wanted = there.diffuse(1.0, 0.8).evaluate(x, ["dense"])
    close(wanted.dense, one.diffuse(1.0, 0.8).evaluate(x, ["dense"]).dense, 1e-12)
    before = set(cluster.run(os.getpid).values())
    killer = threading.Timer(0.2, os.kill, (min(before), signal.SIGKILL))
    killer.start()
    found = [there.diffuse(1.0, 0.8).evaluate(x, ["dense"]) for _ in range(4)]
    killer.join()
    deadline = time.monotonic() + 60.0
    while len(after := set(cluster.run(os.getpid).values())) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert after != before
    for one_of_them in found:
        np.testing.assert_array_equal(one_of_them.dense, wanted.dense)


def test_a_lost_cluster_is_one_sentence():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=None) as machines:
        client = distributed.Client(machines)
        with client.as_current():
            q = PointMasses(chunked(POINTS, 100)).diffuse(1.0, 0.5)
            q.score(POINTS[:2])
        client.close()
        with pytest.raises(
            ConnectionError, match=r"Dask cluster that holds the data was lost \(its client is closed\)"
        ):
            q.score(POINTS[:2])


def test_a_cluster_without_workers_is_not_waited_for(monkeypatch):
    distributed = pytest.importorskip("distributed")
    from dfmath.backends import dask_cluster

    monkeypatch.setattr(dask_cluster, "WATCH", 0.2)
    monkeypatch.setattr(dask_cluster, "PATIENCE", 1.0)
    with (
        distributed.LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=None) as machines,
        distributed.Client(machines) as client,
        client.as_current(),
    ):
        q = PointMasses(chunked(POINTS, 100)).diffuse(1.0, 0.5)
        machines.scale(0)
        while client.scheduler_info(n_workers=-1)["workers"]:
            time.sleep(0.05)
        with pytest.raises(ConnectionError, match=r"was lost \(it had no worker for 1 seconds\)"):
            q.score(POINTS[:2])


# The command


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["dfmath", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


def test_finished_levels_are_kept_and_gone_on_with(monkeypatch, tmp_path, capsys):
    path, kept = saved(tmp_path, "npy"), tmp_path / "levels.json"
    words = ("fisher", "--data", path, "--whole", "--levels", 3, "--samples", 4, "--keep", kept, "--json")
    assert run(monkeypatch, *words) == 0
    first = json.loads(capsys.readouterr().out)["levels"]
    content = json.loads(kept.read_text())
    content["parts"][f"{80.0:.17g}"]["trace"] = 0.25  # what is there is taken, not computed
    kept.write_text(json.dumps(content))
    assert run(monkeypatch, *words, "--resume") == 0
    again = json.loads(capsys.readouterr().out)["levels"]
    assert again[0]["trace"] == 0.25 and again[1:] == first[1:]
    assert run(monkeypatch, *words, "--resume", "--seed", 1) == 2
    assert "must hold parts of the same work to go on with, got seed 0 and not 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fisher", "--resume"), "--resume needs --keep FILE"),
        (("fisher", "--whole"), "--whole and --cluster need --data FILE"),
        (("verify", "--cluster", "local"), "--cluster belongs to --backend dask"),
        (("fisher", "--keep", "nowhere/levels.json"), "keep must name a file in a folder that exists"),
    ],
)
def test_wrong_commands_are_refused(monkeypatch, capsys, words, said):
    assert run(monkeypatch, *words) == 2
    assert said in capsys.readouterr().err
