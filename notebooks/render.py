"""Run the percent scripts of this folder and write them as notebooks with their outputs beside them.

``python notebooks/render.py`` renders all, ``python notebooks/render.py 01 07`` those whose names begin so. Needs the
``notebooks`` extra. A cell that fails ends it, and that notebook's file stays as it was.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LARGEST = 1_000_000  # bytes of a rendered notebook, so that a clone stays small


def scripts(beginnings: list[str]) -> list[Path]:
    """The scripts whose names begin so, or all."""
    wanted = tuple(beginnings) or ""
    found = [path for path in sorted(HERE.glob("[0-9][0-9]_*.py")) if path.name.startswith(wanted)]
    if not found:
        raise SystemExit(f"render: no notebook begins with {' or '.join(beginnings)}")
    return found


def rendered(path: Path) -> Any:
    """The executed notebook, without what differs from place to place: times, random names of cells, warnings."""
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False).execute(cwd=str(HERE))
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if "outputs" in cell:  # warnings depend on what else is installed
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def write(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: an interruption leaves no half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    """Render, one after the other."""
    for path in scripts(sys.argv[1:]):
        text = nbformat.writes(rendered(path)) + "\n"
        if len(text) > LARGEST:
            raise SystemExit(f"render: {path.stem} would have {len(text)} bytes; make its figures smaller")
        write(path.with_suffix(".ipynb"), text)
        print(f"{path.stem}: {len(text) // 1000} kB")


if __name__ == "__main__":
    main()
