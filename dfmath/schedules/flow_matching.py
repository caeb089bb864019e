"""The straight line from data to noise: rectified flow and flow matching [MATH 0]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dfmath.backends._compat import Array, Namespace
from dfmath.schedules.base import Schedule


@dataclass(frozen=True)
class FlowMatching(Schedule):
    """alpha = 1 - t', sigma = t' with t' = shift t/(1 + (shift - 1) t), on [0, 1] (rectified flow).

    With D = 1 - t + shift t: f = -shift/((1 - t) D), g^2 = 2 shift^2 t/((1 - t) D^2) [MATH 0],
    rho = shift t/(1 - t). At t = 1 alpha is exactly 0: only (alpha, sigma) is defined there.

    Parameters
    ----------
    shift : float
        How much later in noise every time is read; positive, 1 for none.

    References
    ----------
    Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747; the shift: Esser et al., arXiv 2403.03206,
    equation 23.

    Examples
    --------
    >>> from dfmath.schedules import FlowMatching
    >>> FlowMatching()(0.25), FlowMatching(shift=3.0)(0.25)
    ((0.75, 0.25), (0.5, 0.5))
    """

    shift: float = 1.0
    _ends_in_noise: ClassVar[bool] = True

    def _check_parameters(self) -> None:
        if not self.shift > 0.0:
            raise ValueError(f"shift must be positive, got {self.shift!r}")

    def _denominator(self, t: Array) -> Array:
        # 1 + (shift - 1) t as a sum of positive terms.
        return (1.0 - t) + self.shift * t

    def _levels(self, xp: Namespace, t: Array) -> tuple[Array, Array]:
        denominator = self._denominator(t)
        return (1.0 - t) / denominator, self.shift * t / denominator

    def _rho(self, xp: Namespace, t: Array) -> Array:
        return self.shift * t / (1.0 - t)

    def _time(self, xp: Namespace, rho: Array) -> Array:
        return rho / (rho + self.shift)

    def _drift(self, xp: Namespace, t: Array) -> Array:
        return -self.shift / ((1.0 - t) * self._denominator(t))

    def _diffusion_squared(self, xp: Namespace, t: Array) -> Array:
        ratio = self.shift / self._denominator(t)
        return 2.0 * ratio * ratio * t / (1.0 - t)
