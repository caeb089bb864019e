"""Every notebook runs from top to bottom, its own assertions hold, and the rendered one is of the same cells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
NEEDS = {"05": ("torch",), "06": ("torch", "diffusers", "transformers")}
LARGEST = 1_000_000  # bytes
# Threads of small problems wait for one another on a busy machine; figures are drawn and not shown.
SETTINGS = {"DFMATH_SHORT": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def run(script, folder):
    command = [sys.executable, "-W", "ignore:FigureCanvasAgg is non-interactive", str(script)]
    settings = {**os.environ, **SETTINGS}
    settings.pop("DFMATH_PIPELINE", None)
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=600, check=False)


def cells(script):
    """Kind and text of each cell of a percent script."""
    found = []
    for line in script.read_text().splitlines():
        if line.startswith("# %%"):
            found.append(("markdown" if "[markdown]" in line else "code", []))
        else:
            found[-1][1].append(line)
    return [(kind, _plain(kind, "\n".join(lines).strip())) for kind, lines in found]


def _plain(kind, text):
    if kind == "code":
        return text
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines())


def test_there_are_seven():
    assert [script.name[:2] for script in SCRIPTS] == ["01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_runs(script, tmp_path):
    for needed in NEEDS.get(script.name[:2], ()):
        pytest.importorskip(needed)
    found = run(script, tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    assert list(tmp_path.iterdir()) == [], "a notebook leaves no files where it is run"


def test_a_wrong_result_is_noticed(tmp_path):
    """An assertion that fails inside a notebook is an error of the run."""
    script = tmp_path / "wrong.py"
    script.write_text("# %%\nassert 1 + 1 == 3, 'arithmetic'\n")
    assert "arithmetic" in run(script, tmp_path).stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_asserts_and_says_what_was_learnt(script):
    text = script.read_text()
    asserted = sum(line.strip().startswith("assert ") for line in text.splitlines())
    assert asserted >= 3
    assert text.count("**Learnt:**") >= 2
    assert "**Limits.**" in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_rendered_notebook_is_of_this_script(script):
    """Same cells in the same order, each code cell run, no error, small enough to be kept: else render it anew."""
    path = script.with_suffix(".ipynb")
    notebook = json.loads(path.read_text())
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]] == cells(script)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for cell in code for output in cell["outputs"]} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_rendered_outputs_name_no_places(script):
    """Nothing of the machine it was rendered on."""
    text = script.with_suffix(".ipynb").read_text()
    assert not any(place in text for place in ("/tmp/", "/home/", "/root/", "/usr/", "Traceback"))
