"""What a theorem is here: a statement with its number and source, and a check that measures it on a given prior."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from dfmath import _checks

if TYPE_CHECKING:
    from dfmath.theorems.case import Case

Scope = Literal["level", "prior"]

_NUMBER = re.compile(r"[1-9][0-9]*\.[1-9][0-9]*[a-z]?")
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

    def __post_init__(self) -> None:
        for name in ("discrepancy", "threshold"):
            object.__setattr__(self, name, _checks.real_number(name, getattr(self, name)))  # NumPy's are no JSON
        if not self.threshold >= 0.0:
            raise ValueError(f"threshold must not be negative, got {self.threshold:g}")


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
    """Register the decorated function as the check of a theorem.

    A function of the same name and module replaces itself, as it does when a notebook's cell runs again.

    Parameters
    ----------
    number
        Chapter, number and perhaps a letter, such as ``9.1`` or ``9.1b``; the library's own begin with 1 to 4.
    title, statement, source, hypotheses, scope
        As `Theorem` holds them; the statement in LaTeX.

    Raises
    ------
    TypeError, ValueError
        If the number is not of this form, another check has it, the scope is none, or what is decorated no function.

    Examples
    --------
    >>> @theorem("nine", "My own", "a = b", "a conjecture")
    ... def mine(case):
    ...     return Outcome(0.0, 1e-10, "equal")
    Traceback (most recent call last):
    ValueError: number must be such as '9.1' or '9.1b', got 'nine'
    """
    if not _NUMBER.fullmatch(number):
        raise ValueError(f"number must be such as '9.1' or '9.1b', got {number!r}")
    _checks.one_of("scope", scope, get_args(Scope))

    def register(check: Callable[[Case], Outcome]) -> Callable[[Case], Outcome]:
        if not inspect.isfunction(check):
            raise TypeError(f"check must be a function of a Case, got {_checks.describe(check)}")
        known = _REGISTRY.get(number)
        if known is not None and _name(known.check) != _name(check):
            raise ValueError(f"number {number!r} is taken by {known.title!r} of {known.check.__module__}")
        _REGISTRY[number] = Theorem(number, title, statement, source, hypotheses, scope, check)
        return check

    return register


def _name(check: Callable[[Case], Outcome]) -> tuple[str, str]:
    return check.__module__, check.__qualname__


def registered() -> list[Theorem]:
    """Return all theorems in the order of their numbers."""
    return sorted(_REGISTRY.values(), key=lambda t: _sort_key(t.number))


def _sort_key(number: str) -> tuple[int, int, str]:
    chapter, rest = number.split(".")
    digits = "".join(c for c in rest if c.isdigit())
    return int(chapter), int(digits), rest[len(digits) :]
