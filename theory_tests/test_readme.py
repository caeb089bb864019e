"""What the README says of itself is true: its table, links, badges and citation; its figures show committed numbers."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import dfmath

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(name):
    """A script of docs/readme as a module."""
    spec = importlib.util.spec_from_file_location(f"readme_{name}", ROOT / f"docs/readme/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look it up while it is made
    spec.loader.exec_module(module)
    return module


TABLE, FIGURES = load("table"), load("figures")
ROWS = README.split(TABLE.BEGIN)[1].split(TABLE.END)[0].strip().splitlines()[2:]


def result(name):
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def test_the_table_is_what_the_results_say():
    assert TABLE.table() in README, "run python docs/readme/table.py"


def test_another_result_makes_another_table(monkeypatch):
    own = TABLE.result

    def slower(name):
        found = own(name)
        if name == "network.json":
            found["seconds"]["noise and trace, riding head"] *= 2.0
        return found

    monkeypatch.setattr(TABLE, "result", slower)
    assert TABLE.table() not in README


def test_every_row_names_a_result():
    assert len(ROWS) >= 10
    for row in ROWS:
        (name, path) = re.search(r"\[(\w[\w.-]*\.json)\]\((\S+)\)", row).groups()
        assert path == f"benchmarks/results/{name}" and (ROOT / path).is_file()


@pytest.mark.parametrize(
    ("file", "task", "other", "row"),
    [
        ("moments_patches.json", "mean and trace", "torch dense", "| mean and trace, patches"),
        ("moments_patches_product.json", "one product", "torch jvp", "`torch.func.jvp`"),
        ("moments_digits.json", "mean and trace", "torch dense", "| mean and trace, digits"),
    ],
)
def test_ratios_and_errors_of_moments(file, task, other, row):
    """Once more, from the file alone."""
    levels = result(file)["tasks"][task]["levels"]
    seconds = {name: np.array([lv["contenders"][name]["seconds"] for lv in levels]) for name in ("dfmath", other)}
    ratio = seconds["dfmath"] / seconds[other]
    worst = [max(max(lv["contenders"][name]["errors"].values()) for lv in levels) for name in ("dfmath", other)]
    (line,) = (line for line in ROWS if row in line)
    mean = ratio.prod() ** (1 / len(ratio))
    assert f"**{mean:.2f}**, at most {ratio.max():.2f}" in line
    assert f"{worst[0]:.0e}, {worst[1]:.0e}" in line


def test_the_worst_accuracy():
    cases = result("accuracy.json")["cases"]
    every = {(c, m): v for c, methods in cases.items() for m, q in methods.items() for v in q.values()}
    for dtype in ("float64", "float32"):
        (line,) = (line for line in ROWS if f"{len(cases)} cases, {dtype}" in line)
        ours = max(max(cases[c][m].values()) for c, m in every if m == f"dfmath {dtype}")
        assert f" {ours:.0e}, " in line


def test_the_figure_of_products_shows_the_committed_numbers():
    levels = result("moments_patches_product.json")["tasks"]["one product"]["levels"]
    times, errors = FIGURES.product().axes
    for line, name in zip(times.lines, FIGURES.NAMES, strict=True):
        assert line.get_xydata().tolist() == [[lv["rho"], lv["contenders"][name]["seconds"]] for lv in levels]
    for line, name in zip(errors.lines, FIGURES.NAMES, strict=False):
        wanted = [[lv["rho"], lv["contenders"][name]["errors"]["product"]] for lv in levels]
        assert line.get_xydata().tolist() == wanted


def moments_by_hand(at, points, rho):
    """log q, mean and covariance of the posterior of points of equal weight, in the plane."""
    logits = -((at - points) ** 2).sum(axis=1) / (2 * rho**2)
    w = np.exp(logits - logits.max())
    log_density = logits.max() + np.log(w.mean()) - np.log(2 * np.pi * rho**2)
    w /= w.sum()
    return log_density, (w[:, None] * (points - w @ points)).T @ (points - w @ points)


def test_the_first_figure_is_of_the_three_points_moments():
    found = result("plane.json")
    points, side = np.array(found["points"]), np.array(found["side"])
    for level in found["levels"]:
        rho = level["rho"]
        for i, j in np.random.default_rng(0).integers(len(side), size=(40, 2)):
            log_density, covariance = moments_by_hand(np.array([side[j], side[i]]), points, rho)
            least = 1.0 - np.linalg.eigvalsh(covariance).max() / rho**2
            assert [level["least"][i][j], level["log_density"][i][j]] == pytest.approx([least, log_density], abs=6e-5)
        for node, covariance in zip(level["nodes"], level["covariance"], strict=True):
            wanted = moments_by_hand(np.array(node), points, rho)[1]
            np.testing.assert_allclose(covariance, wanted, atol=1e-6)


def test_the_figure_of_ellipses_has_the_posterior_covariance():
    """Semi-axes of every ellipse are a quarter of the posterior's standard deviations."""
    found = result("plane.json")
    for panel, level in zip(FIGURES.fisher().axes, found["levels"], strict=False):
        paths = [line.get_xydata() for line in panel.lines if len(line.get_xydata()) == 60]
        for path, node, covariance in zip(paths, level["nodes"], level["covariance"], strict=True):
            reach = np.linalg.norm(path - node, axis=1)
            wanted = 0.25 * np.sqrt(np.maximum(np.linalg.eigvalsh(covariance), 0.0))
            assert [reach.min(), reach.max()] == pytest.approx(wanted, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("page", ["README.md", "docs/howto/networks.md", "docs/guide/accuracy.md", "docs/scaling.md"])
def test_links_lead_somewhere(page):
    assert broken(ROOT / page) == []


def broken(page):
    """Links of a page of Markdown to files that are not there, or to headings that their files do not have."""
    found = []
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(link)
    return found


def anchors(page):
    """Names that GitHub and this site give to headings, and those that a page gives itself."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    given = re.findall(r"""<\w+ [^>]*\b(?:id|name)=["']([^"']+)""", text)
    return {*slugs, *given, *re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE)}


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# The `one` heading\n\n```bash\n# no heading\n```\n")
    page = tmp_path / "page.md"
    right = "## Own\n[a](#own) [b](other.md) [c](other.md#the-one-heading) [d](https://x.org/#y)\n"
    wrong = ["#none", "missing.md", "missing.md#own", "other.md#own", "other.md#no-heading"]
    page.write_text(right + " ".join(f"[x]({link})" for link in wrong))
    assert broken(page) == wrong


def test_badges_are_true():
    (line,) = (line for line in README.splitlines()[:6] if "·" in line)
    least = PROJECT["requires-python"].removeprefix(">=")
    assert line == f"{PROJECT['license']} licence · Python {least} or newer · alpha, {PROJECT['version']}"
    assert any("Alpha" in classifier for classifier in PROJECT["classifiers"])


def test_extras_are_installed_from_the_clone():
    """With the constraints, and by their names: a package of that name elsewhere is not this one."""
    pages = [
        ROOT / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("notebooks/[0-9]*"),
        *ROOT.glob("dfmath/**/*.py"),
    ]
    pages = [page for page in pages if "_build" not in page.parts]
    named = []
    for page in pages:
        text = page.read_text()
        assert re.findall(r"pip install[^\n]*\bdfmath\b *\[", text) == [], page
        named += re.findall(r"pip install -c constraints\.txt -e \\*[\"']\.\[([a-z,]+)\]", text)
    assert {"gpu", "dask", "azula", "torch", "diffusers"} <= {extra for names in named for extra in names.split(",")}
    assert {extra for names in named for extra in names.split(",")} <= set(PROJECT["optional-dependencies"])


def test_the_two_commands_are_there_as_they_are_run():
    assert "\npip install -c constraints.txt -e . && dfmath verify\n" in README
    commands = re.findall(r"^pip install .*pytest.*$", README, re.MULTILINE)
    assert commands[0] == 'pip install -c constraints.txt -e ".[test]" && pytest -n 2'


def test_the_citation_is_of_this_version():
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(found)  # what CFF 1.2.0 asks for
    assert (found["version"], found["license"]) == (dfmath.__version__, PROJECT["license"])
    (paper,) = found["references"]
    assert paper["title"] in README.replace("\n", " ") and len(paper["authors"]) == 10
    assert all(f"{a['family-names']}, {a['given-names']}" in README for a in paper["authors"])
