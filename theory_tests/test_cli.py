"""The command line: what it prints, its exit codes, and one line for whatever is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BAD = [
    (["verify", "--data", "missing.npy"], "missing.npy", "does not exist"),
    (["verify", "--data", "text.npy"], "text.npy", "not"),
    (["verify", "--data", "pickled.npy"], "pickled.npy", "pickle"),
    (["verify", "--data", "flat.npy"], "points", "(N, d)"),
    (["verify", "--data", "whole.npy"], "float32 or float64", "int64"),
    (["verify", "--data", "nan.npy"], "finite", "row 1"),
    (["verify", "--backend", "nunba"], "backend", "did you mean 'numba'"),
    (["verify", "--dtype", "float16"], "dtype", "float16"),
    (["verify", "--only", "9.9"], "theorem must be one of", "9.9"),
    (["verify", "--mixture", "0"], "mixture", "got 0"),
    (["verify", "--rho-min", "90"], "rho_min", "90"),
    (["verify", "--limit", "0"], "limit", "0"),
    (["verify", "--seed", "x"], "--seed", "integer"),
    (["verify", "--nonsense"], "--nonsense", ""),
    (["nonsense"], "nonsense", ""),
    (["fisher", "--plot", "figure.xyz"], "plot", "figure.xyz"),
    (["fisher", "--samples", "0"], "n must be", "0"),
    (["ot-test", "--data", "wide.npy", "--plot", "f.png"], "dimension 2", "3"),
    (["ot-test", "--tolerance", "1e-12"], "tolerance", "1e-12"),
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
    np.save(folder / "plane.npy", np.random.default_rng(0).standard_normal((50, 2)))
    return folder


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # --import-mode puts the repository on no path; the installed package runs here.
    command = [sys.executable, "-m", "dfmath", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"NUMBA_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
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


def test_info(folder: Path) -> None:
    done = _run(folder, "info", "--json")
    found = json.loads(done.stdout)
    assert found["versions"]["numpy"] == np.__version__
    assert "numba" in found["backends"]
