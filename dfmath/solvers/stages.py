"""Explicit linear schemes in canonical coordinates [MATH 2.2, 6.1].

In z = x/alpha and rho = sigma/alpha the probability flow is dz/drho = eps(z, rho), whatever the schedule. Every
explicit solver of it adds multiples of earlier states and noises, and a stochastic one fresh noise, so one description
serves all of them: what runs it, and what transposes it, need not know which solver it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Stage:
    r"""One new state: z_start + sum_i a_i z_i + sum_i w_i eps_i + s xi with xi ~ N(0, I).

    Attributes
    ----------
    start
        Number of the state that is added to.
    weights
        w_i, by the number i of the state at which eps_i = eps(z_i, rho_i) was evaluated.
    fresh
        s, of noise that is drawn for this stage; 0 in deterministic schemes.
    states
        a_i, by the number i of the state.
    """

    start: int
    weights: Mapping[int, float]
    fresh: float = 0.0
    states: Mapping[int, float] = field(default_factory=dict)

    def deterministic(self, states: Any, noises: Any) -> Any:
        """Return z_start + sum_i a_i z_i + sum_i w_i eps_i, of states and noises by their numbers."""
        carried = sum((a * states[i] for i, a in self.states.items()), start=states[self.start])
        return sum((w * noises[i] for i, w in self.weights.items()), start=carried)


@dataclass(frozen=True)
class Scheme:
    """An explicit linear scheme: stage k makes state k + 1.

    Attributes
    ----------
    rhos
        Noise-to-signal ratio of every state, that of state 0, which is given, first.
    stages
        How the others are made.
    ends
        Numbers of the states that are ends of sampling steps, 0 and the last included; those between are predictors.

    Raises
    ------
    ValueError
        If numbers do not fit, a stage needs what is not there yet, or a state without noise would be evaluated.
    """

    rhos: tuple[float, ...]
    stages: tuple[Stage, ...]
    ends: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.stages or len(self.rhos) != len(self.stages) + 1:
            raise ValueError(f"rhos must be one more than stages, got {len(self.rhos)} and {len(self.stages)}")
        if not all(0.0 < rho < math.inf for rho in self.rhos[:-1]) or not 0.0 <= self.rhos[-1] < math.inf:
            raise ValueError(f"rhos must be positive and finite, the last may be 0, got {self.rhos}")
        for k, stage in enumerate(self.stages):
            _check_stage(k, stage)
        whole = self.ends[:1] == (0,) and self.ends[-1:] == (len(self.stages),)
        if not whole or any(b <= a for a, b in pairwise(self.ends)):
            raise ValueError(f"ends must increase from 0 to {len(self.stages)}, got {self.ends}")

    @property
    def evaluated(self) -> tuple[int, ...]:
        """Numbers of the states at which the noise is evaluated, in order."""
        return tuple(sorted({i for stage in self.stages for i in stage.weights}))

    @property
    def evaluations(self) -> int:
        """How often the noise is evaluated."""
        return len(self.evaluated)

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise is drawn in some stage."""
        return any(stage.fresh > 0.0 for stage in self.stages)


def one_stage_steps(
    levels: tuple[float, ...], weights: Sequence[Mapping[int, float]], fresh: Sequence[float] | None = None
) -> Scheme:
    """Every step is one stage from the state before."""
    added = [0.0] * len(weights) if fresh is None else fresh
    stages = tuple(Stage(k, weight, new) for k, (weight, new) in enumerate(zip(weights, added, strict=True)))
    return Scheme(levels, stages, tuple(range(len(levels))))


def _check_stage(k: int, stage: Stage) -> None:
    """Raise unless stage k uses states that are there, and finite weights."""
    used = [stage.start, *stage.states, *stage.weights]
    if not all(0 <= i <= k for i in used):
        raise ValueError(f"stage {k} must use states 0 to {k}, got {sorted(used)}")
    for weights in (stage.weights, stage.states):
        if not all(math.isfinite(weight) for weight in weights.values()):
            raise ValueError(f"stage {k} must have finite weights, got {dict(weights)}")
    if not 0.0 <= stage.fresh < math.inf:
        raise ValueError(f"stage {k} must have a finite level of fresh noise, not negative, got {stage.fresh!r}")
