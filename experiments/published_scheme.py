"""The discretisation of the published transport experiment, from its description in [MATH 3.5], and what it tends to.

The published script carries states by DDIM and their Jacobian by Euler steps of

    dA/dt = (f I - (g^2/2) F) A,

where the Jacobian of the drift x' = f x - (g^2/2) s is f I + (g^2/2) F [MATH 2.1]; for sub-VP it takes VP's sigma. Its
softmax subtracts no maximum, which changes nothing until all exponentials underflow, and is not done here. The
description gives neither the grid of times nor its ends, nor whether sub-VP's g follows its sigma: here g is sub-VP's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from scipy.integrate import solve_ivp

from dfmath.priors import Prior
from dfmath.schedules import EDM, VE, VP, Schedule, SubVP
from dfmath.solvers import Spacing, noise_levels

Sign = Literal[1, -1]  # of (g^2/2) F in the equation of A: 1 is right, -1 is published
SIGNS: tuple[Sign, ...] = (1, -1)
MISTAKEN = "sub-VP, VP's sigma"  # the name of what is no flow
PRINTED = (0.095, 0.31)  # least and largest index that the published script prints, over schedules and steps [MATH 3.5]


@dataclass(frozen=True)
class Way:
    """Whose alpha and sigma the script takes, whose f and g^2, and how its steps are spaced."""

    levels: Schedule
    drift: Schedule
    what: str  # in words
    spacing: Spacing = "time"

    def times(self, rho_max: float, rho_min: float, steps: int) -> list[float]:
        """From high to low noise, even in time or as EDM spaces them."""
        schedule = self.levels if self.spacing == "time" else None
        return [float(self.levels.time(rho)) for rho in noise_levels(rho_max, rho_min, steps, self.spacing, schedule)]


def ways() -> dict[str, Way]:
    """The published schedules; sub-VP with its own sigma, too, and EDM on a grid on which few steps are of any use."""
    vp, sub, ve, edm = VP.linear(), SubVP.linear(), VE(sigma_min=0.01, sigma_max=100.0), EDM()
    return {
        "VP": Way(vp, vp, "DDIM for x, Euler for A, steps even in VP's time"),
        MISTAKEN: Way(vp, sub, "as VP, with sub-VP's g and VP's sigma, as published: no flow of any schedule"),
        "sub-VP": Way(sub, sub, "the same steps with sub-VP's own sigma"),
        "VE": Way(ve, ve, "the same, steps even in VE's time, which is log rho"),
        "EDM": Way(edm, edm, "the same, steps as EDM spaces them, even in rho^(1/7)", "edm"),
        "EDM, even times": Way(edm, edm, "the same, steps even in EDM's time, rho: most of them far above the data"),
    }


def discretised(prior: Prior, way: Way, starts: Any, rho_max: float, rho_min: float, steps: int) -> dict[Sign, Any]:
    """Return Jacobians (n, d, d) at starts z, by either sign, each scaled to norm one.

    The scale is no concern of an index, and Euler's steps may be so long that it grows beyond all bounds.
    """
    eye, times = np.eye(prior.dim), way.times(rho_max, rho_min, steps)
    matrices: dict[Sign, Any] = {sign: np.tile(eye, (len(starts), 1, 1)) for sign in SIGNS}
    x = way.levels(times[0])[0] * starts
    for t, u in pairwise(times):
        q = prior.diffuse(*way.levels(t))
        turn = 0.5 * way.drift.diffusion_squared(t) * q.fisher(x).to_dense()
        for sign, a in matrices.items():
            matrices[sign] = _scaled(a + (u - t) * (way.drift.drift(t) * eye + sign * turn) @ a)
        x = _ddim(x, q.score(x), way.levels(t), way.levels(u))
    return matrices


def _ddim(x: Any, score: Any, now: tuple[float, float], then: tuple[float, float]) -> Any:
    """One step: the noise that is predicted stays [MATH 6.1]."""
    (alpha, sigma), (alpha_u, sigma_u) = now, then
    return alpha_u / alpha * x - sigma * (sigma_u - alpha_u / alpha * sigma) * score


def _scaled(matrix: Any) -> Any:
    return matrix / np.linalg.norm(matrix, axis=(1, 2), keepdims=True)


def converged(prior: Prior, starts: Any, rho_max: float, rho_min: float, sign: Sign, rtol: float = 1e-8) -> Any:
    """Jacobians (n, d, d) that dA/d log rho = sign rho^2 F A tends to, by SciPy's DOP853: the same for all schedules.

    In x = alpha z the term f A only scales A, so either equation has one solution whatever the schedule [MATH 2.2].
    That of the wrong sign is A^-T: where dA = M A, d(A^-T) = -M^T A^-T, and M is symmetric. In the plane A^-T is A
    turned by a right angle, over det A, so that neither index of [MATH 3.4] sees the sign.
    """
    n, d = starts.shape

    def slope(log_rho: float, state: Any) -> Any:
        rho, (z, a) = float(np.exp(log_rho)), (state[: n * d].reshape(n, d), state[n * d :].reshape(n, d, d))
        q = prior.diffuse(1.0, rho)
        return rho**2 * np.concatenate([-q.score(z).ravel(), (sign * q.fisher(z).to_dense() @ a).ravel()])

    state = np.concatenate([starts.ravel(), np.tile(np.eye(d), (n, 1, 1)).ravel()])
    span = np.log([rho_max, rho_min])
    # The state ends as small as the data: errors relative to its size there, not to that of the noise at the start.
    solution = solve_ivp(slope, span, state, method="DOP853", rtol=rtol, atol=rtol * rho_min)
    return solution.y[n * d :, -1].reshape(n, d, d)
