"""Pages: one file that loads nothing, is marked up soundly, escapes what it is given, and says what was found."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from dfmath import GaussianMixture, PointMasses, backends, files, page, plots, probability_flow
from dfmath.explorer import Look, explore
from dfmath.mathml import convert
from dfmath.scene import Window
from dfmath.theorems import registered
from dfmath.theorems.registry import Theorem
from dfmath.theorems.run import Level, Result, model, noise_levels, verify
from dfmath.verification_page import verification_page

VOID = {"meta", "img", "input", "br", "hr", "link"}
# Attributes that make a browser fetch something, a plain link's href apart.
LOADING = {"src", "srcset", "poster", "data", "background", "action", "formaction", "ping", "manifest", "xlink:href"}
NUMBERS = ["1.1", "1.2c", "1.4", "1.5", "1.6b", "1.7", "4.8", "4.9b"]


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


def test_the_same_page_is_the_same_text(results: list[Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was drawn in between; two figures that are alike have ids of their own."""
    monkeypatch.setattr(page, "_now", lambda: "now")

    def made() -> str:
        return page.page("t", "l", [page.figure(_drawing(), "a"), page.figure(_drawing(), "b")])

    first, verified = made(), verification_page(results, ABOUT)
    page.figure(_drawing(), "in between")
    assert made() == first and verification_page(results, ABOUT) == verified
    _need_sound(first)
    drawings = re.findall(r"<svg.*?</svg>", first, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:  # every reference leads to an id of the same figure
        named = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawing))
        assert named and named <= set(re.findall(r'\bid="([^"]+)"', drawing))


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


def test_a_page_takes_the_place_of_another_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("before")
    (tmp_path / "same.html").hardlink_to(tmp_path / "report.html")
    page.save("after", tmp_path / "report.html")
    # Renamed over the old one, not written into it: whoever has that open reads it to its end.
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"report.html": "after", "same.html": "before"}


def test_bad_destinations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawer.html").mkdir()
    for bad, said in (("", "empty"), ("r.txt", ".html"), ("drawer.html", "is a folder"), ("no/r.html", "exists")):
        with pytest.raises(ValueError, match=re.escape(said)):
            page.save("", tmp_path / bad if bad else "")
    monkeypatch.setattr(files, "_writable", lambda folder: False)
    with pytest.raises(ValueError, match="can be written"):
        page.destination(tmp_path / "r.html")


def test_headings_stand_where_their_cells_do() -> None:
    """Numbers to the right, also with an error or beside 1; names, dates and the rows' own headings to the left."""
    rows = [("a", 1.0, "0.27 ± 0.04", "1 - 1.9e-04 ± 3e-05", "2026-11-22", None), ("b", "2e-3", "0", "1", "none", "7")]
    found = Page(page.table(("name", "p", "q", "r", "made", "s"), rows, "numbers"))
    kinds = [th["attributes"].get("class") for th in found.all("th", scope="col")]
    assert kinds == [None, "number", "number", "number", None, "number"]
    cells = [td["attributes"].get("class") for td in found.all("td")]
    assert cells == ["number"] * 3 + [None] * 2 + ["number"] * 3 + [None, "number"]


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


def test_panels_of_one_kind_share_the_scale_of_their_kind(
    results: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Powers of ten around what the panels with that scale show, errors apart from shares of what is allowed."""
    scales: dict[tuple[float, float], list[tuple[Level, ...]]] = {}
    own = plots.discrepancies

    def noted(levels: Any, limits: Any) -> Any:
        scales.setdefault(limits, []).append(levels)
        return own(levels, limits)

    monkeypatch.setattr(plots, "discrepancies", noted)
    verification_page(results, ABOUT)
    assert len(scales) == 2
    for (low, high), drawn in scales.items():
        shares = {any(level.threshold >= 1.0 for level in levels) for levels in drawn}
        assert len(shares) == 1
        every = [v for levels in drawn for x in levels for v in (x.discrepancy, x.threshold)]
        values = [v for v in every if (1e-3 if shares == {True} else 1e-18) < v < math.inf]
        assert low < min(values) <= 10 * low * (1 + 1e-9) and high / 10 * (1 - 1e-9) <= max(values) < high


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


# A look at a prior in the plane


MEANS = np.array([[-1.2, 0.1], [1.0, 0.8]])
COVARIANCES = np.array([[[0.3, 0.2], [0.2, 0.25]], [[0.02, 0.0], [0.0, 0.3]]])
SHARES = np.array([0.7, 0.3])


def _log_q(z: Any, rho: float) -> Any:
    """The mixture's log density at a noise level, written out."""
    normals = [multivariate_normal(m, c + rho**2 * np.eye(2)) for m, c in zip(MEANS, COVARIANCES, strict=True)]
    return logsumexp([np.log(w) + normal.logpdf(z) for w, normal in zip(SHARES, normals, strict=True)], axis=0)


def _differences(z: Any, rho: float) -> tuple[Any, Any]:
    """Gradient and Hessian of the log density at one point, by central differences."""
    h = 1e-3 * rho
    steps = h * np.eye(2)
    gradient = [(_log_q(z + e, rho) - _log_q(z - e, rho)) / (2 * h) for e in steps]
    second = [
        [
            (_log_q(z + a + b, rho) - _log_q(z + a - b, rho) - _log_q(z - a + b, rho) + _log_q(z - a - b, rho)) / 4
            for a in steps
        ]
        for b in steps
    ]
    return np.array(gradient), np.array(second) / h**2


@pytest.fixture(scope="module")
def look() -> Look:
    return explore(GaussianMixture(MEANS, COVARIANCES, SHARES), 5.0, 0.1, frames=7, starts=8, seed=1)


def test_frames_hold_the_density_and_its_derivatives(look: Look) -> None:
    for frame in look.frames:
        wanted = _log_q(look.window.grid(frame.rho, 80), frame.rho).reshape(80, 80)
        np.testing.assert_allclose(frame.log_density, wanted, rtol=1e-9)
        middle = look.window.grid(frame.rho, 13).reshape(13, 13, 2)[3, 8]
        np.testing.assert_allclose(frame.score[3, 8], _differences(middle, frame.rho)[0], rtol=1e-4, atol=1e-6)
        for i, z in enumerate(frame.points):
            gradient, hessian = _differences(z, frame.rho)
            size = 1.0 / frame.rho**2
            np.testing.assert_allclose(frame.fisher[i], -hessian, rtol=1e-4, atol=1e-4 * size)
            np.testing.assert_allclose(frame.mean[i], z + frame.rho**2 * gradient, rtol=1e-4, atol=1e-4 * frame.rho)
            posterior = frame.rho**2 * (np.eye(2) + frame.rho**2 * hessian)
            np.testing.assert_allclose(frame.covariance[i], posterior, atol=1e-4 * frame.rho**2)
    assert any((np.linalg.eigvalsh(frame.fisher) < 0).any() for frame in look.frames)  # what is drawn otherwise


def test_the_window_is_laid_out_row_by_row() -> None:
    grid = Window(np.array([1.0, -2.0]), 0.5).grid(0.5, 4)  # of half-width 2
    np.testing.assert_allclose(grid[:4], [[-0.5, -3.5], [0.5, -3.5], [1.5, -3.5], [2.5, -3.5]])
    np.testing.assert_allclose(grid[4], [-0.5, -2.5])


def test_jacobians_are_those_of_the_map_from_the_first_frame(look: Look) -> None:
    """Central differences of end points, over the whole range at once."""
    prior, (first, *_, last), h = GaussianMixture(MEANS, COVARIANCES, SHARES), look.frames, 1e-4
    ends = [
        [probability_flow(prior, first.points + sign * h * e, 5.0, 0.1, rtol=1e-10).x for sign in (1, -1)]
        for e in np.eye(2)
    ]
    wanted = np.stack([(up - down) / (2 * h) for up, down in ends], axis=2)
    np.testing.assert_allclose(last.jacobian, wanted, atol=1e-4 * np.abs(wanted).max())
    assert last.asymmetry.max() > 0.01  # so that the order of factors shows


def test_trajectories_of_a_gaussian_are_the_closed_form() -> None:
    mean, covariance = np.array([300.0, -200.0]), np.array([[0.04, 0.03], [0.03, 0.05]])
    found = explore(GaussianMixture(mean[None], covariance[None]), frames=4, starts=3)
    first = found.frames[0]
    for k, frame in enumerate(found.frames):
        ratio = _root(covariance, frame.rho) @ np.linalg.inv(_root(covariance, first.rho))
        np.testing.assert_allclose(frame.jacobian, np.tile(ratio, (3, 1, 1)), atol=1e-5)
        np.testing.assert_allclose(frame.points, mean + (first.points - mean) @ ratio.T, rtol=0, atol=1e-5)
        drawn = (frame.points - found.window.centre) / found.window.half(frame.rho)
        np.testing.assert_allclose(found.trails[3 * k], drawn, atol=1e-9)
    assert 0.3 < found.window.reach < 2.0 and np.abs(found.window.centre - mean).max() < 0.5


def _root(covariance: Any, rho: float) -> Any:
    values, vectors = np.linalg.eigh(covariance + rho**2 * np.eye(2))
    return vectors * np.sqrt(values) @ vectors.T


def _within(frame: str, group: str) -> Page:
    return Page(re.search(rf'<g class="{group} layer-{group}">.*?</g>', frame, re.DOTALL)[0])  # type: ignore[index]


def _tips(ellipse: dict[str, Any]) -> tuple[Any, Any]:
    """Centre and the ends of both half-axes, in drawn units."""
    a = ellipse["attributes"]
    angle = np.radians(float(re.match(r"rotate\((\S+) ", a["transform"])[1]))  # type: ignore[index]
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    return np.array([float(a["cx"]), float(a["cy"])]), np.array([float(a["rx"]) * along, float(a["ry"]) * across])


def _frames(look: Look) -> list[str]:
    return re.split(r'(?=<g class="frame")|</svg>', look.html.split('<g class="data"')[0])[1 : len(look.frames) + 1]


def _ends(path: str) -> Any:
    """Both ends of a stroke, (2, 2)."""
    return np.array(re.findall(r"-?[\d.]+", path), dtype=np.float64)[:4].reshape(2, 2)


def test_arrows_point_along_the_score(look: Look) -> None:
    for frame, drawn in zip(look.frames, _frames(look), strict=True):
        (path,) = Page(drawn).all("path", **{"class": "score layer-score"})
        shafts = path["attributes"]["d"].split("M")[1 : 13 * 13 + 1]
        for i, j in ((3, 8), (0, 0), (12, 5)):
            foot, tip = _ends(shafts[13 * i + j])
            np.testing.assert_allclose((foot + tip) / 2, 200 / 13 * np.array([j - 6, i - 6]), atol=0.11)
            score = frame.score[i, j]
            length = 0.85 * 200 / 13 * min(frame.rho * np.linalg.norm(score) / 3, 1.0)
            np.testing.assert_allclose(tip - foot, length * score / np.linalg.norm(score), atol=0.11)


def test_the_words_of_a_frame_give_its_numbers(look: Look) -> None:
    """Read back, and computed once more by the quadratic formula and entry by entry."""
    form = (
        r"ρ = (\S+)\. F has a negative eigenvalue at (no|\d+)(?: of (\d+))? dots?; the eigenvalues of ρ²F lie between "
    )
    form += r"(\S+) and (\S+)\. Asymmetry of .*: (\S+) on average, (\S+) at most\."
    counts = set()
    for frame, drawn in zip(look.frames, _frames(look), strict=True):
        (group,) = Page(drawn).all("g", **{"class": "frame"})
        match = re.fullmatch(form, group["attributes"]["data-words"])
        assert match is not None, group["attributes"]["data-words"]
        rho, bent, dots, *numbers = match.groups()
        (a, b), (_, d) = np.moveaxis(frame.fisher, 0, 2)
        root = np.sqrt((a - d) ** 2 / 4 + b**2)
        low, high = (a + d) / 2 - root, (a + d) / 2 + root
        jacobian = frame.jacobian
        sizes = np.sqrt((jacobian**2).sum(axis=(1, 2)))
        skew = np.abs(jacobian[:, 0, 1] - jacobian[:, 1, 0]) / (np.sqrt(2.0) * sizes)
        wanted = [frame.rho**2 * low.min(), frame.rho**2 * high.max(), skew.mean(), skew.max()]
        assert float(rho) == pytest.approx(frame.rho, rel=5e-3) and group["attributes"]["data-rho"] == rho
        assert [float(number) for number in numbers] == pytest.approx(wanted, rel=0.051, abs=1e-12)
        assert [float(number) for number in numbers[:2]] == pytest.approx(wanted[:2], rel=5.1e-3)
        assert (0 if bent == "no" else int(bent)) == (low < 0).sum() and dots in (None, str(len(low)))
        counts.add((low < 0).sum() / len(low))
    assert 0.0 in counts and counts - {0.0, 0.5, 1.0}  # so that counting the others would show


def test_ticks_stand_where_their_numbers_are(look: Look) -> None:
    """Back from each mark of the box, whose second axis SVG counts downwards, to z."""
    for frame, drawn in zip(look.frames, _frames(look), strict=True):
        half = look.window.half(frame.rho)
        mark = r'<path d="M(\S+) (\S+?)([vh])\S+"></path>'
        marks = re.findall(mark + r'<text x="(\S+)" y="(\S+)"[^>]*>([^<]+)</text>', drawn)
        shown: dict[str, list[float]] = {"v": [], "h": []}
        for x, y, way, at, below, label in marks:
            along, sign, middle = (float(x), 1, 0) if way == "v" else (float(y), -1, 1)
            z = look.window.centre[middle] + sign * along / 100.0 * half
            assert float(label) == pytest.approx(z, abs=0.051 / 100.0 * half + 1e-5 * abs(z))
            assert float(at if way == "v" else below) == pytest.approx(along, abs=2.5)  # the label beside its mark
            shown[way].append(float(label))
        assert all(len(set(labels)) >= 2 for labels in shown.values())


def test_what_is_drawn_of_f_is_f(look: Look) -> None:
    kinds = set()
    for frame, drawn in zip(look.frames, _frames(look), strict=True):
        unit, group = look.window.half(frame.rho) / 100.0, _within(drawn, "curvature")
        values = np.linalg.eigvalsh(frame.fisher)
        sizes = 0.25 / np.sqrt(np.abs(values)) / unit
        elliptic = (values > 0).all(axis=1) & (sizes <= 30.0).all(axis=1)
        assert len(group.all("ellipse")) == elliptic.sum()
        assert len(group.all("path", **{"class": "rising"})) == (values < 0).sum()
        assert len(group.all("path")) == 2 * (~elliptic).sum()
        for axis, fisher in zip(group.all("path"), np.repeat(frame.fisher[~elliptic], 2, axis=0), strict=True):
            along = np.diff(_ends(axis["attributes"]["d"]), axis=0)[0]
            assert (along @ fisher @ along < 0) == (axis["attributes"].get("class") == "rising")
        for ellipse, fisher in zip(group.all("ellipse"), frame.fisher[elliptic], strict=True):
            for tip in _tips(ellipse)[1] * unit:
                assert tip @ fisher @ tip == pytest.approx(1 / 16, rel=0.02)
        kinds |= set(elliptic)
    assert kinds == {True, False}


def test_what_is_drawn_of_posterior_and_flow_is_theirs(look: Look) -> None:
    for frame, drawn in zip(look.frames, _frames(look), strict=True):
        unit = look.window.half(frame.rho) / 100.0
        disc = 0.04 * look.window.half(look.frames[0].rho)
        squares = {"posterior": frame.covariance, "flow": disc**2 * frame.jacobian @ frame.jacobian.swapaxes(1, 2)}
        centres = {"posterior": frame.mean, "flow": frame.points}
        for name, square in squares.items():
            for i, ellipse in enumerate(_within(drawn, name).all("ellipse")):
                centre, tips = _tips(ellipse)
                wanted = (centres[name][i] - look.window.centre) / unit
                np.testing.assert_allclose(centre, wanted, atol=0.051)
                size = np.sqrt(np.linalg.eigvalsh(square[i]).max()) / unit
                np.testing.assert_allclose(tips.T @ tips, square[i] / unit**2, atol=0.02 * size**2)


def test_the_density_stands_upright(look: Look) -> None:
    from PIL import Image

    for frame, drawn in zip(look.frames, _frames(look), strict=True):
        (image,) = Page(drawn).all("image")
        data = base64.b64decode(image["attributes"]["href"].removeprefix("data:image/png;base64,"))
        opaque = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., 3]
        # The group is drawn upside down, so the picture's first row is the window's lowest.
        decades = (frame.log_density - frame.log_density.max()) / np.log(10.0)
        np.testing.assert_allclose(opaque / 255.0, np.clip(1.0 + decades / 4.0, 0.0, 1.0), atol=1 / 255)
        assert 'transform="scale(1,-1)"' in drawn


def test_a_look_is_sound_and_small(look: Look, tmp_path: Path) -> None:
    html = look.save(tmp_path / "look.html").read_text(encoding="utf-8")
    found = _need_sound(html)
    (slider,) = found.all("input", type="range")
    assert slider["attributes"]["max"] == str(len(look.frames) - 1)
    assert found.all("label", **{"for": slider["attributes"]["id"]})
    frames = found.all("g", **{"class": "frame"})
    seen = [i for i, frame in enumerate(frames) if frame["attributes"]["display"] != "none"]
    assert seen == [int(slider["attributes"]["value"])] and len(frames) == len(look.frames)
    assert frames[seen[0]]["attributes"]["data-words"] == found.all("p", **{"class": "words"})[0]["words"]
    for box in found.all("input", type="checkbox"):
        assert f"layer-{box['attributes']['value']}" in html
    assert len(html) * 31 / len(frames) < 1_000_000  # as many as there are by default
    assert "hyperbolas" in html


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(look: Look) -> None:
    found = Page(look._repr_html_())
    assert [e["tag"] for e in found.elements] == ["iframe"]
    assert found.elements[0]["attributes"]["srcdoc"] == look.html and found.elements[0]["attributes"]["title"]
    assert found.elements[0]["attributes"]["sandbox"] == "allow-scripts"


@pytest.mark.parametrize(
    "points",
    [np.array([[3.0, 4.0]]), np.zeros((1, 2)), np.full((5, 2), 1e-3), 1e6 + np.eye(2), np.eye(2, dtype=np.float32)],
)
def test_degenerate_data_can_be_looked_at(points: Any) -> None:
    with backends.use("array-api"):  # no kernels to compile for a dtype that nothing else here has
        found = explore(PointMasses(points), frames=3, starts=2)
    assert "nan" not in found.html.split("</svg>")[0] and "inf" not in found.html.split("</svg>")[0]


def test_of_many_points_some_are_drawn() -> None:
    found = explore(PointMasses(np.random.default_rng(0).standard_normal((1000, 2))), frames=2, starts=1)
    assert found.centres.shape == (400, 2) and "400 of 1000" in found.html


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frames": 1}, "frames must be between 2 and 100, got 1"),
        ({"frames": 101}, "frames must be between 2 and 100, got 101"),
        ({"starts": 0}, "starts must be a positive integer, got int 0"),
        ({"rho_min": 2.0, "rho_max": 1.0}, "rho_min and rho_max must satisfy rho_min < rho_max, got 2 and 1"),
        ({"rho_min": -1.0}, "rho_min"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options_of_a_look_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        explore(PointMasses(np.eye(2)), **options)


def test_other_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="prior must have dimension 2 to be looked at, got dimension 3"):
        explore(PointMasses(np.eye(3)))
    with pytest.raises(TypeError, match="prior"):
        explore(np.eye(2))  # type: ignore[arg-type]


def test_a_look_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("plane.npy", np.random.default_rng(0).standard_normal((50, 2)))
    np.save("wide.npy", np.eye(3))
    code, out, _ = _run(monkeypatch, capsys, "look", "--data", "plane.npy", "--mixture", "2", "--frames", "3")
    assert code == 0 and out == "page: look.html\n"
    assert "a mixture of 2 Gaussians fitted to plane.npy" in Page(Path("look.html").read_text()).all("h1")[0]["words"]
    for words, said in (
        (("--data", "wide.npy"), "data must have dimension 2 to be looked at, got 3"),
        (("--data", "missing.npy", "--output", "x.png"), "output must end in .html, got 'x.png'"),
        (("--frames", "1"), "frames must be between 2 and 100, got 1"),
    ):
        code, out, err = _run(monkeypatch, capsys, "look", *words)
        assert (code, out, err) == (2, "", f"dfmath: {said}\n")


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
const slider = document.querySelector('input[type=range]'), box = document.querySelector('input[value=score]');
slider.value = 1;
slider.dispatchEvent(new Event('input'));
box.click();
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_slider_and_boxes_work_in_a_browser(look: Look, tmp_path: Path) -> None:
    """The page as a browser has it after the slider was moved to the second frame and a box was unticked."""
    (tmp_path / "look.html").write_text(look.html.replace("</body>", f"<script>{PROBE}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [str(BROWSER), *options, (tmp_path / "look.html").as_uri()]
    shown = Page(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    frames = shown.all("g", **{"class": "frame"})
    assert [i for i, frame in enumerate(frames) if frame["attributes"]["display"] == "inline"] == [1]
    assert shown.all("p", **{"class": "words"})[0]["words"] == frames[1]["attributes"]["data-words"]
    layers = {e["attributes"].get("class"): e["attributes"].get("style") for e in shown.elements}
    assert layers["score layer-score"] == "visibility: hidden;"
    assert layers["flow layer-flow"] == "visibility: visible;"
    assert layers["posterior layer-posterior"] == "visibility: hidden;"  # at first
