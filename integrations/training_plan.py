"""What decides on the weights that a training ends with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from dfmath import _checks


@dataclass(frozen=True)
class TrainingPlan:
    """What decides on the weights that a training ends with, the loss apart.

    Attributes
    ----------
    steps
        In all.
    rate
        Peak learning rate of AdamW.
    warmup
        Steps over which the rate grows linearly to its peak; from there a cosine takes it to zero.
    weight_decay
        Of AdamW.
    clip
        Largest norm of the gradient; None for any.
    averaging
        Decay of the weights' exponential average, in [0, 1); smaller in the beginning, (1 + step)/(10 + step) at most.
    seed
        Of all random numbers.
    every
        Steps between checkpoints, and validations; it decides on nothing else.
    """

    steps: int
    rate: float = 1e-3
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    averaging: float = 0.999
    seed: int = 0
    every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "every"):
            self._set(name, _checks.positive_integer(name, getattr(self, name)))
        self._set("seed", _checks.random_seed(self.seed))
        self._set("warmup", _whole_below("warmup", self.warmup, self.steps))
        self._set("averaging", _checks.fraction("averaging", self.averaging))
        self._set("rate", _positive("rate", self.rate))
        self._set("clip", None if self.clip is None else _positive("clip", self.clip))
        self._set("weight_decay", _positive("weight_decay", self.weight_decay, "zero or positive"))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # plain numbers, which JSON can hold, whatever kind came

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        return self.rate * 0.5 * (1.0 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))

    def decay_at(self, step: int) -> float:
        """Share of the average that is kept in a step."""
        return min(self.averaging, (1.0 + step) / (10.0 + step))


def _whole_below(name: str, value: Any, end: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < end:
        raise ValueError(f"{name} must be a whole number from 0 and below {end}, got {_checks.describe(value)}")
    return int(value)


def _positive(name: str, value: Any, kind: str = "positive") -> float:
    number = _checks.real_number(name, value)
    if not 0.0 <= number < math.inf or (number == 0.0 and kind == "positive"):
        raise ValueError(f"{name} must be {kind} and finite, got {number:g}")
    return number
