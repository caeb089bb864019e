"""The skeleton of every page of HTML that the library writes: one file that reads no other, and asks no network.

Text is escaped wherever it enters; only what the functions here return counts as HTML.
"""

from __future__ import annotations

import base64
import datetime
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dfmath import files
from dfmath.page_style import STYLE

FORMATS = (".html",)
_PNG = b"\x89PNG\r\n\x1a\n"
_VOID = ("meta", "img", "input", "br", "hr")
# Browsers refuse whatever a page tries to load, pictures within the file apart.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_FIGURE = "figure-"  # what ids within a figure begin with, before it has a number on its page
_DRAWING = re.compile(r"<svg\b.*?</svg>", re.DOTALL)


class Markup(str):
    """HTML; every other string is text, and is escaped."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it; in another section, one level deeper."""

    heading: str
    blocks: tuple[Any, ...]
    anchor: str


def text(value: Any) -> Markup:
    """Return a value as HTML: markup as it is, anything else escaped."""
    return value if isinstance(value, Markup) else Markup(escape(str(value), quote=True))


def element(tag: str, *content: Any, **attributes: Any) -> Markup:
    """Return an element; a trailing underscore of an attribute is dropped, others become hyphens, None is left out.

    >>> element("p", "a < b", class_="quiet")
    '<p class="quiet">a &lt; b</p>'
    """
    pairs = [(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None]
    opening = "".join(f' {name}="{escape(str(value), quote=True)}"' for name, value in pairs)
    if tag in _VOID:
        return Markup(f"<{tag}{opening}>")
    return Markup(f"<{tag}{opening}>{joined(content)}</{tag}>")


def joined(content: Iterable[Any], between: str = "") -> Markup:
    """Return pieces of text and HTML one after another, with text between them."""
    return Markup(text(between).join(text(piece) for piece in content))


def link(words: Any, address: str) -> Markup:
    """Return a link to an anchor of the page (``#name``) or to an address of the web.

    Raises
    ------
    ValueError
        If the address is neither.
    """
    if not address.startswith("#") and urlsplit(address).scheme not in ("https", "http"):
        raise ValueError(f"address must begin with #, https: or http:, got {address!r}")
    return element("a", words, href=address)


def paragraph(*content: Any, **attributes: Any) -> Markup:
    """Return a paragraph of text, links and formulas."""
    return element("p", *content, **attributes)


def section(heading: str, *blocks: Any, anchor: str | None = None) -> Section:
    """Return a section; its anchor is made of the heading unless one is given."""
    return Section(heading, blocks, anchor or _slug(heading))


def _slug(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"


def details(summary: Any, *blocks: Any) -> Markup:
    """Return blocks that stay folded until they are asked for."""
    return element("details", element("summary", summary), *blocks)


def table(headings: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str, name: str = "") -> Markup:
    """Return a table that scrolls sideways where it is too wide; the first cell of a row is the row's heading.

    Parameters
    ----------
    headings
        Of the columns.
    rows
        Cells: text, markup, or numbers, which are shown with three digits. Numbers, and texts that show one, stand to
        the right.
    caption
        What the table shows.
    name
        Added to the table's class, for styles of its own.

    Raises
    ------
    ValueError
        If a row has more or fewer cells than there are headings.
    """
    cells = [list(row) for row in rows]
    body = [_row(headings, row) for row in cells]
    head = element("thead", element("tr", *_headings(headings, cells)))
    whole = element(
        "table", element("caption", element("div", caption)), head, element("tbody", *body), class_=name or None
    )
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _headings(headings: Sequence[Any], rows: list[list[Any]]) -> list[Markup]:
    """Each stands where the cells below it do."""
    columns = list(zip(*rows, strict=True)) or [()] * len(headings)
    numbers = [i > 0 and any(map(_is_number, column)) for i, column in enumerate(columns)]
    kinds = ("number" if right else None for right in numbers)
    return [element("th", heading, scope="col", class_=kind) for heading, kind in zip(headings, kinds, strict=True)]


def _row(headings: Sequence[Any], row: Sequence[Any]) -> Markup:
    if len(row) != len(headings):
        raise ValueError(f"rows must have {len(headings)} cells, got {len(row)}")
    first, *others = row
    kinds = ["number" if _is_number(cell) else None for cell in others]
    cells = (element("td", number(cell), class_=kind) for cell, kind in zip(others, kinds, strict=True))
    return element("tr", element("th", number(first), scope="row"), *cells)


def _is_number(cell: Any) -> bool:
    """Whether this is a number, or a text that shows one, with its error: lines must not break at sign or exponent."""
    if isinstance(cell, Markup):
        return False
    try:
        for part in str(cell).removeprefix("1 - ").split(" ± "):
            float(part)
    except ValueError:
        return False
    return True


def number(value: Any) -> Any:
    """Return a number in three digits, None as a dash, anything else as it is."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else str(value)
    return value


def formula(latex: str, display: bool = True) -> Markup:
    r"""Return LaTeX as MathML, which browsers set themselves; the source stays as its alternative text.

    Parameters
    ----------
    latex
        Such as ``F = I/\sigma^2``.
    display
        On a line of its own, or within a text.

    Raises
    ------
    ValueError
        If it holds a command that can't be converted.
    """
    from dfmath.mathml import convert

    return Markup(convert(latex, display))


def figure(drawing: Any, caption: Any, description: str | None = None) -> Markup:
    """Return a figure of Matplotlib as a drawing in the page; what is black or white takes the page's colours.

    Parameters
    ----------
    drawing
        `matplotlib.figure.Figure`.
    caption
        What stands below it.
    description
        What it shows, for those who don't see it; the caption by default.
    """
    from dfmath import plots

    drawn = _inline(plots.svg(drawing), str(description or caption))
    return element("figure", element("div", drawn, class_="scroll"), element("figcaption", caption))


def _inline(svg: str, description: str) -> Markup:
    """A file of SVG as an element of a page: ids its own, no rules for the rest of the page, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = _prefixed(svg, "", _FIGURE)
    svg = svg.replace("#000000", "currentColor").replace("#ffffff", "var(--paper, #fff)")
    wide = re.search(r'viewBox="0 0 ([\d.]+)', svg)
    assert wide is not None
    # Matplotlib draws 72 units to an inch. Wide figures scroll on a phone, rather than shrink until they can't be read.
    inches = float(wide[1]) / 72
    size = f"width: {inches:.3f}in; min-width: {0.7 * inches:.3f}in"
    look = f'style="{size}" fill="currentColor" stroke-linejoin="round"'  # letters have no colour of their own
    name = f'role="img" aria-label="{escape(description, quote=True)}"'
    opening = re.sub(r' (width|height)="[^"]*"', "", svg[: svg.index(">")])
    return Markup(f"{opening} {look} {name}{svg[svg.index('>') :].rstrip()}")


def _prefixed(svg: str, before: str, after: str) -> str:
    """Ids and what refers to them, with another beginning."""
    return re.sub(rf'(\bid="|\bhref="#|url\(#){before}', rf"\g<1>{after}", svg)


def _numbered(html: str) -> Markup:
    """Give the figures of a page numbers, from one on: the same page is the same text, whatever was drawn before."""
    count = itertools.count(1)
    return Markup(_DRAWING.sub(lambda drawing: _prefixed(drawing[0], _FIGURE, f"figure{next(count)}-"), html))


def image(source: bytes | str | Path, caption: Any, description: str | None = None) -> Markup:
    """Return a PNG, given as a file or its bytes, within the page.

    Raises
    ------
    ValueError
        If it is not a PNG.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    address, description = data_address(data), str(description or caption)
    return element("figure", element("img", src=address, alt=description), element("figcaption", caption))


def data_address(png: bytes) -> str:
    """Return the bytes of a PNG as an address that holds them.

    Raises
    ------
    ValueError
        If they are not those of a PNG.
    """
    if not png.startswith(_PNG):
        raise ValueError(f"image must be a PNG, got bytes that begin with {png[:8]!r}")
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def about_block(*, seconds: float | None = None, **facts: Any) -> Section:
    """Return the section that says what a page was made with: the facts given, time, machine, commit and versions.

    Parameters
    ----------
    seconds
        How long the work took.
    facts
        Such as ``seed=0`` or ``command="dfmath verify"``; None is left out, underscores are shown as spaces.
    """
    from dfmath.benchmarks.timing import machine

    found = machine()
    versions = found.pop("versions")
    took = None if seconds is None else f"{seconds:.1f} s"
    rows = facts | {"written": _now(), "took": took} | found | versions
    shown = [(name.replace("_", " "), str(value)) for name, value in rows.items() if value is not None]
    return section("How this was made", table(("what", "value"), shown, "Settings, machine and versions."))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def contents(sections: Iterable[Section]) -> Markup:
    """Return links to sections."""
    entries = [element("li", link(part.heading, f"#{part.anchor}")) for part in sections]
    return element("nav", element("ul", *entries), aria_label="Contents")


def page(title: str, lead: Any, sections: Iterable[Any], *, style: str = "", script: str = "") -> Markup:
    """Return a whole page.

    Parameters
    ----------
    title
        Its name and first heading.
    lead
        What it says in a sentence or two.
    sections
        What follows: sections, and any other blocks.
    style, script
        CSS and JavaScript of its own.

    Raises
    ------
    ValueError
        If two elements have the same id.
    """
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        element("title", title),
        element("style", Markup(STYLE + style)),
    ]
    parts = [_rendered(part, 2) for part in sections]
    body = [element("main", element("header", element("h1", title), paragraph(lead)), *parts)]
    if script:
        body.append(element("script", Markup(script.replace("</", r"<\/"))))
    whole = _numbered(element("html", element("head", *head), element("body", *body), lang="en"))
    _need_unique_ids(whole)
    return Markup(f"<!DOCTYPE html>\n{whole}\n")


def _policy(script: str) -> str:
    return f"{_POLICY}; script-src 'unsafe-inline'" if script else _POLICY


def _rendered(block: Any, level: int) -> Markup:
    if not isinstance(block, Section):
        return text(block)
    heading = element(f"h{min(level, 6)}", block.heading)
    return element("section", heading, *(_rendered(inner, level + 1) for inner in block.blocks), id=block.anchor)


def _need_unique_ids(html: str) -> None:
    counted = Counter(re.findall(r'<[^<>]*?\sid="([^"]*)"', html))
    if twice := [name for name, count in counted.items() if count > 1]:
        raise ValueError(f"ids of a page must be unique, got {twice[0]!r} twice")


def save(html: str, path: str | Path, name: str = "path") -> Path:
    """Write a page to a temporary name beside `path`, then rename; `name` is what the caller's argument is called.

    Raises
    ------
    ValueError
        If nothing can be written there; `destination` tells before the work.
    OSError
        If the system refuses to write.
    """
    path = destination(path, name)
    with files.replacing(name, path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def destination(path: str | Path, name: str = "path") -> Path:
    """Return the path of a page to be written, or raise a ValueError that says why it can't be."""
    return files.destination(name, path, FORMATS)
