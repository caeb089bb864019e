"""Displayed equations with their theorem number and what verifies them, and links to them from [MATH 1.2]."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.errors import ExtensionError
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

from dfmath.theorems import Theorem
from dfmath.theorems.run import select

ROOT = Path(__file__).parents[2]
CITED = re.compile(r"\[MATH ([^\];]*)[^\]]*\]")  # what follows a semicolon is another source
NUMBER = re.compile(r"\b\d(?:\.\d+[a-z]?)?\b")
SCOPES = {"level": "at each noise level", "prior": "over all noise levels"}


@cache
def theorems() -> dict[str, Theorem]:
    """Registered theorems by their numbers."""
    return {theorem.number: theorem for theorem in select()}


@cache
def tests(file: str) -> frozenset[str]:
    """Names of the test functions of one file in theory_tests."""
    tree = ast.parse((ROOT / "theory_tests" / file).read_text())
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def there_is(test: str) -> bool:
    """Whether a test, named as ``test_bounds.py::test_x``, exists."""
    file, _, name = test.partition("::")
    return (ROOT / "theory_tests" / file).is_file() and name in tests(file)


def anchor(number: str) -> str:
    """The id of the first equation of a number."""
    return "math-" + number.replace(".", "-")


class Equation(SphinxDirective):
    """``{equation} 1.2``: a displayed equation; with ``:test:`` where another test than the theorem's verifies it."""

    required_arguments = 1
    has_content = True
    option_spec = {"test": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Return the formula with its number, and a line on what verifies it."""
        number, named = self.arguments[0], self.options.get("test", "").split()
        missing = [test for test in named if not there_is(test)]
        if missing or not (named or number in theorems()):
            raise self.error(
                f"equation {number} is verified by nothing that exists: {missing or 'no theorem, no test'}"
            )
        box, document = nodes.container(classes=["equation"]), self.state.document
        homes = self.env.domaindata.setdefault("dfmath_equations", {})
        if homes.setdefault(number, self.env.docname) == self.env.docname and anchor(number) not in document.ids:
            box["ids"].append(anchor(number))
            document.note_explicit_target(box, box)
        latex = "\n".join(self.content)
        box += nodes.math_block(latex, latex, number=None, nowrap=True)
        box += nodes.inline(text=f"({number})", classes=["number"])
        box += _checked_by(*named) if named else _by_theorem(theorems()[number])
        return [box]


def _checked_by(*names: str) -> nodes.paragraph:
    line = nodes.paragraph(classes=["check"])
    line += nodes.Text("Checked by ")
    for i, name in enumerate(names):
        line += [nodes.Text(", " if i else ""), nodes.literal(text=name)]
    return line


def _by_theorem(theorem: Theorem) -> nodes.paragraph:
    """The command that checks it, for what priors, and where the statement is from."""
    line = _checked_by(f"dfmath verify --only {theorem.number}")
    hypotheses = "" if theorem.hypotheses == "finite second moment" else f", for {theorem.hypotheses}"
    source = theorem.source.capitalize() if theorem.source[:3] == "new" else f"Source: {theorem.source}"
    line += nodes.Text(f" {SCOPES[theorem.scope]}{hypotheses}. {source}.")
    return line


class Citations(SphinxPostTransform):
    """``[MATH 1.2, 4.8-4.9]`` becomes links to the equations."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        """Replace every number in such brackets."""
        for text in list(self.document.findall(nodes.Text)):
            if CITED.search(text) and not isinstance(
                text.parent, nodes.literal | nodes.literal_block | nodes.reference
            ):
                text.parent.replace(text, self._linked(str(text)))

    def _linked(self, text: str) -> list[nodes.Node]:
        found: list[nodes.Node] = []
        end = 0
        for cited in CITED.finditer(text):
            for number in NUMBER.finditer(text, *cited.span(1)):
                found += [nodes.Text(text[end : number.start()]), self._link(number.group())]
                end = number.end()
        return [*found, nodes.Text(text[end:])]

    def _link(self, number: str) -> nodes.Node:
        home = _home(self.env, number)
        if home is None:
            raise ExtensionError(f"{self.env.docname} cites [MATH {number}], which no page states")
        docname, name = home
        uri = self.app.builder.get_relative_uri(self.env.docname, docname) + f"#{name}"
        return nodes.reference("", number, internal=True, refuri=uri)


CHAPTERS = {
    "0": "reference/notation",
    "1": "mathematics/one-level",
    "2": "mathematics/flow",
    "3": "mathematics/transport",
    "4": "mathematics/approximations",
    "5": "mathematics/guidance-and-sampling",
    "6": "mathematics/guidance-and-sampling",
}


def _home(env: Any, number: str) -> tuple[str, str] | None:
    """Document and anchor of a number: of its equation, of the theorem that it is a part of, or of its chapter."""
    known = env.domaindata.get("dfmath_equations", {})
    if number in CHAPTERS:
        return CHAPTERS[number], f"chapter-{number}"
    for name in (number, number.rstrip("abcdefghijklmnopqrstuvwxyz")):
        if name in known:
            return known[name], anchor(name)
    return None


def setup(app: Any) -> dict[str, Any]:
    """Register directive and links."""
    app.add_directive("equation", Equation)
    app.add_post_transform(Citations)
    return {"parallel_read_safe": False, "env_version": 1}
