"""LaTeX as MathML, set as TeX would set it where the converter does not."""

from __future__ import annotations

from itertools import cycle, pairwise
from xml.etree import ElementTree

Element = ElementTree.Element

# The converter takes some relations for letters, which have no space around them.
_RELATIONS = {"⪯": "⪯", "⪰": "⪰", "~": "∼", "⟂": "⟂", "↦": "↦", "≔": "≔"}
_THICK = "0.278em"  # TeX's space around relations
_THIN = "0.167em"  # and between the name of a function and what is neither bracket nor operator


def convert(latex: str, display: bool = True) -> str:
    r"""Return LaTeX as one ``<math>`` element, with its source as alternative text.

    Raises
    ------
    ValueError
        If it holds a command that can't be converted.

    Examples
    --------
    >>> convert(r"\sigma^2", display=False)
    '<math display="inline" alttext="\\sigma^2"><mrow><msup><mi>σ</mi><mn>2</mn></msup></mrow></math>'
    """
    tree = _tree(latex, display)
    for node in tree.iter():
        _mend(node)
    _mend_bars([node for node in tree.iter("mo") if node.text == "|" and "form" not in node.attrib])
    for node in tree.iter():
        _space(node)
    return ElementTree.tostring(tree, encoding="unicode")


def _tree(latex: str, display: bool) -> Element:
    from latex2mathml import converter

    try:
        found = converter.convert(latex, display="block" if display else "inline")
    except Exception as error:  # the converter has a dozen kinds of its own, without a common root
        raise ValueError(f"latex must be convertible to MathML, got {latex!r}: {type(error).__name__}") from None
    if "\\" in found:  # what it does not know it copies
        raise ValueError(f"latex must hold known commands alone, got {latex!r}")
    # Within a page of HTML elements need no namespace, and none is written that looks like an address.
    tree = ElementTree.fromstring(found.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "", 1))
    tree.set("alttext", latex)
    return tree


def _mend(node: Element) -> None:
    """Relations as operators, names as one identifier, limits of sums below them."""
    if node.tag in ("mi", "mo") and node.text in _RELATIONS:
        node.tag, node.text = "mo", _RELATIONS[node.text]
        node.attrib.update(lspace=_THICK, rspace=_THICK)
    elif node.tag == "mo" and node.text == "/":  # an ordinary sign to TeX
        node.attrib.update(lspace="0", rspace="0")
    elif node.tag == "mo" and node.text == "∂":
        node.tag = "mi"
    elif node.tag == "mi" and node.text == ";":
        node.tag, node.attrib["lspace"], node.attrib["rspace"] = "mo", "0", _THIN
    elif node.tag == "mo" and _is_word(node.text):
        node.tag = "mi"
        node.attrib.clear()
    elif node.tag == "mrow" and len(node) > 1 and all(_is_upright(child) for child in node):
        word = "".join(child.text or "" for child in node)
        node.clear()
        node.tag, node.text = "mi", word
    elif node.tag == "msub" and node[0].text == "∑":
        node.tag = "munder"


def _mend_bars(bars: list[Element]) -> None:
    """Bars of norms open and close in turn; taken for operators they would have space around them."""
    for bar, form in zip(bars, cycle(("prefix", "postfix")), strict=False):
        bar.attrib.update(form=form, lspace="0", rspace="0")


def _is_word(text: str | None) -> bool:
    return text is not None and len(text) > 1 and text.isalpha()


def _is_upright(node: Element) -> bool:
    return node.tag == "mi" and node.get("mathvariant") == "normal"


def _space(node: Element) -> None:
    """Put thin spaces around names of functions, and none behind a sign."""
    if node.tag not in ("math", "mrow", "mstyle"):
        return
    for at, (left, right) in reversed(list(enumerate(pairwise(list(node)), 1))):
        if (_is_name(left) and _is_ordinary(right)) or (_is_name(right) and _is_ordinary(left)):
            node.insert(at, Element("mspace", width=_THIN))
        elif right.tag == "mo" and right.text == "−" and left.tag == "mo" and left.text in ("=", *_RELATIONS):
            right.attrib.update(lspace="0", rspace="0")


def _is_name(node: Element) -> bool:
    """Whether it is a word such as log, alone or with a script."""
    return _is_word(node[0].text if len(node) and node[0].tag == "mi" else node.text) and node.tag != "mtext"


def _is_ordinary(node: Element) -> bool:
    return node.tag not in ("mo", "mspace", "mtext") or node.text == "∇"
