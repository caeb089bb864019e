"""Pages: one file that loads nothing, is marked up soundly, escapes what it is given, and says what was found."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfmath import files, page, plots
from dfmath.mathml import convert
from dfmath.theorems import registered
from dfmath.theorems.registry import Theorem
from dfmath.theorems.run import Level, Result, model, noise_levels, verify
from dfmath.verification_page import verification_page

VOID = {"meta", "img", "input", "br", "hr", "link"}
# Attributes that make a browser fetch something, a plain link's href apart.
LOADING = {"src", "srcset", "poster", "data", "background", "action", "formaction", "ping", "manifest", "xlink:href"}
NUMBERS = ["1.1", "1.2c", "1.4", "1.5", "1.6b", "1.7", "4.9b"]


class Page(HTMLParser):
    """What a page holds: every element with its attributes and words, and whether tags match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[dict[str, Any]] = []
        self.elements: list[dict[str, Any]] = []
        self.unmatched: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {"tag": tag, "attributes": dict(attrs), "words": "", "within": [e["tag"] for e in self.open]}
        self.elements.append(found)
        if tag not in VOID:
            self.open.append(found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop()["tag"] != tag:
            self.unmatched.append(tag)

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["words"] += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, Any]]:
        wanted = attributes.items()
        return [e for e in self.elements if e["tag"] == tag and all(e["attributes"].get(k) == v for k, v in wanted)]

    def loads(self) -> list[str]:
        """Addresses that a browser would fetch."""
        found = []
        for element in self.elements:
            for name, value in element["attributes"].items():
                fetched = name in LOADING or (name == "href" and element["tag"] != "a") or "url(" in (value or "")
                if fetched and not re.match(r"data:image/png;base64,|#|(fill|clip-path|.*url\(#)", value or ""):
                    found.append(f"{element['tag']} {name}={value}")
            if element["tag"] == "style" and re.search(r"@import|url\(", element["words"]):
                found.append("style")
        return found


def _need_sound(html: str) -> Page:
    found = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert (found.unmatched, found.open) == ([], [])
    ids = [e["attributes"]["id"] for e in found.elements if "id" in e["attributes"]]
    assert len(ids) == len(set(ids))
    assert found.loads() == []
    policy = found.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["attributes"]["content"]
    assert policy.startswith("default-src 'none'") and "http" not in policy
    links = [a["attributes"]["href"] for a in found.all("a")]
    assert [link for link in links if link.startswith("#") and link[1:] not in ids] == []
    assert found.all("html")[0]["attributes"]["lang"] == "en" and len(found.all("h1")) == 1
    headings = [int(e["tag"][1]) for e in found.elements if re.fullmatch(r"h[1-6]", e["tag"])]
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert len(found.all("caption")) == len(found.all("table"))
    assert all(e["attributes"].get("alt") for e in found.all("img"))
    assert all(e["attributes"].get("aria-label") for e in found.all("svg"))
    return found


def _drawing() -> Any:
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    axis.plot([1.0, 2.0], label="a < b")
    axis.imshow(np.eye(3))
    axis.legend()
    return figure


def _png() -> bytes:
    import io

    buffer = io.BytesIO()
    _drawing().savefig(buffer, format="png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def results() -> list[Result]:
    points = np.random.default_rng(3).standard_normal((40, 2)) * [1.0, 0.0]
    return verify(model(points), noise_levels(80.0, 0.02, 3), only=NUMBERS)


ABOUT = {"data": "points <1> & more", "shape": [40, 2], "seed": 0}


def test_a_page_with_everything_is_sound(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(_png())
    parts = [
        page.section(
            "First",
            page.paragraph("words, ", page.link("a paper", "https://arxiv.org/abs/2505.23264")),
            page.figure(_drawing(), "A figure"),
            page.section("Inner", page.table(("name", "value"), [("x", 1.0), ("y", None)], "Numbers")),
        ),
        page.section("Second", page.figure(_drawing(), "Again"), page.formula(r"F \preceq I/\sigma^2")),
        page.image(tmp_path / "picture.png", "A picture"),
        page.about_block(seconds=1.5, seed=7, nothing=None),
    ]
    found = _need_sound(page.page("Title", "Lead.", [page.contents(parts[:2]), *parts]))
    assert [e["words"] for e in found.all("h3")] == ["Inner"]
    assert len(found.all("svg")) == 2 and len(found.all("math")) == 1
    cells = {row["words"].split("\n")[0] for row in found.all("tr")}
    assert {"seed7", "took1.5 s", "y–"} <= cells and not any("nothing" in cell for cell in cells)


EVIL = "<script>alert(1)</script><img src=x onerror=y> \" ' & </title>"


def test_text_is_escaped_wherever_it_enters() -> None:
    blocks = [
        page.paragraph(EVIL),
        page.table((EVIL,), [(EVIL,)], EVIL),
        page.details(EVIL, EVIL),
        page.link(EVIL, "#x"),
        page.figure(_drawing(), EVIL),
        page.image(_png(), EVIL),
        page.about_block(fact=EVIL),
        EVIL,
    ]
    html = page.page(EVIL, EVIL, [page.section(EVIL, *blocks, anchor="x"), EVIL])
    found = Page(html)
    assert found.all("script") == [] and [e["attributes"].get("alt") for e in found.all("img")] == [EVIL]
    assert (found.unmatched, found.open) == ([], [])
    assert found.all("h1")[0]["words"] == EVIL and found.all("title")[0]["words"] == EVIL
    assert found.all("figcaption")[0]["words"] == EVIL and found.all("svg")[0]["attributes"]["aria-label"] == EVIL


def test_a_script_cannot_end_early() -> None:
    found = Page(page.page("t", "l", [], script="const a = '</script><b>';"))
    assert found.all("b") == [] and found.all("script")[0]["words"] == r"const a = '<\/script><b>';"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: page.link("words", "javascript:alert(1)"), "address"),
        (lambda: page.image(b"GIF89a", "caption"), "PNG"),
        (lambda: page.table(("a", "b"), [("x",)], "c"), "2 cells, got 1"),
        (lambda: page.formula(r"\nonsense x"), "nonsense"),
        (lambda: page.formula(r"x_1_2"), "x_1_2"),
        (lambda: page.page("t", "l", [page.section("A"), page.section("a")]), "unique, got 'a'"),
    ],
)
def test_what_makes_no_page_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        call()


def test_figures_take_the_pages_colours_and_leave_its_style_alone() -> None:
    html = page.figure(_drawing(), "caption")
    assert "#000000" not in html and "#ffffff" not in html and "currentColor" in html
    assert "<style" not in html and "<?xml" not in html and "<metadata" not in html
    found = Page(html)
    ids = {e["attributes"]["id"] for e in found.elements if "id" in e["attributes"]}
    named = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html))
    assert named and named <= ids


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = tmp_path / "report.html"
    target.write_text("before")

    def broken(self: Path, text: str, encoding: str) -> None:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise error

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(type(error)) as caught:
        page.save(page.page("t", "l", []), target)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"] and target.read_text() == "before"
    assert isinstance(error, KeyboardInterrupt) or str(target) in str(caught.value)


def test_bad_destinations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawer.html").mkdir()
    for bad, said in (("", "empty"), ("r.txt", ".html"), ("drawer.html", "is a folder"), ("no/r.html", "exists")):
        with pytest.raises(ValueError, match=re.escape(said)):
            page.save("", tmp_path / bad if bad else "")
    monkeypatch.setattr(files, "_writable", lambda folder: False)
    with pytest.raises(ValueError, match="can be written"):
        page.destination(tmp_path / "r.html")


@pytest.mark.parametrize("theorem", registered(), ids=lambda t: t.number)
def test_every_statement_converts(theorem: Theorem) -> None:
    found = Page(convert(theorem.statement))
    assert (found.unmatched, found.open) == ([], [])
    assert found.all("math")[0]["attributes"]["alttext"] == theorem.statement
    # Every sign of the source that is neither command nor grouping is shown.
    plain = re.sub(r"\\text\{([^}]*)\}|\\[A-Za-z]+|\\.|[\s{}^_~']", lambda m: m[1] or "", theorem.statement)
    shown = re.sub(r"\s", "", found.all("math")[0]["words"]).replace("−", "-").replace("∣", "")
    missing = [sign for sign in re.sub(r"\s", "", plain) if shown.count(sign) < plain.count(sign)]
    assert missing == []


def test_formulas_are_spaced_as_tex_spaces_them() -> None:
    assert convert(r"\nabla \log q", False).count("mspace") == 2
    assert "mspace" not in convert(r"\log(x)", False)
    assert "<mi>tr</mi>" in convert(r"\mathrm{tr} F") and "<mi>min</mi>" in convert(r"\min(a)")
    relation = Page(convert(r"A \preceq B")).all("mo")[0]
    assert relation["words"] == "⪯" and float(relation["attributes"]["lspace"].rstrip("em")) > 0
    bars = Page(convert(r"|a|^2 + |b|")).all("mo", lspace="0")
    assert [bar["attributes"]["form"] for bar in bars] == ["prefix", "postfix"] * 2


def _values(found: Page, within: str = "td") -> list[float]:
    return [float(e["attributes"]["value"]) for e in found.all("data") if within in e["within"]]


def test_the_page_says_what_verify_found(results: list[Result]) -> None:
    found = _need_sound(verification_page(results, ABOUT, 1.0))
    assert "points <1> & more, 40 × 2" in found.all("header")[0]["words"]
    table = verification_page(results, ABOUT).split("</table>")[0]
    wanted = [v for r in results if r.worst for v in (r.worst.discrepancy, r.worst.threshold)]
    assert _values(Page(table)) == wanted
    for result in results:
        t = result.theorem
        (card,) = found.all("article", id=f"theorem-{t.number}")
        assert result.verdict in card["words"] and result.reason in card["words"]
        assert t.check.__doc__ is not None and t.check.__doc__ in card["words"]
        assert found.all("math", alttext=t.statement, display="block")
        assert found.all("math", alttext=t.statement, display="inline")
    drawn = [r for r in results if r.theorem.scope == "level" and r.levels]
    assert len(found.all("svg")) == len(drawn) < len(results)


def test_the_place_of_a_check_is_where_it_is(results: list[Result]) -> None:
    html = verification_page(results, ABOUT)
    places = set(re.findall(r"<code>(dfmath/theorems/\w+\.py):(\d+)</code>", html))
    assert len(places) == len(results)
    root = Path(sys.modules["dfmath"].__file__ or "").parents[1]
    for file, line in places:
        assert (root / file).read_text().splitlines()[int(line) - 1].startswith("@theorem(")


def _failing(result: Result, discrepancy: float, reason: str = "why") -> Result:
    level = Level(1.0, discrepancy, 1e-10, reason)
    return Result(result.theorem, "fail", level, reason, (level, *result.levels[1:]))


def test_failures_stand_first_and_are_not_told_by_colour_alone(results: list[Result]) -> None:
    broken = [_failing(results[0], 3e-4, "<because>"), _failing(results[1], math.inf), _failing(results[2], math.nan)]
    found = _need_sound(verification_page([*broken, *results[3:]], ABOUT))
    first = found.all("section")[0]
    assert first["attributes"]["id"] == "what-failed" and "<because>" in first["words"]
    assert "0.0003" in first["words"] and "∞" in first["words"] and "not a number" in first["words"]
    assert len([e for e in found.all("span") if e["words"] == "✗ fail"]) == 9  # in the table, the panels, the cards


def test_someones_own_theorem_is_shown_as_it_can_be(results: list[Result]) -> None:
    def check(case: Any) -> Any:
        """Mine."""

    source = "arXiv 2401.00001, Sec. 2; folklore"
    mine = Theorem("4.99", "Mine", r"\mymacro x", source, "none", "prior", check)
    found = _need_sound(verification_page([Result(mine, "pass", Level(1.0, 0.0, 1.0, ""), "", ())], ABOUT))
    assert [e["words"] for e in found.all("code")][:1] == [r"\mymacro x"] and found.all("svg") == []
    assert found.all("a", href="https://arxiv.org/abs/2401.00001")


def _marks(figure: Any) -> list[tuple[str, float]]:
    return [(line.get_marker(), line.get_ydata()[0]) for line in figure.axes[0].lines if line.get_marker() != "None"]


def test_panels_mark_what_is_beyond_zero_and_not_finite() -> None:
    found = [(1e-12, 1e-10), (1e-8, 1e-10), (0.0, 1e-10), (math.inf, 1e-10), (math.nan, 0.0)]
    levels = [Level(10.0**-i, *values, "") for i, values in enumerate(found)]
    marks = _marks(plots.discrepancies(levels, (1e-15, 1e-6)))
    assert marks == [("o", 1e-12), ("X", 1e-8), ("v", 1e-15), ("^", 1e-6), ("^", 1e-6)]


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    from dfmath import cli

    monkeypatch.setattr(sys, "argv", ["dfmath", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    shown = capsys.readouterr()
    return int(left.value.code or 0), shown.out, shown.err


def test_the_command_writes_page_and_json_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "report.html"
    np.save(tmp_path / "my points.npy", np.random.default_rng(0).standard_normal((60, 2)))
    words = ["verify", "--data", str(tmp_path / "my points.npy"), "--mixture", "2", "--backend", "array-api"]
    words += ["--only", "1.1,1.3,1.5", "--json", "--report", str(target)]
    code, out, err = _run(monkeypatch, capsys, *words)
    assert code == 0 and str(target) in err
    theorems = json.loads(out)["theorems"]
    found = _need_sound(target.read_text(encoding="utf-8"))
    table = Page(target.read_text(encoding="utf-8").split("</table>")[0])
    shown = [v for t in theorems if t["discrepancy"] is not None for v in (t["discrepancy"], t["threshold"])]
    assert _values(table) == shown
    verdicts = [e["words"].split(" ", 1)[1] for e in table.all("span")]
    assert verdicts == [t["verdict"] for t in theorems] and "not applicable" in verdicts
    lead = found.all("header")[0]["words"]
    assert "a mixture of 2 Gaussians fitted to my points.npy, 60 × 2" in lead
    assert "--mixture 2" in found.elements[-1]["words"] or any("--mixture 2" in e["words"] for e in found.all("tr"))


@pytest.mark.parametrize(("name", "said"), [("r.txt", ".html"), ("no/r.html", "exists"), ("", "empty")])
def test_the_command_refuses_a_destination_before_the_work(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # The data are missing as well: had they been looked for first, the message would say so.
    code, out, err = _run(monkeypatch, capsys, "verify", "--data", "missing.npy", "--report", name)
    assert code == 2 and out == "" and err.startswith("dfmath: report must") and said in err and "\n" not in err[:-1]
