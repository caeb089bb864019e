"""The command line reference, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from dfmath.cli import app as commands


def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, command) of every command that does something."""
    inner = getattr(command, "commands", {})
    for name, child in sorted(inner.items()):
        yield from leaves(child, f"{path} {name}")
    if not inner:
        yield path, command


class Commands(SphinxDirective):
    """``{commands}``: a section for each command, with its options and their defaults."""

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        return [self._section(*leaf) for leaf in leaves(typer.main.get_command(commands), "dfmath")]

    def _section(self, name: str, command: Any) -> nodes.section:
        section = nodes.section(ids=[name.replace(" ", "-")], names=[name])
        section += nodes.title(text=name)
        for paragraph in (command.help or "").split("\n\n"):
            section += nodes.paragraph(text=paragraph)
        context = typer.Context(command, info_name=name)
        usage = " ".join(command.collect_usage_pieces(context))
        section += nodes.literal_block(text=f"{name} {usage}", language="none")
        options = [p for p in command.params if p.name != "help"]
        if options:
            section += _table(options, context)
        return section


def _table(options: list[Any], context: Any) -> nodes.table:
    group = nodes.tgroup(cols=2)
    group += [nodes.colspec(colwidth=width) for width in (35, 65)]
    body = nodes.tbody()
    for option in options:
        spelled, said = option.get_help_record(context) or (_argument(option), getattr(option, "help", "") or "")
        row, name, text = nodes.row(), nodes.entry(), nodes.entry()
        name += nodes.paragraph("", "", nodes.literal(text=spelled))
        text += nodes.paragraph(text=said)
        row += [name, text]
        body += row
    group += body
    return nodes.table("", group, classes=["options"])


def _argument(parameter: Any) -> str:
    return str(parameter.name).upper()


def setup(app: Any) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
