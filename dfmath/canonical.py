"""Who predicts the noise in canonical coordinates z = x/alpha, rho = sigma/alpha: priors, networks, functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from dfmath import _checks
from dfmath.backends._compat import Array, array_namespace
from dfmath.priors import Prior

CanonicalNoise: TypeAlias = Callable[[Array, float], Array]


class NoiseModel(Protocol):
    """What has a noise in canonical coordinates of its own, as `dfmath.integrations.torch.ScoreNetwork` has."""

    def canonical_noise(self, z: Any, rho: float) -> Any:
        """Return eps(z, rho), in z's shape."""


Model: TypeAlias = Prior | NoiseModel | CanonicalNoise


def canonical_noise(model: Model) -> CanonicalNoise:
    """Return eps(z, rho) of a model: of a prior, -rho s(z) with s the score at (alpha, sigma) = (1, rho) [MATH 1.1]."""
    if isinstance(model, Prior):
        return lambda z, rho: -rho * model.diffuse(1.0, rho).score(z)
    function = getattr(model, "canonical_noise", model)
    if not callable(function):
        raise TypeError(f"model must be a prior, a ScoreNetwork or a function (z, rho), got {_checks.describe(model)}")
    return lambda z, rho: _checked(function(z, rho), z)


def states(x: Any) -> Array:
    """Validate a batch of states (B, ...)."""
    xp = _checks.namespace("x", x)
    if not xp.isdtype(x.dtype, "real floating") or x.ndim < 2:
        raise ValueError(f"x must be floating of shape (B, ...), got {_checks.describe(x)}")
    _checks.finite_rows("x", x)
    return x


def _checked(found: Any, z: Array) -> Array:
    """Say what a function should have returned."""
    same = hasattr(found, "shape") and tuple(found.shape) == tuple(z.shape)
    if not same or _checks.namespace("noise", found) is not array_namespace(z) or found.dtype != z.dtype:
        raise ValueError(f"model must return {_checks.describe(z)}, as the states are, got {_checks.describe(found)}")
    _checks.finite_rows("what model returns", found)
    return found
