"""The command line: what it prints, its exit codes, and one line for whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from dfmath.cli import main
from dfmath.transport import official_schedules

BAD = [
    (["verify", "--data", "missing.npy"], "missing.npy", "does not exist"),
    (["verify", "--data", "text.npy"], "text.npy", "not"),
    (["verify", "--data", "pickled.npy"], "pickled.npy", "pickle"),
    (["verify", "--data", "flat.npy"], "points", "(N, d)"),
    (["verify", "--data", "whole.npy"], "float32 or float64", "int64"),
    (["verify", "--data", "nan.npy"], "finite", "row 1"),
    (["verify", "--backend", "nunba"], "backend", "did you mean 'numba'"),
    (["verify", "--dtype", "float16"], "dtype", "float16"),
    (["verify", "--only", "9.9"], "theorem must be a number", "9.9"),
    (["verify", "--mixture", "0"], "mixture must be a positive integer", "got int 0"),
    (["verify", "--rho-min", "90"], "rho_min", "90"),
    (["verify", "--limit", "0"], "limit", "0"),
    (["verify", "--seed", "x"], "--seed", "integer"),
    (["verify", "--nonsense"], "--nonsense", ""),
    (["nonsense"], "nonsense", "--help lists them"),
    (["explore"], "explore", "Did you mean 'look'?"),
    (["ot"], "ot", "Did you mean 'ot-test'?"),
    (["verify", "--only", "1.22"], "1.1 to 4.10", "did you mean '1.2'?"),
    (["bench", "moments", "--contender", "torch dense, TF32"], "needs --backend cuda", "got 'numpy'"),
    (["fisher", "--plot", "figure.xyz"], "plot", "figure.xyz"),
    (["fisher", "--plot", "drawer.png"], "drawer.png", "is a folder"),
    (["fisher", "--plot", "/proc/f.png"], "'/proc/f.png'", "folder that"),
    (["fisher", "--plot", ""], "plot", "empty"),
    (["fisher", "--samples", "0"], "samples must be a positive integer", "0"),
    (["fisher", "--levels", "0"], "levels must be a positive integer", "0"),
    (["fisher", "--levels", "-1", "--data", "missing.npy"], "levels must be a positive integer", "-1"),
    (["ot-test", "--starts", "0"], "starts must be a positive integer", "0"),
    (["verify", "--seed", "-1", "--data", "missing.npy"], "seed must be", "-1"),
    (["fisher", "--seed", "-1", "--data", "missing.npy"], "seed must be", "-1"),
    (["ot-test", "--seed", "-1", "--data", "missing.npy"], "seed must be", "-1"),
    (["verify", "--backend", "numpy"], "numba", "array-api"),
    (["verify", "plane.npy"], "plane.npy", "--data"),
    (["verify", "--data", ""], "data", "empty"),
    (["verify", "--data", "text.npy"], "text.npy", "numpy.save"),
    (["verify", "--data", "whole.npy"], "whole.npy", "astype"),
    (["verify", "--data", "flat.npy"], "flat.npy", "array in a file"),
    (["ot-test", "--data", "wide.npy", "--plot", "f.png"], "dimension 2", "3"),
    (["ot-test", "--tolerance", "1e-12"], "tolerance", "1e-12"),
    (["bench", "moments", "--data", "nothing"], "data", "nothing"),
    (["bench", "moments", "--task", "one produce"], "task", "one product"),
    (["bench", "moments", "--contender", "torch"], "contender", "torch"),
    (["bench", "moments", "--backend", "cud"], "backend", "cuda"),
    (["bench", "moments", "--rounds", "0"], "rounds must be a positive integer", "0"),
    (["bench", "moments", "--output", "text.npy"], "output must name a folder", "text.npy"),
    (["bench", "flow", "--starts", "0"], "starts must be a positive integer", "0"),
    (["bench", "flow", "--data", "plane"], "data", "plane"),
    (["bench", "scaling", "--most", "0"], "most must be a positive integer", "0"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.npy").write_text("not an array")
    np.save(folder / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(folder / "flat.npy", np.zeros(3))
    np.save(folder / "whole.npy", np.zeros((3, 2), dtype=np.int64))
    np.save(folder / "nan.npy", np.array([[0.0], [np.nan]]))
    np.save(folder / "wide.npy", np.eye(3))
    (folder / "drawer.png").mkdir()
    np.save(folder / "plane.npy", np.random.default_rng(0).standard_normal((50, 2)))
    return folder


def _environment(**more: str) -> dict[str, str]:
    # --import-mode puts the repository on no path; the installed package runs here.
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "COLUMNS")}
    return kept | {"NUMBA_NUM_THREADS": "1"} | more


def _run(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dfmath", *arguments]
    return subprocess.run(
        command, cwd=folder, env=_environment(**more), capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(("arguments", "fragment", "came"), BAD, ids=[" ".join(a) for a, *_ in BAD])
def test_bad_input_is_one_line(folder: Path, arguments: list[str], fragment: str, came: str) -> None:
    done = _run(folder, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("dfmath: ")
    assert done.stderr.count("\n") == 1
    assert fragment in done.stderr and came in done.stderr


def test_verify_prints_a_table_and_json(folder: Path) -> None:
    table = _run(folder, "verify", "--data", "plane.npy", "--only", "1.3", "--only", "1.5")
    assert table.returncode == 0, table.stderr
    assert "2 theorems: 1 pass, 1 not applicable, 0 fail" in table.stdout
    done = _run(folder, "verify", "--data", "plane.npy", "--only", "1.3", "--json")
    found = json.loads(done.stdout)
    assert found["shape"] == [50, 2]
    (theorem,) = found["theorems"]
    assert theorem["number"] == "1.3" and theorem["verdict"] == "pass"
    assert 0 < theorem["threshold"] < 1e-9 and len(theorem["levels"]) == 8
    assert done.stderr == ""


def test_bench_writes_json_a_table_and_a_figure(folder: Path) -> None:
    options = ["--count", "60", "--levels", "2", "--queries", "9", "--rounds", "1", "--output", "results", "--json"]
    done = _run(folder, "bench", "moments", *options, "--task", "one product", "--contender", "numpy dense")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((folder / "results" / "moments_digits.json").read_text()) == found
    for level in found["tasks"]["one product"]["levels"]:
        assert list(level["contenders"]) == ["dfmath", "numpy dense"]
        ours = level["contenders"]["dfmath"]
        assert ours["seconds"] > 0 and ours["errors"]["product"] < 1e-5 and ours["share of sgemm"] > 0
    assert "geometric mean" in (folder / "results" / "moments_digits.md").read_text()
    assert (folder / "results" / "moments_digits.png").read_bytes().startswith(b"\x89PNG")


def test_bench_on_torch_tensors_and_without_a_device(folder: Path) -> None:
    options = ["--count", "600", "--levels", "2", "--queries", "5", "--rounds", "1", "--output", "results", "--json"]
    done = _run(folder, "bench", "moments", *options, "--backend", "torch", "--contender", "torch attention")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "results" / "moments_digits_torch.json").read_text())
    assert found["backend"] == "torch"
    for level in found["tasks"]["mean and trace"]["levels"]:
        assert all(max(figures["errors"].values()) < 1e-4 for figures in level["contenders"].values())
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        done = _run(folder, "bench", "moments", *options, "--backend", "cuda")
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == (
            "dfmath: backend 'cuda' needs a CUDA device that torch sees, got none; 'dfmath info' lists devices\n"
        )


def test_bench_flow_compares_the_same_map(folder: Path) -> None:
    done = _run(folder, "bench", "flow", "--starts", "1", "--alone", "1", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["ratios"]) == {"scipy", "torch dense"}
    assert max(found["largest difference of a Jacobian, relative"].values()) < 1e-6


def test_bench_flow_with_and_without_lists(folder: Path) -> None:
    options = ["--data", "patches", "--count", "4200", "--starts", "1", "--rounds", "1", "--json"]
    done = _run(folder, "bench", "flow", *options, NUMBA_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["ratios"]) == {"dfmath without lists", "torch dense"}
    assert max(found["largest difference of a state"].values()) < 1e-5


def test_bench_scaling_fits_exponents(folder: Path) -> None:
    options = ["--most", "1000", "--queries", "4", "--rounds", "1", "--output", "growth", "--json"]
    done = _run(folder, "bench", "scaling", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["dimensions"] for row in found["rows"]] == [48, 2, 12, 48, 192, 768, 3072]
    assert all(value > 0 for row in found["rows"] for value in [row["least"], *row["seconds"]])
    assert found["exponents"]["points"] == [None] * 3
    assert all(isinstance(value, float) for value in found["exponents"]["dimensions"])
    assert "Exponent in points" in (folder / "growth" / "scaling.md").read_text()
    assert (folder / "growth" / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_exponents_are_those_of_a_power_law() -> None:
    from dfmath.benchmarks.scaling import _exponents

    sizes = [1_000, 100_000, 300_000, 2_000_000]  # the first is left out
    rows = [{"growing": "points", "points": n, "seconds": [2.0 * n**p for p in (0.5, 1.0, 1.5)]} for n in sizes]
    rows[0]["seconds"] = [1e9] * 3
    np.testing.assert_allclose(_exponents(rows, "points"), [0.5, 1.0, 1.5])


def test_limit_says_what_it_leaves_out(folder: Path) -> None:
    done = _run(folder, "verify", "--data", "plane.npy", "--only", "1.1", "--limit", "20")
    assert done.returncode == 0
    assert "a random 20 of 50 points" in done.stderr


def test_fisher_writes_a_figure(folder: Path) -> None:
    done = _run(folder, "fisher", "--data", "plane.npy", "--levels", "3", "--samples", "4", "--plot", "fisher.png")
    assert done.returncode == 0, done.stderr
    assert (folder / "fisher.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".fisher*"))


def test_fisher_json_matches_the_limits(folder: Path) -> None:
    done = _run(
        folder, "fisher", "--data", "plane.npy", "--levels", "3", "--samples", "8", "--rho-max", "1e4", "--json"
    )
    levels = json.loads(done.stdout)["levels"]
    assert abs(levels[0]["trace"] - 1.0) < 1e-6  # far above the data, rho^2 F is the identity
    assert all(level["quantiles"][-1] <= 1 + 1e-12 for level in levels)
    assert 1.0 <= levels[0]["effective_rank"] <= 2.0


def test_ot_test_agrees_over_schedules(folder: Path) -> None:
    done = _run(folder, "ot-test", "--starts", "4", "--plot", "ot.png", "--json")
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert len(checks) == 10
    assert max(c["differs_from_canonical"] for c in checks) < 1e-6
    assert all(c["asymmetry_offdiagonal"]["mean"] < 1e-8 for c in checks if c["data"] == "three on a line")
    assert (folder / "ot.png").exists()


def test_ot_test_ends_with_one_where_a_schedule_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundredth of VP's diffusion is missing."""
    kind = type(official_schedules()["VP"])
    right = kind._diffusion_squared
    monkeypatch.setattr(kind, "_diffusion_squared", lambda self, xp, t: 0.99 * right(self, xp, t))
    monkeypatch.setattr(sys, "argv", ["dfmath", "ot-test", "--starts", "2", "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    checks = json.loads(capsys.readouterr().out)["checks"]
    differing = {(c["data"], c["schedule"]) for c in checks if c["differs_from_canonical"] > 1e-6}
    assert differing == {("three points", "VP")} and left.value.code == 1


def _table(printed: str) -> list[dict[str, str]]:
    """Rows of a table in the terminal, by the headings of its columns."""
    (headings,) = ([c.strip() for c in line.split("┃")[1:-1]] for line in printed.splitlines() if line.startswith("┃"))
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    return [dict(zip(headings, row, strict=True)) for row in rows]


def _shows(cell: str, *values: float | None) -> bool:
    """Whether the cell's numbers are the values, rounded to the digits that are there; None is no number."""
    numbers = [Decimal(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?", cell)]
    wanted = [value for value in values if value is not None]
    units = [10.0 ** int(number.as_tuple().exponent) for number in numbers]
    return len(numbers) == len(wanted) and all(
        abs(float(n) - w) <= 0.5001 * unit for n, w, unit in zip(numbers, wanted, units, strict=True)
    )


def test_the_table_of_theorems_shows_the_numbers_of_its_json(folder: Path) -> None:
    arguments = ("verify", "--data", "plane.npy", "--only", "1.1,1.2c,1.3,1.5,2.1")
    rows = _table(_run(folder, *arguments, COLUMNS="300").stdout)
    theorems = json.loads(_run(folder, *arguments, "--json").stdout)["theorems"]
    assert [row["no."] for row in rows] == [t["number"] for t in theorems] and len(rows) == 5
    for row, found in zip(rows, theorems, strict=True):
        assert (row["theorem"], row["verdict"]) == (found["title"], found["verdict"])
        assert row["because"] == found["reason"] or re.fullmatch(r"\([a-z]\)", row["because"])
        assert _shows(row["worst"], found["discrepancy"]) and _shows(row["allowed"], found["threshold"])


def test_the_table_of_transport_shows_the_numbers_of_its_json(folder: Path) -> None:
    arguments = ("ot-test", "--starts", "4")
    rows = _table(_run(folder, *arguments, COLUMNS="300").stdout)
    checks = json.loads(_run(folder, *arguments, "--json").stdout)["checks"]
    assert len(rows) == len(checks) == 10
    for row, found in zip(rows, checks, strict=True):
        assert (row["data"], row["schedule"]) == (found["data"], found["schedule"])
        assert row["transport?"] == ("yes" if found["is_transport"] else "no")
        for heading, name in (("off-diagonal", "asymmetry_offdiagonal"), ("rotation-invariant", "asymmetry")):
            assert _shows(row[heading], found[name]["mean"], found[name]["standard_error"]), (row, name)
        for heading, name in (("min eig.", "min_eigenvalue"), ("gap", "transport_gap")):
            assert _shows(row[heading], found[name]), (row, name)
        assert float(row["differs by"]) < 1e-6


def test_the_table_of_profiles_shows_the_numbers_of_its_json(folder: Path) -> None:
    """At levels where no eigenvalue is near 1."""
    arguments = (
        "fisher",
        "--data",
        "plane.npy",
        "--rho-max",
        "0.9",
        "--rho-min",
        "0.4",
        "--levels",
        "3",
        "--samples",
        "8",
    )
    rows = _table(_run(folder, *arguments, COLUMNS="300").stdout)
    wanted = json.loads(_run(folder, *arguments, "--json").stdout)["levels"]
    assert len(rows) == len(wanted) == 3
    for row, found in zip(rows, wanted, strict=True):
        assert _shows(row["rho"], found["rho"])
        assert _shows(row["rho^2 tr F / d"], found["trace"], found["trace_error"])
        for heading, k in (("smallest", 0), ("median", 2), ("largest", 4)):
            assert _shows(row[heading], found["quantiles"][k]), (row, k)
        assert _shows(row["effective rank of P"].split("(")[0], found["effective_rank"], found["effective_rank_error"])


def test_info(folder: Path) -> None:
    done = _run(folder, "info", "--json")
    found = json.loads(done.stdout)
    assert found["versions"]["numpy"] == np.__version__
    assert "numba" in found["backends"]
    assert "numpy" in found["array libraries"]


def test_no_command_prints_the_help(folder: Path) -> None:
    done = _run(folder)
    assert done.returncode in (0, 2) and done.stderr == ""
    assert done.stdout == _run(folder, "--help").stdout
    assert done.stdout.count("\n") > 8 and "..." not in done.stdout.split("Commands:")[1]


def test_version(folder: Path) -> None:
    done = _run(folder, "--version")
    assert (done.returncode, done.stdout) == (0, "dfmath 0.1.0\n")


def test_help_names_the_defaults(folder: Path) -> None:
    assert "three points" in _run(folder, "ot-test", "--help", COLUMNS="200").stdout
    assert "--only NUMBER" in _run(folder, "verify", "--help", COLUMNS="200").stdout


# Once the entry point runs: among its imports, or well within the work.
@pytest.mark.parametrize("pause", [0.05, 3.0])
@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_interruption_is_one_line(folder: Path, pause: float) -> None:
    script = "import sys, dfmath.cli; print('ready', file=sys.stderr, flush=True); dfmath.cli.main()"
    # Where the tests run in the background of a shell, the signal is ignored and children inherit that.
    started = subprocess.Popen(
        [sys.executable, "-c", script, "ot-test", "--starts", "3000"],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert started.stderr is not None and started.stderr.readline() == "ready\n"
    time.sleep(pause)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=120)
    assert (started.returncode, out, err) == (130, "", "dfmath: interrupted\n")


def test_one_sample_has_no_error(folder: Path) -> None:
    done = _run(folder, "fisher", "--data", "plane.npy", "--levels", "2", "--samples", "1")
    assert "nan" not in done.stdout and "±" not in done.stdout
    assert "1 draw at each level" in done.stdout
    done = _run(folder, "ot-test", "--data", "plane.npy", "--starts", "1", "--rho-min", "1")
    assert "nan" not in done.stdout and "1 start," in done.stdout


def test_without_the_spectrum_its_columns_are_gone(folder: Path) -> None:
    done = _run(folder, "fisher", "--data", "plane.npy", "--levels", "2", "--samples", "4", "--no-spectrum")
    assert "tr F" in done.stdout
    assert "effective rank" not in done.stdout and "median" not in done.stdout


def test_effective_rank_is_null_where_the_posterior_is_one_point(folder: Path) -> None:
    arguments = ("fisher", "--data", "plane.npy", "--rho-min", "1e-5", "--levels", "3", "--samples", "8", "--json")
    levels = json.loads(_run(folder, *arguments).stdout)["levels"]
    assert levels[-1]["effective_rank"] is None
    assert all(level["effective_rank"] >= 1.0 for level in levels[:-1] if level["effective_rank"] is not None)


def test_tables_honour_columns(folder: Path) -> None:
    arguments = ("verify", "--data", "plane.npy", "--only", "1.1b,1.8")
    widths = [max(map(len, _run(folder, *arguments, **c).stdout.splitlines())) for c in ({}, {"COLUMNS": "90"})]
    assert 90 < widths[0] <= 132 and widths[1] <= 90


def test_only_takes_commas(folder: Path) -> None:
    done = _run(folder, "verify", "--data", "plane.npy", "--only", "1.2c, 1.3", "--json")
    assert [t["number"] for t in json.loads(done.stdout)["theorems"]] == ["1.2c", "1.3"]


def test_a_shared_reason_stands_once(folder: Path) -> None:
    done = _run(folder, "verify", "--data", "plane.npy", "--only", "1.1,1.3")
    assert done.stdout.count("float64 results") == 1
    assert done.stdout.count("(a)") >= 3
