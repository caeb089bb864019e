"""Products with the Fisher along a trajectory, from the exact one to the cheapest [MATH 4.4-4.6b].

A product is a function (trajectory, i, v) -> F_i v at the canonical state z_i = x_i/alpha_i, for v (B, d), with
F = (I - P/rho^2)/rho^2. Those that need nothing else have names; those that know something are the classes here:

===================  ===================================  ===========================================
product              what it needs                        cost, beside vectors
===================  ===================================  ===========================================
``"vjp"``            a differentiable network             one evaluation and its reverse, one graph
``"difference"``     nothing                              one evaluation
`Exact`              a prior in closed form               its closed form
`Secant`             the covariance of data               three changes of basis
`Gaussian`           the same; perhaps a trace            one change of basis, the trace
`Calibrated`         a trace                              the trace
``"centred"``        nothing                              none
``"paper"``          nothing                              none
``"none"``           nothing                              none
===================  ===================================  ===========================================

Over the many steps of an adjoint the errors of products multiply. `paper`, `centred` and `Calibrated` may have
negative eigenvalues, along which gradients grow without bound; the others keep 0 <= F <= I/rho^2, as far as the network
does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from dfmath.backends._compat import accumulation_dtype, array_namespace
from dfmath.integrations.data_covariance import DataCovariance, gaussian_product
from dfmath.integrations.module_call import module_dtype, one_for_each
from dfmath.integrations.secant import Secant

from dfmath import _checks
from dfmath.approximations import EndpointFisher
from dfmath.priors import GaussianMixture, PointMasses

if TYPE_CHECKING:
    from dfmath.integrations.trajectory import Trajectory

__all__ = ["PRODUCTS", "Calibrated", "DataCovariance", "Exact", "Gaussian", "Product", "Secant"]

Tensor: TypeAlias = torch.Tensor
Product: TypeAlias = "Callable[[Trajectory, int, Tensor], Tensor]"
Trace: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def none(trajectory: Trajectory, i: int, v: Tensor) -> Tensor:
    """F with P left out, v/rho^2: that of point masses far apart.

    Every Jacobian is then a number, and the adjoint is the gradient at the end, scaled.
    """
    return v / trajectory.rho(i) ** 2


def paper(trajectory: Trajectory, i: int, v: Tensor) -> Tensor:
    """DF-EA, from the end of the trajectory [MATH 4.4]."""
    return EndpointFisher(trajectory.end, trajectory.mean(i), 1.0, trajectory.rho(i), "paper").matvec(v)


def centred(trajectory: Trajectory, i: int, v: Tensor) -> Tensor:
    """The centred endpoint approximation [MATH 4.6]."""
    return EndpointFisher(trajectory.end, trajectory.mean(i), 1.0, trajectory.rho(i), "centred").matvec(v)


def vjp(trajectory: Trajectory, i: int, v: Tensor) -> Tensor:
    """The network's own Jacobian, transposed, by reverse differentiation of one more evaluation."""
    t = trajectory.times[i]
    alpha, _ = trajectory.network.schedule(t)
    return alpha**2 * trajectory.network.fisher(trajectory.state(i), t, "vjp").matvec(v)


def difference(trajectory: Trajectory, i: int, v: Tensor) -> Tensor:
    r"""(eps(z + h v) - eps(z))/(h rho), from one more evaluation and no differentiation: F v up to the order of h.

    F^T v instead, which `vjp` gives, is the same for the score of a density. The move h v is that share of the noise
    which balances curvature against rounding of the states, eps |z|, and of the noise.
    """
    rho, t, network = trajectory.rho(i), trajectory.times[i], trajectory.network
    alpha, _ = network.schedule(t)
    state = trajectory.states[i].square().mean(dim=1, keepdim=True).sqrt()
    precision = (torch.finfo(module_dtype(network.call.owner) or v.dtype).eps * (1.0 + state / rho)).sqrt()
    size = v.square().mean(dim=1, keepdim=True).sqrt()
    step = precision * rho / torch.where(size == 0.0, torch.ones_like(size), size)
    moved = network.noise((alpha * (trajectory.states[i] + step * v)).reshape(trajectory.shape), t)
    return (moved.reshape(v.shape) - trajectory.noises[i]) / (step * rho)


_NAMED: dict[str, Product] = {"none": none, "paper": paper, "centred": centred, "difference": difference, "vjp": vjp}
PRODUCTS = tuple(_NAMED)


def product_of(product: Any) -> Product:
    """Return the function that a name stands for, or the one that was given."""
    if callable(product):
        return product
    return _NAMED[_checks.one_of("product", product, PRODUCTS)]


@dataclass(frozen=True)
class Calibrated:
    """The line from the mean to the end of the trajectory, with the trace of P that is told [MATH 4.6].

    Attributes
    ----------
    trace
        Of (x (B, ...), t (B,)), returns tr F (B,) at x, such as a trained trace head.
    """

    trace: Trace

    def __call__(self, trajectory: Trajectory, i: int, v: Tensor) -> Tensor:
        """Return F v."""
        spread = _posterior_trace(self.trace, trajectory, i)
        ends = trajectory.end, trajectory.mean(i)
        return EndpointFisher(*ends, 1.0, trajectory.rho(i), "calibrated", spread).matvec(v)


@dataclass(frozen=True)
class Exact:
    """The Fisher of a prior in closed form: the truth where the network is ideal for it, a model elsewhere.

    Attributes
    ----------
    prior
        `dfmath.PointMasses` or `dfmath.GaussianMixture` of torch tensors, in flattened coordinates.
    """

    prior: PointMasses | GaussianMixture

    def __call__(self, trajectory: Trajectory, i: int, v: Tensor) -> Tensor:
        """Return F v."""
        return self.prior.diffuse(1.0, trajectory.rho(i)).fisher(trajectory.states[i]).matvec(v)


@dataclass(frozen=True)
class Gaussian:
    r"""The Fisher of Gaussian data with the data's covariance, (C + rho^2 I)^-1 [MATH 4.6b].

    Attributes
    ----------
    covariance
        `DataCovariance` of the data, in the dtype and on the device of the states.
    trace
        Of (x (B, ...), t (B,)), returns tr F (B,) at x, such as a trained trace head; or None. Scales P as
        `dfmath.approximations.GaussianFisher` does.
    """

    covariance: DataCovariance
    trace: Trace | None = None

    def __call__(self, trajectory: Trajectory, i: int, v: Tensor) -> Tensor:
        """Return F v."""
        spread = None if self.trace is None else _posterior_trace(self.trace, trajectory, i)
        return gaussian_product(self.covariance, trajectory.rho(i), v, spread)


def _posterior_trace(trace: Trace, trajectory: Trajectory, i: int) -> Tensor:
    """tr P (B,) = rho^2 (d - sigma^2 tr F), at least 0 [MATH 1.2]."""
    x, t = trajectory.state(i), trajectory.times[i]
    _, sigma = trajectory.network.schedule(t)
    dtype = accumulation_dtype(array_namespace(x), x)
    told = one_for_each("trace", trace(x, torch.full((len(x),), t, dtype=dtype, device=x.device)), len(x))
    left = x[0].numel() - sigma**2 * told.detach().to(dtype)
    return (trajectory.rho(i) ** 2 * left).clamp(min=0.0).to(x.dtype)
