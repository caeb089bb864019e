"""Gradients of a loss on a sample by the discrete adjoint of its sampler [MATH 5].

The adjoint is the exact transposition of the scheme that made the sample, so that with exact products it is the
gradient of what was computed, at any number of steps. It keeps two states for each evaluation and no graph.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from dfmath.integrations.products import Product, product_of
from dfmath.integrations.trajectory import Trajectory, run

from dfmath import _checks

__all__ = ["Trajectory", "adjoint", "run", "transposed"]

Tensor: TypeAlias = torch.Tensor


def adjoint(trajectory: Trajectory, gradient: Tensor, product: Product | str = "vjp") -> Tensor:
    r"""Return dL/dz_0 of a loss on the end of a trajectory by transposing its scheme [MATH 5.1, 5.2].

    .. math:: \mu_i = \sum_{k} w_{ki}\, g_{k+1}, \qquad
              g_i = \sum_{k : start_k = i} g_{k+1} + \rho_i F_i \mu_i, \qquad g_n = \partial L/\partial z_n

    with F at canonical states, where the noise has the Jacobian rho F. Exact, to rounding, where products are.

    Parameters
    ----------
    trajectory
        From `run`.
    gradient
        (B, d) or (B, ...), dL/dz at the end.
    product
        How F v is made, see `dfmath.integrations.products`: a name, or a function (trajectory, i, v) -> F_i v.

    Returns
    -------
    Tensor
        In the shape of `gradient`; dL/dx at the start is it divided by alpha there.

    Raises
    ------
    TypeError, ValueError
        If the gradient does not fit the trajectory, or the product is unknown or is not finite.
    """
    _checks.instance("trajectory", trajectory, Trajectory)
    apply, flat = product_of(product), _gradient(trajectory, gradient)
    with torch.no_grad():
        return transposed(trajectory, flat, apply).reshape(gradient.shape)


def transposed(path: Trajectory, gradient: Tensor, product: Product) -> Tensor:
    """The adjoint of a scheme: stages in reverse, each handing its state's gradient to what it was made of."""
    count = len(path.scheme.stages)
    direct: dict[int, Tensor] = {count: gradient}
    through: dict[int, Tensor] = {}
    for k in reversed(range(count)):
        g = direct.pop(k + 1, None)
        if g is not None:
            stage = path.scheme.stages[k]
            _add(direct, stage.start, g)
            for i, weight in stage.states.items():
                _add(direct, i, weight * g)
            for i, weight in stage.weights.items():
                _add(through, i, weight * g)
        if k in through:  # all later stages have been seen, and no earlier one uses the noise at state k
            mu = through.pop(k)
            _add(direct, k, path.rho(k) * product(path, k, mu))
    _checks.finite_rows("the adjoint", direct[0])
    return direct[0]


def _add(sums: dict[int, Tensor], i: int, term: Tensor) -> None:
    sums[i] = sums[i] + term if i in sums else term


def _gradient(path: Trajectory, gradient: Any) -> Tensor:
    """Validate a gradient at the end: (B, d)."""
    if not isinstance(gradient, torch.Tensor) or tuple(gradient.shape) not in (path.shape, tuple(path.end.shape)):
        expected = " or ".join(str(s) for s in dict.fromkeys((path.shape, tuple(path.end.shape))))
        raise ValueError(f"gradient must have shape {expected}, got {_checks.describe(gradient)}")
    if gradient.dtype != path.end.dtype or gradient.device != path.end.device:
        raise ValueError(
            f"gradient must be {path.end.dtype} on {path.end.device} as the trajectory, "
            f"got {gradient.dtype} on {gradient.device}"
        )
    _checks.finite_rows("gradient", gradient.detach())
    return gradient.detach().flatten(1)
