"""Samplers as explicit linear schemes in canonical coordinates: grids of noise levels, stages, and who makes them."""

from dfmath.solvers.grids import SPACINGS, Spacing, noise_levels
from dfmath.solvers.schemes import SOLVERS, Solver, scheme
from dfmath.solvers.stages import Scheme, Stage
from dfmath.solvers.stochastic import Churn

__all__ = ["SOLVERS", "SPACINGS", "Churn", "Scheme", "Solver", "Spacing", "Stage", "noise_levels", "scheme"]
