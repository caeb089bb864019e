"""Mathematics as MathML, which browsers draw themselves: no script and nothing from a network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

from dfmath.mathml import convert


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext(), display=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    rows = [row for row in node.astext().split("\n\n") if row.strip()]
    drawn = "".join(convert(row) for row in rows)
    translator.body.append(f'<div class="formula">{drawn}</div>\n')
    raise nodes.SkipNode


class Together(SphinxPostTransform):
    """Formulas keep the comma behind them on their line."""

    default_priority = 900

    def run(self, **kwargs: Any) -> None:
        """Put both into one element that does not break."""
        for math in list(self.document.findall(nodes.math)):
            behind = math.next_node(descend=False, siblings=True)
            if not isinstance(behind, nodes.Text) or behind[:1] not in tuple(".,;:)"):
                continue
            math.parent.replace(behind, nodes.Text(behind[1:]))
            math.replace_self(nodes.inline("", "", math.deepcopy(), nodes.Text(behind[:1]), classes=["together"]))


def setup(app: Any) -> dict[str, Any]:
    """Register the renderer; conf.py chooses it by name."""
    app.add_post_transform(Together)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
