"""Rendered notebooks as pages: their cells, and what they printed and drew when they were rendered."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PAGES = Path(__file__).parents[1] / "notebooks" / "pages"


def _page(path: Path) -> str:
    parts = [_cell(cell, f"{path.stem}-{number}") for number, cell in enumerate(json.loads(path.read_text())["cells"])]
    return "\n\n".join([*parts, f"This page is `notebooks/{path.name}`, rendered from the script of the same name."])


def _cell(cell: dict[str, Any], name: str) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return source
    outputs = [_output(output, f"{name}-{i}") for i, output in enumerate(cell["outputs"])]
    return "\n\n".join([_fenced("python", source), *filter(None, outputs)])


def _output(output: dict[str, Any], name: str) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        _put(f"{name}.png", base64.b64decode("".join(data["image/png"])))
        return f"![What the cell above draws]({name}.png)"
    text = "".join(output.get("text", data.get("text/plain", [])))
    return _fenced("text", text.rstrip()) if text else ""


def _fenced(language: str, text: str) -> str:
    return f"````{language}\n{text}\n````"


def write(app: Any) -> None:
    """Write a page for each rendered notebook; there may be none. Another build may be at it, too."""
    PAGES.mkdir(parents=True, exist_ok=True)
    notebooks = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    for stem, path in notebooks.items():
        _put(f"{stem}.md", _page(path).encode())
    for old in PAGES.iterdir():
        if old.suffix in (".md", ".png") and not old.name.startswith(tuple(notebooks)):
            old.unlink(missing_ok=True)


def _put(name: str, content: bytes) -> None:
    """Write a file that is not there already, whole: who reads meanwhile sees the old one or the new."""
    path = PAGES / name
    if path.is_file() and path.read_bytes() == content:
        return
    temporary = path.with_name(f".{name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


class Notebooks(SphinxDirective):
    """``{notebooks}``: their table of contents, where there are any."""

    def run(self) -> list[nodes.Node]:
        """Return it, or a sentence on how to make them."""
        names = sorted(path.stem for path in PAGES.glob("*.md"))
        if not names:
            return self.parse_text_to_nodes("They are not rendered here: see `notebooks/render.py`.")
        return self.parse_text_to_nodes(
            "\n".join(["```{toctree}", ":maxdepth: 1", *(f"pages/{n}" for n in names), "```"])
        )


def setup(app: Any) -> dict[str, Any]:
    """Write the pages before sources are looked for, and list them."""
    app.add_directive("notebooks", Notebooks)
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}
