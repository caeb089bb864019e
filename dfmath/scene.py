"""What is seen of a prior in the plane at a number of noise levels: arrays alone, before they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dfmath.transport import asymmetry

PIXELS, ARROWS = 80, 13  # along each side of the window


@dataclass(frozen=True)
class Window:
    """The square that is shown: its half-width grows with the noise, so that data and noise stay in sight.

    Attributes
    ----------
    centre
        (2,), of the box around the data.
    reach
        Half-width of that box, with a margin.
    """

    centre: Any
    reach: float

    def half(self, rho: float) -> float:
        """Return the half-width at a noise level, in units of z: the data's, and three standard deviations of noise."""
        return self.reach + 3.0 * rho

    def grid(self, rho: float, n: int) -> Any:
        """Return the middles of n x n cells, (n * n, 2) in units of z, the first coordinate running fastest."""
        ticks = (np.arange(n) + 0.5) * 2.0 / n - 1.0
        x, y = np.meshgrid(ticks, ticks)
        return self.centre + self.half(rho) * np.stack([x.ravel(), y.ravel()], axis=1)


@dataclass(frozen=True)
class Frame:
    """What is seen at one noise level, in canonical states z = x/alpha; all arrays are NumPy's.

    Attributes
    ----------
    rho
        Noise-to-signal ratio.
    first
        That of the first frame, where the flow begins.
    log_density
        (PIXELS, PIXELS), log q at the window's cells, rows along the second coordinate.
    score
        (ARROWS, ARROWS, 2), at the middles of larger cells.
    points
        (n, 2), where the trajectories are.
    fisher
        (n, 2, 2), F = -Hess log q there.
    mean, covariance
        (n, 2) and (n, 2, 2), of the posterior of the data given the point.
    jacobian
        (n, 2, 2), of the flow from the first frame to here.
    """

    rho: float
    first: float
    log_density: Any
    score: Any
    points: Any
    fisher: Any
    mean: Any
    covariance: Any
    jacobian: Any

    @property
    def asymmetry(self) -> Any:
        """|A - A^T|_F/(2 |A|_F) of the Jacobians, (n,) [MATH 3.4]."""
        return asymmetry(self.jacobian)


@dataclass(frozen=True, repr=False)
class Scene:
    """Frames of a prior in the plane.

    Attributes
    ----------
    title
        What is looked at.
    window
        What is shown of the plane.
    frames
        From high to low noise.
    trails
        (steps, n, 2), the trajectories in units of the window, which end in the last frame.
    centres, count
        The data or the centres of a mixture, at most 400 of them, (K, 2), and how many there are.
    seed
        That trajectories were drawn with.
    """

    title: str
    window: Window
    frames: tuple[Frame, ...]
    trails: Any
    centres: Any
    count: int
    seed: int

    def __repr__(self) -> str:
        high, low = self.frames[0].rho, self.frames[-1].rho
        levels = f"{len(self.frames)} noise levels from rho = {high:.3g} to {low:.3g}"
        return f"<{type(self).__name__}: {self.title}, {levels}>"
