"""The theorem registry: every numbered statement of the mathematics, each with a check on any prior.

``from dfmath.theorems.run import verify`` runs them; ``dfmath verify`` does so from the command line. To add a theorem,
decorate a function that takes a `Case` and returns an `Outcome` with `theorem`; ``dfmath verify --theorems FILE`` runs
a file of your own that does so.
"""

from dfmath.theorems.registry import NotApplicable, Outcome, Theorem, registered, theorem

__all__ = ["NotApplicable", "Outcome", "Theorem", "registered", "theorem"]
