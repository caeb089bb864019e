"""What `dfmath verify` found, as a page: statements, verdicts, discrepancies over the noise levels, and the checks."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dfmath import page, plots
from dfmath.page import Markup, Section, element, joined, link, number, paragraph, section
from dfmath.report import plural
from dfmath.theorems.registry import Theorem
from dfmath.theorems.run import Level, Result

_SIGNS = {"pass": "✓", "fail": "✗", "not applicable": "–"}
_CLASSES = {"pass": "good", "fail": "bad", "not applicable": "other"}
_LEAST = {False: 1e-18, True: 1e-3}  # what is as good as zero: of relative errors, and of shares of what is allowed
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_STYLE = """
.theorems tbody th { min-width: 9rem; width: 16rem; }
.theorems small { display: block; color: var(--quiet); min-width: 20rem; }
.verdict { white-space: nowrap; font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .other { color: var(--other); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(15.5rem, 1fr)); gap: 0.5rem 1.2rem; }
.panels figure { margin: 0; display: flex; flex-direction: column-reverse; }
@media print { .theorems tbody th, .theorems small { min-width: 0; } }
article { border-top: 1px solid var(--line); margin-top: 1.5rem; }
article math { font-size: 1.15em; }
"""


def verification_page(results: Sequence[Result], about: Mapping[str, Any], seconds: float | None = None) -> Markup:
    """Return the page of a verification.

    Parameters
    ----------
    results
        Of `dfmath.theorems.run.verify`.
    about
        What was verified: ``data`` and ``shape``, and whatever else is to be said of it.
    seconds
        How long it took.
    """
    n, d = about["shape"]
    counted = Counter(result.verdict for result in results)
    counts = f"{counted['pass']} pass, {counted['not applicable']} not applicable, {counted['fail']} fail"
    lead = f"{plural(len(results), 'theorem')} checked on {about['data']}, {n} × {d}: {counts}."
    shown = {**about, "shape": f"{n} × {d}"}
    sections = [*_failures(results), _overview(results), *_panels(results), _statements(results)]
    sections.append(page.about_block(seconds=seconds, **shown))
    return page.page("Theorems verified", lead, [page.contents(sections), *sections], style=_STYLE)


def _failures(results: Sequence[Result]) -> list[Section]:
    failed = [result for result in results if result.verdict == "fail"]
    if not failed:
        return []
    entries = (element("li", _to(r.theorem), ": ", _extent(r), "; ", r.reason) for r in failed)
    return [section("What failed", element("ul", *entries))]


def _to(theorem: Theorem) -> Markup:
    return link(f"{theorem.number} {theorem.title}", f"#{_anchor(theorem)}")


def _anchor(theorem: Theorem) -> str:
    return f"theorem-{theorem.number}"


def _extent(result: Result) -> Markup:
    """The worst discrepancy beside what is allowed."""
    if result.worst is None:
        return Markup("")
    return joined([_figure_of(result.worst.discrepancy), ", allowed ", _figure_of(result.worst.threshold)])


def _figure_of(value: float) -> Markup:
    """A number in two digits that keeps all of them for programs."""
    shown = f"{value:.2g}" if math.isfinite(value) else "∞" if math.isinf(value) else "not a number"
    return element("data", shown, value=repr(float(value)))


def _overview(results: Sequence[Result]) -> Section:
    headings = ("theorem", "verdict", "worst", "allowed", "at ρ", "statement, source and check")
    caption = (
        "The worst discrepancy of each theorem over the noise levels, beside what is allowed; ρ = σ/α is the "
        "noise-to-signal ratio of the worst level. Theorems about trajectories are checked over the whole range."
    )
    return section("All theorems", page.table(headings, [_row(r) for r in results], caption, "theorems"))


def _row(result: Result) -> tuple[Any, ...]:
    t, worst = result.theorem, result.worst
    numbers: tuple[Any, ...] = (None, None, None)
    if worst is not None:
        where = f"{worst.rho:.3g}" if t.scope == "level" else "all"
        numbers = (_figure_of(worst.discrepancy), _figure_of(worst.threshold), where)
    cells = (number(value) for value in numbers)
    origin = element("small", _source(t), "; ", element("code", _place(t)))
    return (_to(t), _verdict(result), *cells, joined([_statement(t, False), origin]))


def _verdict(result: Result) -> Markup:
    words = f"{_SIGNS[result.verdict]} {result.verdict}"
    return element("span", words, class_=f"verdict {_CLASSES[result.verdict]}")


def _statement(theorem: Theorem, display: bool) -> Markup:
    """As a formula, or as its source where someone's own theorem has commands that can't be converted."""
    try:
        return page.formula(theorem.statement, display)
    except ValueError:
        return element("code", theorem.statement)


def _source(theorem: Theorem) -> Markup:
    """Where it comes from; papers on arXiv are linked."""
    found = _ARXIV.search(theorem.source)
    if found is None:
        return page.text(theorem.source)
    before, after = theorem.source[: found.start()], theorem.source[found.end() :]
    return joined([before, link(found[0], f"https://arxiv.org/abs/{found[1]}"), after])


def _place(theorem: Theorem) -> str:
    """File and line of the check, such as dfmath/theorems/identities.py:57; the line alone in a notebook."""
    line = theorem.check.__code__.co_firstlineno
    module = theorem.check.__module__
    return f"line {line}" if module == "__main__" else f"{module.replace('.', '/')}.py:{line}"


def _panels(results: Sequence[Result]) -> list[Section]:
    """One small figure for each theorem that is checked at every level."""
    drawn = [r for r in results if r.theorem.scope == "level" and r.levels]
    if not drawn:
        return []
    lead = paragraph(
        "Dots are discrepancies, dashes what is allowed, against the noise-to-signal ratio ρ. A cross is beyond what "
        "is allowed; a triangle on the lower edge is zero or below the scale, one on the upper edge is not finite. "
        "Panels whose discrepancies are relative errors share one scale, and so do those that count standard errors "
        "or shares of a bound."
    )
    figures = []
    for result in drawn:
        kin = [other for other in drawn if _is_statistical(other) is _is_statistical(result)]
        figures.append(_panel(result, _limits(kin, _LEAST[_is_statistical(result)])))
    return [section("Discrepancy against noise level", lead, element("div", *figures, class_="panels"))]


def _is_statistical(result: Result) -> bool:
    """Whether discrepancies are in units of what chance or a bound allows rather than relative errors."""
    return max(level.threshold for level in result.levels) >= 1.0


def _limits(results: Sequence[Result], least: float) -> tuple[float, float]:
    """Powers of ten around all that is finite, and not smaller than `least`."""
    levels = [level for result in results for level in result.levels]
    values = [v for level in levels for v in (level.discrepancy, level.threshold) if least < v < math.inf] or [1.0]
    return 10.0 ** (math.ceil(math.log10(min(values))) - 1), 10.0 ** (math.floor(math.log10(max(values))) + 1)


def _panel(result: Result, limits: tuple[float, float]) -> Markup:
    caption = joined([_to(result.theorem), element("br"), _verdict(result)])
    t = result.theorem
    description = f"{t.number} {t.title}: discrepancy against noise level, {result.verdict}; its table has the numbers"
    return page.figure(plots.discrepancies(result.levels, limits), caption, description)


def _statements(results: Sequence[Result]) -> Section:
    return section("One by one", *(_card(result) for result in results), anchor="one-by-one")


def _card(result: Result) -> Markup:
    t = result.theorem
    facts = [paragraph(_verdict(result), *_because(result))]
    facts.append(paragraph("Hypotheses: ", t.hypotheses, ". Source: ", _source(t), "."))
    if result.levels:
        facts.append(page.details("numbers at each level", _levels(t, result.levels)))
    code = element("pre", element("code", _code(t)), tabindex=0)
    facts.append(page.details(joined(["the check, ", element("code", _place(t))]), code))
    return element("article", element("h3", f"{t.number} {t.title}"), _statement(t, True), *facts, id=_anchor(t))


def _because(result: Result) -> tuple[Any, ...]:
    """Why the verdict is what it is: the worst number and what the threshold rests on, or what does not apply."""
    return (": ", result.reason) if result.worst is None else (": ", _extent(result), "; ", result.reason)


def _levels(theorem: Theorem, levels: Sequence[Level]) -> Markup:
    rows = [(_rho(theorem, x), _figure_of(x.discrepancy), _figure_of(x.threshold), x.reason) for x in levels]
    return page.table(
        ("ρ", "discrepancy", "allowed", "because"), rows, f"Theorem {theorem.number} at each noise level."
    )


def _rho(theorem: Theorem, level: Level) -> str:
    return f"{level.rho:.3g}" if theorem.scope == "level" else "all"


def _code(theorem: Theorem) -> str:
    try:
        return inspect.getsource(theorem.check)
    except OSError:  # installed without sources
        return theorem.check.__doc__ or "no source at hand"
