"""Tables and figures of experiments: written whole or not at all, with the machine and the commit beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfmath.benchmarks import timing

from dfmath.report import plain


@dataclass(frozen=True)
class Table:
    """Rows of numbers and words under columns, and what they are."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [f"**{self.title}**", "", _line(self.columns), _line(["---"] * len(self.columns))]
        return "\n".join([*lines, *(_line([_text(value) for value in row]) for row in self.rows)])


def save(folder: Path, name: str, tables: Sequence[Table], result: dict[str, Any]) -> str:
    """Write NAME.md and NAME.json; return the Markdown."""
    text = "\n\n".join(table.markdown() for table in tables) + "\n"
    timing.write(folder / f"{name}.md", text)
    timing.write(
        folder / f"{name}.json",
        json.dumps(plain({"machine": timing.machine(), **result}), indent=1, allow_nan=False) + "\n",
    )
    return text


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)
