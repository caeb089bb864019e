"""`dfmath reproduce`: what the exact experiments measure, what is run again and what is not, and the report of all."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from dfmath.benchmarks import timing
from dfmath.experiments import dimension, error_bounds, ot_table, published_scheme, results, schedules, spectrum
from dfmath.experiments.published_scheme import converged, discretised, ways
from dfmath.experiments.registry import EXPERIMENTS, Experiment
from dfmath.experiments.report_page import Report
from dfmath.experiments.run import reproduce

from dfmath import GaussianMixture, PointMasses, bounds, ot_check
from dfmath.cli import main
from dfmath.transport import asymmetry, asymmetry_offdiagonal, official_points

SMALL = {
    dimension: {"levels": 4, "draws": 16, "known": (2,), "points": 200, "patches": 200, "side": 4},
    spectrum: {"levels": 3, "draws": 2, "patches": 100, "side": 2},
}
FIGURES = {module: module.figure for module in SMALL}


def quiet(text=""):
    pass


def read(module, plan, measured):
    """What the file of a result would hold."""
    text = json.dumps({"settings": dataclasses.asdict(plan), **measured})
    return {name: results.with_nan(value) for name, value in json.loads(text).items()}


# --- the published discretisation ---


def starts(n, dim=2, rho=20.0):
    return rho * np.random.default_rng(0).standard_normal((n, dim))


def test_a_ddim_step_keeps_the_noise():
    """Of one point everything is known: x = alpha y + sigma eps with the same eps at every level."""
    point, eps = np.array([[0.4, -0.3]]), np.array([[1.2, 0.7]])
    now, then = (0.8, 0.6), (0.9, 0.2)
    x = now[0] * point + now[1] * eps
    score = PointMasses(point).diffuse(*now).score(x)
    np.testing.assert_allclose(published_scheme._ddim(x, score, now, then), then[0] * point + then[1] * eps, rtol=1e-14)


def test_both_equations_converge_to_what_they_should():
    """The right one to the flow's Jacobian, by another integrator; the wrong one to its transposed inverse."""
    prior = PointMasses(np.array([[0.5, 0.0, 0.0], [0.0, -0.5, 0.0], [0.0, 0.0, 0.4], [0.0, 0.0, 0.0]]))
    report = ot_check(prior, 20.0, 0.1, n=4, seed=1, start="gaussian")
    right, wrong = (converged(prior, report.starts, 20.0, 0.1, sign, rtol=1e-9) for sign in (1, -1))
    scale = np.abs(report.jacobians).max()
    np.testing.assert_allclose(right, report.jacobians, atol=1e-6 * scale)
    np.testing.assert_allclose(wrong @ right.transpose(0, 2, 1), np.tile(np.eye(3), (4, 1, 1)), atol=1e-5)
    assert abs(asymmetry(wrong) - asymmetry(right)).max() > 1e-3  # in space the sign shows


def test_in_the_plane_no_index_sees_the_sign():
    z = starts(5)
    right, wrong = (converged(official_points(), z, 20.0, 0.1, sign, rtol=1e-9) for sign in (1, -1))
    for index in (asymmetry, asymmetry_offdiagonal):
        np.testing.assert_allclose(index(wrong), index(right), atol=1e-6)
        assert index(right).max() > 1e-3


@pytest.mark.parametrize("name", ["VP", "sub-VP", "VE", "EDM"])
def test_the_discretisation_is_of_first_order(name):
    """Twice the steps halve the error, for either sign, on schedules that have their own sigma."""
    z, way = starts(3), ways()[name]
    found = {n: discretised(official_points(), way, z, 20.0, 0.2, n) for n in (400, 800)}
    for sign in (1, -1):
        exact = converged(official_points(), z, 20.0, 0.2, sign, rtol=1e-10)
        exact /= np.linalg.norm(exact, axis=(1, 2), keepdims=True)
        off = [np.abs(found[n][sign] - exact).max() for n in (400, 800)]
        assert off[0] / off[1] == pytest.approx(2.0, abs=0.25), off


def test_vps_sigma_is_no_flow_of_sub_vp():
    z = starts(3)
    found = discretised(official_points(), ways()["sub-VP, VP's sigma"], z, 20.0, 0.2, 800)[1]
    exact = converged(official_points(), z, 20.0, 0.2, 1)
    exact /= np.linalg.norm(exact, axis=(1, 2), keepdims=True)
    assert np.abs(found - exact).max() > 0.1


def test_the_transport_table_says_what_was_measured():
    plan = dataclasses.replace(ot_table.QUICK, starts=3, steps=(20, 40), rho_max=20.0, rho_min=0.1)
    told = []
    result = read(ot_table, plan, ot_table.measure(plan, told.append))
    assert len(told) == plan.parts
    line = result["converged"]["three on a line"]["schedules"]
    assert all(row["is transport"] and row["off-diagonal"][0] < 1e-6 for row in line.values())
    bent = result["converged"]["three points"]["schedules"]
    assert not any(row["is transport"] for row in bent.values()) and max(row["differs"] for row in bent.values()) < 1e-4
    others = [row["differs"] for name, row in bent.items() if name not in ("canonical", "VE")]
    assert len(others) > 1 and min(others) > 1e-8 > bent["VE"]["differs"]
    assert bent["VE"]["evaluations"] == bent["canonical"]["evaluations"]
    value = bent["canonical"]["off-diagonal"][0]
    flat, space = (
        [result["converged"][data]["signs"][sign]["off-diagonal"][0] for sign in ("right", "published")]
        for data in ("three points", "four in space")
    )
    assert abs(flat[0] - flat[1]) < 1e-4 < abs(space[0] - space[1])
    said = ot_table.seen(result)
    for words in (
        f"three points is {value:.4f}",
        f"by {abs(flat[0] - flat[1]):.0e})",
        f"({space[0]:.3f} and {space[1]:.3f})",
    ):
        assert words in said
    rows = {row[:2]: row for row in ot_table.tables(result)[2].rows}
    cell = result["steps"]["three points"]["VE"]["published"]["40"]["off-diagonal"]
    assert rows["VE", "published"][3] == f"{cell[0]:.4f} ± {cell[1]:.3f}"


# --- bounds ---


@pytest.fixture(scope="module")
def bounded():
    plan = error_bounds.Plan(levels=3, states=4, components=3, rho_max=10.0, rho_min=0.1)
    return plan, read(error_bounds, plan, error_bounds.measure(plan, quiet))


def test_bounds_hold_and_those_that_are_attained_are_nearly_so(bounded):
    _, result = bounded
    found = {
        n: [r["ratio"] for data in result["data"] for r in error_bounds._rows(result, data, n)]
        for n in ("4.2", "4.3", "4.5")
    }
    for ratios in found.values():
        assert len(ratios) == 6 and 0.0 < max(ratios) <= 1.0 + 1e-6
    assert min(found["4.2"]) > 0.999 and min(found["4.3"]) > 0.999
    for number in error_bounds.TITLES:
        tried = error_bounds._rows(result, "point masses", number)
        assert tried and all(row["error"] > 0.0 and 0.0 < row["ratio"] <= 1.0 + 1e-6 for row in tried), number
        assert all(row["states"] == 4 or number.startswith("4.8") for row in tried)
    assert "All 7 bounds hold" in error_bounds.seen(result)


def test_a_bound_that_fails_is_named(bounded, monkeypatch):
    plan, _ = bounded
    monkeypatch.setattr(bounds, "local_loss_error", lambda d1, d2, sigma, dim: 0.9 * (dim * d1 + d2**2) / sigma**2)
    said = error_bounds.seen(read(error_bounds, plan, error_bounds.measure(plan, quiet)))
    assert said.startswith("4.3 failed. ")


def test_rounded_weights_are_within_their_factor():
    """By hand on two points: the log weights' shift beside the logits' error, in NumPy."""
    state = error_bounds._state(PointMasses(np.array([[300.0, 1.0], [300.1, 0.3]])), 0.3, 5, 0)
    moved, bound = error_bounds._rounded_logits(state)
    assert (moved > 1e-6).all() and (moved <= bound * (1 + 1e-6)).all()


# --- schedules ---


def test_schedules_differ_by_integration_error_alone():
    plan = schedules.Plan(starts=2, rtols=(1e-3, 1e-4), components=2)
    told = []
    result = read(schedules, plan, schedules.measure(plan, told.append))
    assert len(told) == plan.parts
    for found in result["data"].values():
        for row in found["schedules"].values():
            assert all(row["0.0001"][m] < 2e-2 for m in schedules.MEASURES)
            assert row["0.0001"]["end point"] <= row["0.0001"]["estimate"] + found["reference error"]


def test_a_schedule_with_a_wrong_drift_would_show(monkeypatch):
    """Half of VP's diffusion: the end points and densities are off by far more than the integrator says."""
    plan = schedules.Plan(starts=2, rtols=(1e-5,))
    kind = type(schedules.schedules()["VP"])
    right = kind._diffusion_squared
    monkeypatch.setattr(kind, "_diffusion_squared", lambda self, xp, t: 0.9 * right(self, xp, t))
    row = schedules._compared("three points", official_points(), plan, quiet)["schedules"]["VP"]["1e-05"]
    assert row["end point"] > 100 * row["estimate"] and row["log density"] > 1e-2


# --- dimension and spectrum ---


def test_the_exact_curve_is_the_laws():
    """d - rho^2 tr F of the Gaussian law itself, with a covariance of rank k in 12 dimensions."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 3)))[0]
    law = GaussianMixture(np.zeros((1, 12)), (basis @ basis.T)[None])
    for rho in (0.01, 0.3, 3.0):
        found = 12 - rho**2 * law.diffuse(1.0, rho).fisher(np.zeros((1, 12))).trace()
        np.testing.assert_allclose(found, dimension.shrinkage(3, rho), rtol=1e-7)


def test_many_points_follow_their_law():
    plan = dimension.Plan(points=3000, ambient=6, draws=400)
    for rho in (0.2, 1.0):
        found = dimension._level(dimension.flat(2, plan, 0), rho, plan, 0, quiet)
        assert found["mean"] == pytest.approx(dimension.shrinkage(2, rho), abs=4 * found["error"] + 0.03)


def test_the_curve_keeps_its_digits_at_low_noise():
    """Of two points at distance a, tr P is a^2 w (1 - w): by hand where d - rho^2 tr F would round to 0."""
    plan, rho = dimension.Plan(draws=5), 0.08
    points = np.array([[0.0, 0.0], [1.0, 0.0]])
    x = PointMasses(points).diffuse(1.0, rho).sample(5, 3)
    w = 1.0 / (1.0 + np.exp(np.abs(x[:, 0] - 0.5) / rho**2))
    wanted = (w * (1.0 - w)).mean() / rho**2
    assert wanted < 1e-16
    found = dimension._level(points, rho, plan, 3, quiet)
    assert found["mean"] == pytest.approx(wanted, rel=1e-9, abs=0.0)


def test_known_dimensions_vary_between_sets():
    """Means and standard errors of the sets' own curves and estimates, by NumPy."""
    plan = dimension.Plan(levels=2, draws=8, known=(2,), sets=3, points=60, patches=60, side=2)
    found = dimension.measure(plan, quiet)["sets"]
    assert found["digits"]["sets"] == 1 and "neighbours error" not in found["digits"]
    row = found["2 dimensions"]["levels"][1]
    sets = [dimension.flat(2, plan, seed) for seed in range(3)]
    curves = [dimension._level(points, row["rho"], plan, seed, quiet)["mean"] for seed, points in enumerate(sets)]
    near = [dimension.levina_bickel(points, *plan.neighbours) for points in sets]
    assert found["2 dimensions"]["sets"] == 3 and len(set(curves)) == 3
    for got, values in (((row["mean"], row["error"]), curves), (_neighbours(found["2 dimensions"]), near)):
        assert got == pytest.approx((np.mean(values), np.std(values, ddof=1) / 3**0.5), rel=1e-12)


def _neighbours(found):
    return found["neighbours"], found["neighbours error"]


def test_levina_bickel_by_its_formula_and_on_known_dimensions():
    rng = np.random.default_rng(1)
    points = rng.standard_normal((40, 3))
    distances = np.sort(np.linalg.norm(points[:, None] - points[None], axis=2), axis=1)[:, 1:]
    k = 6
    inverse = np.mean([np.mean([np.log(t[k - 1] / t[j]) for j in range(k - 1)]) for t in distances])
    assert dimension.levina_bickel(points, k, k) == pytest.approx(1.0 / inverse, rel=1e-10)
    repeated = np.concatenate([points, points[:7]])
    assert dimension.levina_bickel(repeated, k, k) == pytest.approx(1.0 / inverse, rel=1e-10)
    flat = rng.uniform(size=(2000, 3)) @ rng.standard_normal((3, 20))
    assert dimension.levina_bickel(flat, 10, 20) == pytest.approx(3.0, abs=0.25)


def test_the_spectrums_rows_are_eigenvalues():
    """Quantiles and rank beside NumPy's of the written-out covariance at the same draws."""
    from dfmath.datasets import digits

    plan = spectrum.Plan(levels=1, draws=2, patches=50, side=2, rho_max=1.5, rho_min=0.5)
    row = spectrum.measure(plan, quiet)["data"]["digits"]["levels"][0]
    y, x = digits(), PointMasses(digits()).diffuse(1.0, 1.5).sample(2, 0)
    values = []
    for z in x:
        logits = -((z - y) ** 2).sum(axis=1) / (2 * 1.5**2)
        w = np.exp(logits - logits.max())
        w /= w.sum()
        off = y - w @ y
        values.append(np.linalg.eigvalsh((off * w[:, None]).T @ off))
    wanted = np.mean([np.quantile(1 - v / 1.5**2, (0, 0.25, 0.5, 0.75, 1)) for v in values], axis=0)
    np.testing.assert_allclose(row["quantiles"], wanted, atol=1e-9)
    assert row["effective_rank"] == pytest.approx(np.mean([v.sum() ** 2 / (v**2).sum() for v in values]), rel=1e-9)


def test_sentences_give_the_numbers():
    """Read back from what is said of made-up results."""
    row = {"rho": 2.0, "trace": 0.9, "quantiles": [-3.5, 0.1, 0.99981, 0.5, 1.0], "effective_rank": 6.5}
    row |= {"quantile_errors": [0.25, 0.1, 0.00002, 0.1, 0.0], "effective_rank_error": 0.75}
    other = row | {"rho": 7.0, "quantiles": [0.5, 0.6, 0.7, 0.8, 1.0], "effective_rank": float("nan")}
    said = spectrum._sentence("digits", {"shape": [5, 9], "levels": [other, row]})
    for words in ("-3.500 ± 0.2 at rho = 2,", "there 1 - 1.9e-04 ± 2e-05;", "at rho = 2, 6.5 ± 0.8 of 9"):
        assert words in said, said
    levels = [{"rho": rho, "mean": mean, "error": 0.1} for rho, mean in ((4.0, 1.0), (0.5, 3.25), (0.1, 2.0))]
    known = {
        "shape": [50, 64],
        "levels": levels,
        "neighbours": 3.5,
        "exact": {"dimension": 4, "curve": [1.0, 3.0, 3.9]},
    }
    unknown = {"shape": [60, 64], "levels": levels, "neighbours": 5.5}
    said = dimension.seen({"settings": {"points": 50}, "sets": {"4 dimensions": known, "digits": unknown}})
    for words in ("is 3.2 for 4 (neighbours 3.5)", "within 2.50%", "digits 3.2 at rho = 0.5 (neighbours 5.5)"):
        assert words in said, said


# --- the command ---


@pytest.fixture
def small(monkeypatch):
    """Two experiments, little of them, and figures that are drawn at once."""
    from matplotlib.figure import Figure

    def figure(result):
        """Nothing."""
        return Figure(figsize=(1.0, 1.0))

    for module, less in SMALL.items():
        for name in ("QUICK", "FULL"):
            seed = {"seed": 0 if name == "QUICK" else 1}
            monkeypatch.setattr(module, name, dataclasses.replace(module.QUICK, **less, **seed))
        monkeypatch.setattr(module, "figure", figure)
    for name in set(EXPERIMENTS) - {"spectrum", "dimension"}:
        monkeypatch.delitem(EXPERIMENTS, name)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["dfmath", "reproduce", *(str(word) for word in words)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


def never(*arguments):
    raise AssertionError("this was to be skipped")


def fails(error):
    def call(*arguments):
        raise error

    return call


def counted(module, monkeypatch):
    """Count how often a module measures."""
    calls, measure = [], module.measure
    monkeypatch.setattr(module, "measure", lambda *arguments: (calls.append(1), measure(*arguments))[1])
    return calls


def test_what_is_there_is_skipped(small, monkeypatch, tmp_path, capsys):
    words = ("all", "--quick", "--output", tmp_path)
    assert run(monkeypatch, *words) == 0
    for name in ("spectrum", "dimension"):
        assert {path.suffix for path in tmp_path.glob(f"{name}.*")} == {".md", ".png", ".svg", ".json"}
        told = json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=pytest.fail)
        assert (
            told["settings"]["quick"] and told["seconds"] > 0 and told["machine"]["versions"]["numpy"] == np.__version__
        )
        assert {"commit", "processor", "cores"} <= set(told["machine"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.suffix == ".json"}
    capsys.readouterr()
    monkeypatch.setattr(spectrum, "measure", never)
    monkeypatch.setattr(dimension, "measure", never)
    assert run(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert "spectrum: skipped, spectrum.json was made on" in said and "dimension: skipped" in said
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("settings", "spectrum.json was made with other settings"),
        ("sources", "spectrum.json was made with other sources"),
        ("versions", "spectrum.json was made with other versions"),
        ("damage", "spectrum.json holds no finished result"),
        ("fresh", "spectrum: running"),
    ],
)
def test_what_was_made_otherwise_is_run_again(small, monkeypatch, tmp_path, capsys, change, said):
    words = ["spectrum", "--quick", "--output", tmp_path]
    assert run(monkeypatch, *words) == 0
    calls, path = counted(spectrum, monkeypatch), tmp_path / "spectrum.json"
    told = json.loads(path.read_text())
    if change == "settings":
        words.remove("--quick")
    elif change == "fresh":
        words.append("--fresh")
    elif change == "sources":
        monkeypatch.setattr(results, "sources", lambda: "another")
    elif change == "damage":
        path.write_text(path.read_text()[:200])
    else:
        path.write_text(json.dumps(told | {"machine": told["machine"] | {"versions": {"numpy": "0.1"}}}))
    assert run(monkeypatch, *words) == 0
    assert said in capsys.readouterr().out and len(calls) == 1
    assert json.loads(path.read_text())["settings"]["quick"] == ("--quick" in words)


def test_a_commit_that_leaves_the_sources_alone_runs_nothing_again(small, monkeypatch, tmp_path, capsys):
    """And the result is told as of its own commit, not of today's."""
    words = ("spectrum", "--quick", "--output", tmp_path)
    assert run(monkeypatch, *words) == 0
    path = tmp_path / "spectrum.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"machine": told["machine"] | {"commit": "0ld1234"}}))
    monkeypatch.setattr(spectrum, "measure", never)
    assert run(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert f"made on {told['made']} at commit 0ld1234 with the same settings, sources and versions;" in said
    reader, _ = read_page(tmp_path)
    (row,) = (row for row in reader.rows if row.startswith("spectrum "))
    assert row.split() == ["spectrum", "quick", f"{told['seconds']:.1f}", *told["made"].split(), "0ld1234", "these"]
    assert any(row.split() == ["commit", "0ld1234"] for row in reader.rows)


def test_every_module_and_kernel_is_a_source():
    """Each once, by git's own list of files."""
    root = Path(__file__).parents[1]
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("no repository")
    folders = {"dfmath": "dfmath", **{part: f"dfmath/{part}" for part in results.PARTS}}
    listed = subprocess.run(["git", "ls-files", *folders], cwd=root, capture_output=True, text=True, check=True).stdout
    code = [Path(line) for line in listed.splitlines() if line.endswith((".py", ".cu")) and (root / line).exists()]
    wanted = {f"{folders[path.parts[0]]}/{path.relative_to(path.parts[0]).as_posix()}" for path in code}
    assert set(results.package_files()) >= wanted and "dfmath/backends/cuda_kernels.cu" in wanted
    assert len({path.resolve() for path in results.package_files().values()}) == len(results.package_files())


def test_a_wheel_has_the_digest_of_its_checkout(tmp_path):
    """The files where a wheel puts them, imported by another interpreter."""
    for name, file in results.package_files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / name)
    script = "import sys; sys.path.insert(0, sys.argv[1]); from dfmath.experiments import results as r;"
    script += "print(r.__file__, r.sources())"
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [str(tmp_path / "dfmath/experiments/results.py"), results.sources()]


@pytest.mark.parametrize(
    ("change", "files"),
    [
        ("nothing", {"a.py": "xy", "k.cu": "z"}),
        ("a module", {"a.py": "xx", "k.cu": "z"}),
        ("a kernel", {"a.py": "xy", "k.cu": "y"}),
        ("a folder", {"b/a.py": "xy", "k.cu": "z"}),
        ("a boundary", {"a.py": "x", "k.cu": "yz"}),
        ("a name", {"a.p": "yxy", "k.cu": "z"}),
    ],
)
def test_the_digest_is_of_paths_sizes_and_contents(tmp_path, change, files):
    def told(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return results.digest({name: tmp_path / name for name in reversed(files)})

    assert (told({"a.py": "xy", "k.cu": "z"}) == told(files)) == (change == "nothing")


def test_missing_pictures_are_drawn_again_without_measuring(small, monkeypatch, tmp_path):
    words = ("spectrum", "--quick", "--output", tmp_path)
    assert run(monkeypatch, *words) == 0
    table = (tmp_path / "spectrum.md").read_text()
    (tmp_path / "spectrum.png").unlink()
    (tmp_path / "spectrum.md").unlink()
    monkeypatch.setattr(spectrum, "measure", never)
    assert run(monkeypatch, *words) == 0
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "spectrum.md").read_text() == table


def test_an_interruption_keeps_what_is_finished(small, monkeypatch, tmp_path, capsys):
    words = ("all", "--quick", "--output", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(dimension, "measure", fails(KeyboardInterrupt()))
        assert run(patch, *words) == 130
    assert (tmp_path / "spectrum.json").exists() and not (tmp_path / "dimension.json").exists()
    page = (tmp_path / "report.html").read_text()
    assert 'id="spectrum"' in page and "Not in this folder yet" in page and 'id="dimension"' not in page
    monkeypatch.setattr(spectrum, "measure", never)
    assert run(monkeypatch, *words) == 0
    assert 'id="dimension"' in (tmp_path / "report.html").read_text()
    assert "spectrum: skipped" in capsys.readouterr().out


def test_nothing_counts_as_finished_before_all_of_it_is_written(small, monkeypatch, tmp_path):
    monkeypatch.setattr(spectrum, "figure", fails(OSError("no room")))
    assert run(monkeypatch, "spectrum", "--quick", "--output", tmp_path) == 2
    assert not (tmp_path / "spectrum.json").exists()


def test_the_default_folder_of_quick_results_is_their_own(small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "spectrum", "--quick") == 0
    assert (tmp_path / "reproduced-quick" / "report.html").exists() and not (tmp_path / "reproduced").exists()


# --- from Python ---


def test_python_reproduces_what_the_command_does(small, monkeypatch, tmp_path, capsys):
    """The same files but for times, tables and sentences only where they are asked for."""
    told, shown = [], []
    found = reproduce(["spectrum"], tmp_path / "a", quick=True, say=told.append, show=shown.append)
    assert capsys.readouterr() == ("", "") and shown == [(tmp_path / "a/spectrum.md").read_text()]
    assert told[0] == "spectrum: running" and told[-1] == f"report: {tmp_path / 'a/report.html'}" and len(told) == 3
    assert run(monkeypatch, "spectrum", "--quick", "--json", "--output", tmp_path / "b") == 0
    ours, theirs = json.loads(capsys.readouterr().out)["spectrum"], found["spectrum"]
    assert {**results.plain(theirs), "made": 0, "seconds": 0} == {**ours, "made": 0, "seconds": 0}
    monkeypatch.setattr(spectrum, "measure", never)
    again = reproduce(["spectrum"], tmp_path / "a", quick=True)
    assert results.plain(again) == results.plain(found)


@pytest.mark.parametrize(
    ("names", "options", "error", "said"),
    [
        (["spectrun"], {}, ValueError, "did you mean 'spectrum'"),
        ("spectrum", {}, TypeError, "names must be a list of names, got the string 'spectrum'"),
        (["pipeline"], {}, ValueError, "model belongs to the experiment 'pipeline'"),
        (["spectrum"], {"model": "x"}, ValueError, "model belongs to the experiment 'pipeline'"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_before_a_folder_is_made(tmp_path, names, options, error, said):
    with pytest.raises(error, match=re.escape(said)):
        reproduce(names, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def trained(monkeypatch):
    """Experiments on networks that are made up, and a clock that only their work turns."""
    from matplotlib.figure import Figure

    pytest.importorskip("torch")
    from dfmath.experiments import run as runs
    from dfmath.experiments import trace_error
    from dfmath.experiments import truth as truths

    clock, given = [100.0], {}

    def takes(seconds, value):
        clock[0] += seconds
        return value

    @dataclasses.dataclass(frozen=True)
    class Plan:
        parts: int = 1

    def figure(result):
        """Nothing."""
        return Figure(figsize=(1.0, 1.0))

    def measure(plan, truth, *rest):
        given[len(given)] = (truth, *rest[:-1])
        return takes(2.0, {"value": 1.5})

    module = types.ModuleType("dfmath.experiments.made_up")
    module.__dict__.update(QUESTION="What?", FULL=Plan(), QUICK=Plan(), measure=measure, figure=figure)
    module.tables, module.seen = (lambda result: []), (lambda result: f"It is {result['value']}.")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(runs, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(truths, "truth", lambda place, quick, advance: takes(40.0, "the truth"))
    monkeypatch.setattr(trace_error, "heads", lambda truth, advance, forms: takes(7.0, {forms[0]: f"{forms[0]} head"}))
    for name in set(EXPERIMENTS):
        monkeypatch.delitem(EXPERIMENTS, name)
    for name, heads in (("none", ()), ("one", ("paper",)), ("both", ("local-loss", "paper"))):
        monkeypatch.setitem(EXPERIMENTS, name, Experiment(name, "made_up", heads))
    return given


def test_training_is_counted_where_it_was_needed_first(trained, tmp_path):
    """40 s of the network and 7 s of each head, by the clock; 2 s of work for each experiment."""
    found = reproduce(["none", "one", "both"], tmp_path)
    seconds = {name: (result["training seconds"], result["seconds"]) for name, result in found.items()}
    assert seconds == {"none": (40.0, 2.0), "one": (7.0, 2.0), "both": (7.0, 2.0)}
    both = {"local-loss": "local-loss head", "paper": "paper head"}
    assert list(trained.values()) == [("the truth",), ("the truth", "paper head"), ("the truth", both)]
    reader, _ = read_page(tmp_path)
    rows = [row.split(" 20")[0] for row in reader.rows[1:4]]
    assert rows == [
        "none full 2.0 and 40.0 of training",
        *(f"{n} full 2.0 and 7.0 of training" for n in ("one", "both")),
    ]


@pytest.mark.parametrize("quick", [False, True])
def test_the_report_tells_the_steps_of_training_and_the_amount(trained, tmp_path, quick):
    from dfmath.experiments import trace_error, truth

    reproduce(["none", "one"], tmp_path, quick=quick)
    reader, text = read_page(tmp_path)
    network, head = truth.training_plan(quick).steps, trace_error.head_plan(quick).steps
    end = ", which takes seconds: a quick run." if quick else "."
    assert f"Trained the network for {network} steps{end}It is 1.5." in text
    assert f"Trained the network for {network} steps and each trace head for {head}{end}It is 1.5." in text
    assert [row.split()[1] for row in reader.rows[1:3]] == ["quick" if quick else "full"] * 2
    assert ("Quick results are there to see" in text) == quick


class Reader(html.parser.HTMLParser):
    """Headings, cells and whatever a page points to."""

    def __init__(self):
        super().__init__()
        self.pointers, self.ids, self.text, self.rows, self.row = [], [], [], [], None

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.pointers += [value for name, value in told.items() if name in ("src", "href", "xlink:href") and value]
        self.ids += [told["id"]] if "id" in told else []
        if tag == "tr":
            self.row = ""

    def handle_endtag(self, tag):
        if tag == "tr":
            self.rows.append(self.row)
            self.row = None

    def handle_data(self, data):
        self.text.append(data)
        if self.row is not None:
            self.row += f"{data} "


def test_the_report_stands_alone_and_says_the_numbers(small, monkeypatch, tmp_path):
    for module, figure in FIGURES.items():
        monkeypatch.setattr(module, "figure", figure)
    assert run(monkeypatch, "all", "--quick", "--output", tmp_path) == 0
    reader = Reader()
    reader.feed((tmp_path / "report.html").read_text())
    assert reader.pointers and all(pointer.startswith(("#", "data:")) for pointer in reader.pointers)
    assert {"spectrum", "dimension"} <= set(reader.ids) and len(reader.ids) == len(set(reader.ids))
    text = " ".join("".join(reader.text).split())
    for name, module in (("spectrum", spectrum), ("dimension", dimension)):
        result = results.load(tmp_path / f"{name}.json")
        assert " ".join(module.seen(result).split()) in text and module.QUESTION in text
        for table in module.tables(result):
            assert table.title in text
    assert timing.machine()["processor"] in text


COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results"


def stale(folder, name="spectrum", **change):
    """A result as it is committed, made by other sources, put in a folder."""
    for suffix in (".json", ".md", ".png"):
        shutil.copy(COMMITTED / f"{name}{suffix}", folder)
    told = json.loads((folder / f"{name}.json").read_text())
    (folder / f"{name}.json").write_text(json.dumps(told | {"sources": "others", **change}))
    return told


def read_page(folder):
    reader = Reader()
    reader.feed((folder / "report.html").read_text())
    return reader, " ".join("".join(reader.text).split())


def test_a_result_of_other_sources_is_shown_as_they_wrote_it(small, monkeypatch, tmp_path):
    """Whatever its form: every cell of the table beside it, and its picture; and it is in no other experiment's way."""
    told = stale(tmp_path, data={"another": "form"})
    assert run(monkeypatch, "dimension", "--quick", "--output", tmp_path) == 0
    reader, text = read_page(tmp_path)
    assert {"spectrum", "dimension"} <= set(reader.ids) and "made by other sources" in text
    lines = (tmp_path / "spectrum.md").read_text().splitlines()
    rows = [" ".join(line.replace("|", " ").split()) for line in lines if line.startswith("| ") and "---" not in line]
    assert len(rows) > 5 and [row for row in rows if row not in " ".join(reader.rows)] == []
    assert " ".join(lines[0].split()) in text and lines[2].strip("*") in text and told["machine"]["commit"] in text
    assert base64.b64encode((tmp_path / "spectrum.png").read_bytes()).decode() in "".join(reader.pointers)


@pytest.mark.parametrize("gone", [(".png",), (".md", ".png")])
def test_what_is_not_beside_an_older_result_is_named(tmp_path, gone):
    stale(tmp_path)
    for suffix in gone:
        (tmp_path / f"spectrum{suffix}").unlink()
    Report(tmp_path).write()
    reader, text = read_page(tmp_path)
    assert "spectrum" in reader.ids
    assert (
        f"{' and '.join(f'spectrum{suffix}' for suffix in gone)} {'is' if len(gone) == 1 else 'are'} not there" in text
    )


@pytest.mark.parametrize("fault", ["no json", "list", "machine", "settings", "table", "picture", "other form"])
def test_what_cannot_be_shown_is_left_out_with_a_sentence(small, monkeypatch, tmp_path, fault):
    path = tmp_path / "spectrum.json"
    if fault in ("machine", "settings"):
        stale(tmp_path, **{fault: {}})
    elif fault == "other form":  # by the same sources, or so it says
        stale(tmp_path, sources=results.sources(), data=None)
    else:
        stale(tmp_path)
    if fault in ("no json", "list"):
        path.write_text({"no json": "{", "list": "[]"}[fault])
    elif fault == "table":
        (tmp_path / "spectrum.md").write_text("| a | b |\n| --- | --- |\n| 1 |")
    elif fault == "picture":
        (tmp_path / "spectrum.png").write_text("no picture")
    assert run(monkeypatch, "dimension", "--quick", "--output", tmp_path) == 0
    reader, text = read_page(tmp_path)
    assert "dimension" in reader.ids and "spectrum" not in reader.ids
    assert "Left out, because they hold no result that can be shown: spectrum.json." in text
    assert run(monkeypatch, "spectrum", "--quick", "--fresh", "--output", tmp_path) == 0
    reader, text = read_page(tmp_path)
    assert "spectrum" in reader.ids and "Left out" not in text


def test_null_is_read_as_nan(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(
        json.dumps({"settings": {}, "sources": "", "made": "", "machine": {"commit": None}, "seconds": None})
    )
    found = results.load(path)
    assert np.isnan(found["seconds"]) and found["machine"]["commit"] is None
    path.write_text("[]")
    assert results.load(path) is None


@pytest.mark.parametrize(
    ("settings", "warned"),
    [({"quick": True, "network": {}}, True), ({"quick": False, "network": {}}, False), ({"quick": True}, False)],
)
def test_quick_results_of_networks_say_that_they_are(settings, warned):
    module = types.SimpleNamespace(QUESTION="?", tables=lambda result: [], seen=lambda result: "seen")
    assert (results.WARNING in results.markdown(module, {"settings": settings})) == warned
