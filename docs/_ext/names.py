"""Docstrings as they are written: short names in backticks become links, and bars are norms, not substitutions."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.util.nodes import make_refnode

# What keeps its bars: directives with what is indented below them, literal blocks, and whatever is in backticks.
KEPT = re.compile(r"(^[ ]*\.\. .*(?:\n(?:[ ]+.*)?)*|::\n(?:\n|[ ]+.*\n)+|`+[^`]+`+)", re.MULTILINE)

ALIAS = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")


def _escape_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    parts = KEPT.split("\n".join(lines))
    lines[:] = "".join(p if i % 2 else p.replace("|", "\\|") for i, p in enumerate(parts)).split("\n")


def _name_aliases(app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, returns: Any) -> Any:
    """Aliases of types by their names alone, where Sphinx writes how it looked them up."""
    return tuple(part and ALIAS.sub(r"\1", part) for part in (signature, returns))


def _resolve(app: Any, env: Any, node: Any, content: nodes.Element) -> nodes.Element | None:
    """`bounds.endpoint_error` is dfmath.bounds.endpoint_error, whatever module's docstring says it."""
    if node.get("refdomain") != "py":
        return None
    target = node.get("reftarget", "").removesuffix("()")
    objects = env.get_domain("py").objects
    homes = {(entry.docname, entry.node_id) for name, entry in objects.items() if name.endswith(f".{target}")}
    if len(homes) != 1:
        return None
    docname, place = homes.pop()
    return make_refnode(app.builder, node["refdoc"], docname, place, content, target)


def setup(app: Any) -> dict[str, Any]:
    """Connect to docstrings, after numpydoc, and to references that Sphinx did not resolve."""
    app.connect("autodoc-process-docstring", _escape_bars, priority=900)
    app.connect("autodoc-process-signature", _name_aliases, priority=900)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True}
