"""What a theorem is here: a statement with its number and source, and a check that measures it on a given prior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dfmath.theorems.case import Case

Scope = Literal["level", "prior"]

PAPER = "Wang et al., ICML 2025, arXiv 2505.23264"


class NotApplicable(Exception):
    """The prior does not meet the theorem's hypotheses; the message says which."""


@dataclass(frozen=True)
class Outcome:
    """What a check measured, and what it may be at most.

    Attributes
    ----------
    discrepancy
        How far the two sides are apart, or how far an inequality is violated; in the unit that `reason` names.
    threshold
        The largest discrepancy that counts as passing.
    reason
        Why the threshold is what it is.
    """

    discrepancy: float
    threshold: float
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the discrepancy is a number no larger than the threshold."""
        return self.discrepancy <= self.threshold


@dataclass(frozen=True)
class Theorem:
    """One numbered statement of the mathematics and its check.

    Attributes
    ----------
    number, title
        As in docs/mathematics; a letter tells apart the parts of one number.
    statement
        LaTeX.
    source
        Where it comes from.
    hypotheses
        What the prior must satisfy.
    scope
        ``level``: checked at each noise level. ``prior``: checked once, over the whole range of noise levels.
    check
        Measures the statement on a case; raises `NotApplicable` where the hypotheses do not hold.
    """

    number: str
    title: str
    statement: str
    source: str
    hypotheses: str
    scope: Scope
    check: Callable[[Case], Outcome]


_REGISTRY: dict[str, Theorem] = {}


def theorem(
    number: str,
    title: str,
    statement: str,
    source: str,
    hypotheses: str = "finite second moment",
    scope: Scope = "level",
) -> Callable[[Callable[[Case], Outcome]], Callable[[Case], Outcome]]:
    """Register the decorated function as the check of a theorem."""

    def register(check: Callable[[Case], Outcome]) -> Callable[[Case], Outcome]:
        if number in _REGISTRY:
            raise ValueError(f"theorem {number} is registered twice")
        _REGISTRY[number] = Theorem(number, title, statement, source, hypotheses, scope, check)
        return check

    return register


def registered() -> list[Theorem]:
    """Return all theorems in the order of their numbers."""
    return sorted(_REGISTRY.values(), key=lambda t: _sort_key(t.number))


def _sort_key(number: str) -> tuple[int, int, str]:
    chapter, rest = number.split(".")
    digits = "".join(c for c in rest if c.isdigit())
    return int(chapter), int(digits), rest[len(digits) :]
