"""The documentation: equations that something verifies, theorems that are stated, a built site that holds together."""

from __future__ import annotations

import ast
import html
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import dfmath
from dfmath.theorems.run import select

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MATHEMATICS = sorted((DOCS / "mathematics").glob("*.md"))
EQUATION = re.compile(r"^```\{equation\} (\S+)\n(?::test: ([^\n]*)\n\n)?(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHER_DISPLAYS = re.compile(r"\$\$|\\\[|^```\{math\}|\\begin\{(?:equation|align|gather)", re.MULTILINE)


def equations(page: Path) -> list[tuple[str, list[str], str]]:
    """Number, named tests and LaTeX of each equation of a page."""
    return [(number, (named or "").split(), latex) for number, named, latex in EQUATION.findall(page.read_text())]


def names_of_tests(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


# The sources.


def test_the_guides_traces_are_those_of_the_result():
    """Every cell of the table of traces, in two digits, or three where a level is named; and times in evaluations."""
    result = json.loads((ROOT / "benchmarks" / "results" / "trace-error.json").read_text())
    lines = (DOCS / "guide" / "approximations.md").read_text().split("| trace of F, median")[1].splitlines()
    rhos = [cell.strip().removeprefix("ρ = ") for cell in lines[0].split("|")[1:-2]]
    shown = {f"{level['rho']:.3g}": level["median"] for level in result["levels"]}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:7]]
    names = ("local-loss", "paper", "Hutchinson, 1 probe", "Hutchinson, 8 probes", "exact autodiff")
    for row, name in zip(rows, names, strict=True):
        assert row[1:-1] == [f"{shown[rho][name]:.2g}" for rho in rhos], name
        cost = result["cost"][name]
        assert row[-1] == (f"{cost:.2g}" if cost < 100 else f"{cost:.0f}"), name


@pytest.mark.parametrize("page", MATHEMATICS, ids=lambda page: page.stem)
def test_every_displayed_equation_is_verified(page):
    """By the theorem of its number, or by tests that exist; and no equation is displayed in another way."""
    assert not OTHER_DISPLAYS.findall(page.read_text())
    numbers = {theorem.number for theorem in select()}
    for number, named, latex in equations(page):
        assert latex.strip(), number
        assert named or number in numbers, f"nothing verifies equation {number} of {page.name}"
        for test in named:
            file, _, name = test.partition("::")
            assert name.startswith("test_") and name in names_of_tests(ROOT / "theory_tests" / file), test


def test_equations_are_all_found():
    """The pattern above sees as many as there are openings."""
    opened = sum(page.read_text().count("```{equation}") for page in MATHEMATICS)
    assert opened == sum(len(equations(page)) for page in MATHEMATICS) >= 60


def test_every_theorem_is_stated():
    stated = {number for page in MATHEMATICS for number, named, _ in equations(page) if not named}
    assert stated == {theorem.number for theorem in select()}


def test_every_statement_has_a_proof():
    """Or says that it is a definition."""
    for page in MATHEMATICS[0:]:
        for section in re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]:
            title = section.splitlines()[0]
            if "```{equation}" in section and not re.search(r"\*Proof|definition|protocol|DEIS-SN|corrected", section):
                pytest.fail(f"no proof of {title}")


# The built site.


@dataclass
class Page(HTMLParser):
    """What a page links to, what it loads, and the places within it."""

    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("link", "script", "img", "iframe", "source", "video", "object"):
            self.loads += [found[key] for key in ("href", "src", "data", "srcset") if found.get(key)]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built anew with warnings as errors."""
    for needed in ("sphinx", "myst_parser", "numpydoc", "furo", "latex2mathml", "torch", "diffusers"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", f"{folder}/doctrees"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(DOCS), f"{folder}/html"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    found = {}
    for path in site.rglob("*.html"):
        found[path] = Page()
        found[path].feed(path.read_text())
    assert len(found) >= 25
    return found


def is_elsewhere(link):
    return bool(urlsplit(link).scheme or urlsplit(link).netloc)


def broken(pages):
    """Links and resources of pages, relative ones, that lead nowhere."""
    found = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            if is_elsewhere(link):
                continue
            target, anchor = urlsplit(link).path, unquote(urlsplit(link).fragment)
            file = (path.parent / unquote(target)).resolve() if target else path
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].anchors):
                found.append(f"{path.name}: {link}")
    return found


def test_links_lead_somewhere(pages):
    assert broken({path.resolve(): page for path, page in pages.items()}) == []


def test_broken_links_are_seen(tmp_path):
    """The check itself: a missing file, a missing anchor, and what is there."""
    (tmp_path / "a.html").write_text('<p id="x"></p><a href="b.html">1</a><a href="#y">2</a><a href="a.html#x">3</a>')
    page = Page()
    page.feed((tmp_path / "a.html").read_text())
    assert broken({(tmp_path / "a.html").resolve(): page}) == ["a.html: b.html", "a.html: #y"]


def test_pages_load_nothing_from_a_network(site, pages):
    loaded = [f"{path.name}: {source}" for path, page in pages.items() for source in page.loads if is_elsewhere(source)]
    assert [source for source in loaded if not source.split(": ", 1)[1].startswith("data:")] == []
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", sheet.read_text()), sheet.name
    for script in site.rglob("*.js"):
        assert not re.search(r"(?:fetch|import|src\s*=)\s*\(?['\"]https?://", script.read_text()), script.name


def test_mathematics_is_mathml(site, pages):
    """Formulas are drawn by the browser: as many as there are equations, with no command left over."""
    for source in MATHEMATICS:
        built = (site / "mathematics" / f"{source.stem}.html").read_text()
        formulas = re.findall(r"<math.*?</math>", built, re.DOTALL)
        assert built.count('<div class="formula">') == len(equations(source))
        assert not any("\\" in re.sub(r'alttext="[^"]*"', "", formula) for formula in formulas)
        assert (len(formulas) > 20) == (source.stem != "index")


def test_equations_say_how_they_are_verified(site):
    for source in MATHEMATICS:
        built = re.sub(r"<[^>]+>", "", (site / "mathematics" / f"{source.stem}.html").read_text())
        for number, named, _ in equations(source):
            for said in named or [f"dfmath verify --only {number}"]:
                assert said in built, (number, said)


def test_public_names_have_a_place(site):
    """Whatever a module exports is in the index of the site."""
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    known = {name.rpartition(".")[2] for kind, names in inventory.data.items() for name in names if "py:" in kind}
    modules = ["dfmath", *(info.name for info in pkgutil.walk_packages(dfmath.__path__, "dfmath."))]
    for module in modules:
        if module.rpartition(".")[2].startswith("_"):
            continue
        try:
            exported = getattr(importlib.import_module(module), "__all__", [])
        except ImportError:
            continue
        values = [name for name in exported if _is_documentable(module, name)]
        assert set(values) <= known, (module, set(values) - known)


def _is_documentable(module, name):
    """A class or a function: aliases of types and constants are explained where they are used."""
    value = getattr(importlib.import_module(module), name)
    return isinstance(value, type) or (callable(value) and hasattr(value, "__code__"))


def test_docstrings_name_the_parameters_that_there_are(site):
    """By numpydoc: no unknown parameter, no section out of order, no missing blank."""
    from numpydoc.validate import validate
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    names = [name for kind in ("py:class", "py:function", "py:method") for name in inventory.data.get(kind, {})]
    assert len(names) > 150
    wrong = {}
    for name in names:
        if "azula" in name and find_spec("azula") is None:
            continue
        errors = [text for code, text in validate(name)["errors"] if code in ("GL05", "GL06", "GL07", "PR02", "PR10")]
        if errors:
            wrong[name] = errors
    assert wrong == {}


def test_every_command_is_described(site):
    from typer.main import get_command

    from dfmath.cli import app

    text = re.sub(r"<[^>]+>", "", (site / "reference" / "commands.html").read_text())
    for name, command in get_command(app).commands.items():
        for path, leaf in [(name, command), *((f"{name} {n}", c) for n, c in getattr(command, "commands", {}).items())]:
            if hasattr(leaf, "commands"):
                continue
            assert f"dfmath {path}" in text
            assert all(option.opts[-1] in text for option in leaf.params if option.opts[-1].startswith("--"))


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda file: file.stem)
def test_results_are_shown_with_their_origin(site, file):
    """Every committed file of results is on a page, with its commit and machine, and its figure."""
    built = [page for page in (site / "benchmarks").glob("*.html") if f"results/{file.name}" in page.read_text()]
    assert len(built) == 1
    text, result = built[0].read_text(), json.loads(file.read_text())
    commit = result["machine"]["commit"]
    assert commit in text and re.fullmatch(r"[0-9a-f]{7,}", commit), commit
    if file.with_suffix(".png").is_file():
        assert f"_images/{file.stem}.png" in text


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*.md")), ids=lambda file: file.stem)
def test_tables_are_those_that_were_committed(site, file):
    """Every cell of a committed table is on its page."""
    page = next(
        page for page in (site / "benchmarks").glob("*.html") if f"results/{file.stem}.json" in page.read_text()
    )
    words = set(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text())).split())
    rows = [line for line in file.read_text().splitlines() if line.startswith("|") and "---" not in line]
    assert rows
    for row in rows:
        for word in row.replace("|", " ").split():
            assert word in words, (file.name, word)
