"""Heun's method, with the noise raised before each step where that is asked (Karras et al. 2022)."""

from __future__ import annotations

import math
from itertools import pairwise

from dfmath.solvers.stages import Scheme, Stage
from dfmath.solvers.stochastic import Churn


def heun(levels: tuple[float, ...], churn: Churn | None) -> Scheme:
    """Euler's step, and from the same state one with the mean of both noises; a step to 0 is Euler's alone."""
    rhos, ends = [levels[0]], [0]
    stages: list[Stage] = []
    for level, after in pairwise(levels):
        before = level if churn is None else churn.raised(level, len(levels) - 1)
        if churn is not None and before > level:
            stages.append(Stage(len(stages), {}, churn.scale * math.sqrt(before**2 - level**2)))
            rhos.append(before)
        now, step = len(stages), after - before
        stages.append(Stage(now, {now: step}))
        rhos.append(after)
        if after > 0.0:
            stages.append(Stage(now, {now: 0.5 * step, now + 1: 0.5 * step}))
            rhos.append(after)
        ends.append(len(stages))
    return Scheme(tuple(rhos), tuple(stages), tuple(ends))
