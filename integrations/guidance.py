"""Sampling towards a loss, by the gradient of the loss at the end of the trajectory [MATH 5.3]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from dfmath.integrations.adjoint import transposed
from dfmath.integrations.module_call import one_for_each
from dfmath.integrations.products import PRODUCTS, Product, product_of
from dfmath.integrations.torch import ScoreNetwork
from dfmath.integrations.trajectory import Field

from dfmath import _checks
from dfmath.solvers import SOLVERS, Scheme, Solver, scheme

__all__ = ["GuidedResult", "guided_sample"]

Tensor: TypeAlias = torch.Tensor
Loss: TypeAlias = Callable[[Tensor], Tensor]
Normalisation = Literal["rms", "correction", "none"]
NORMALISATIONS = get_args(Normalisation)


@dataclass(frozen=True)
class GuidedResult:
    """Samples that were guided.

    Attributes
    ----------
    x
        (B, ...), at the last noise level and in units of the data, x/alpha.
    losses
        (G, B): at the end of the rollout of each guidance, before it.
    loss
        (B,) of `x`.
    network_evaluations
        Evaluations of the network forwards: of steps, rollouts and corrections; those inside products are not counted.
    products
        Number of products with F in all adjoints; 0 for ``unrolled``, which differentiates every rollout's evaluations.
    """

    x: Tensor
    losses: Tensor
    loss: Tensor
    network_evaluations: int
    products: int


def guided_sample(
    network: ScoreNetwork,
    loss: Loss,
    x: Tensor,
    rhos: Sequence[float],
    *,
    solver: Solver | Callable[[Sequence[float]], Scheme] = "ddim",
    product: Product | str = "vjp",
    guide_from: int = 15,
    guide_to: int = 35,
    strength: float = 0.2,
    normalisation: Normalisation = "rms",
    rollout_steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GuidedResult:
    r"""Sample with one guidance at the beginning of every step from `guide_from` to `guide_to` [MATH 5.3].

    A guidance runs the remaining steps to the end, takes the gradient g of the loss there back to the state by the
    adjoint, and moves the state,

    .. math:: x \leftarrow x - \eta \, s \, \frac{g}{\operatorname{rms}(g)}, \qquad
              s = \begin{cases} \sigma & \text{rms} \\ \operatorname{rms}(\epsilon - \epsilon_u) & \text{correction}
              \end{cases}

    each sample by its own root mean square; the step is then made from the moved state.

    Parameters
    ----------
    network
        May be guided.
    loss
        Of states (B, ...) at the last level in units of the data, x/alpha; returns one number for each, (B,), and
        differentiates.
    x
        (B, ...) states at the first level, as the network takes them.
    rhos
        Noise levels, strictly decreasing, the last may be 0; steps are counted from 0. For whole times:
        ``[schedule.rho(t) for t in times]``.
    solver
        For steps and rollouts: a name, or a function that makes a scheme of levels, such as
        ``functools.partial(scheme, "deis", order=3)``. Rollouts start afresh, without earlier noises.
    product
        How F v is made: a name, or a function (trajectory, i, v) -> F_i v, see `dfmath.integrations.products`. Or
        ``unrolled``: the rollout is differentiated as a whole, its graph in memory, which is what the others are
        measured by.
    guide_from, guide_to
        First and last guided step.
    strength
        eta; the paper's are 0.1 to 0.5.
    normalisation
        ``rms``: moves are eta in units of the noise. ``correction``: eta times the root mean square of what
        classifier-free guidance adds to the noise, in units of x, as FreeDoM (Yu et al. 2023) and the symplectic
        adjoint (Pan et al. 2023) have it; for guided networks; two evaluations more. ``none``: x - eta dL/dx.
    rollout_steps
        At most so many steps to the end, levels left out evenly; all of them if not given. With 1 and a last level 0,
        the gradient is that of the loss at the posterior mean.
    progress
        Called with (steps done, steps) after each.

    Returns
    -------
    GuidedResult

    Raises
    ------
    TypeError, ValueError
        If something does not fit; in the run, if the loss does not return (B,) finite numbers with a graph.
    """
    guide = Guide(network, loss, solver, product, strength, normalisation, rollout_steps)
    first, last = _window(guide_from, guide_to, len(_sequence(rhos)) - 1)
    whole = guide.plan(rhos)
    levels = tuple(whole.rhos[end] for end in whole.ends)
    field = Field(network, whole, x)
    states = [field.begin(x.detach())]
    noises: list[Tensor] = []
    losses: list[Tensor] = []
    for k in range(len(levels) - 1):
        if first <= k <= last:
            moved, before = guide(states[-1], levels[k:], tuple(x.shape))
            losses.append(before)
            states[-1] = moved
        with torch.no_grad():
            field.extend(states, noises, whole.ends[k + 1])
        if progress is not None:
            progress(k + 1, len(levels) - 1)
    end = states[-1].reshape(x.shape)
    with torch.no_grad():
        final = one_for_each("loss", loss(end), len(x))
    counted = guide.evaluations + whole.evaluations
    return GuidedResult(end, torch.stack(losses), final, counted, guide.products)


class Guide:
    """One guidance: moves states (B, d) at the first of some levels against the gradient of a loss at their end."""

    def __init__(
        self,
        network: ScoreNetwork,
        loss: Loss,
        solver: Solver | Callable[[Sequence[float]], Scheme],
        product: Product | str,
        strength: float,
        normalisation: Normalisation,
        rollout_steps: int | None,
    ) -> None:
        _checks.instance("network", network, ScoreNetwork)
        if not callable(loss):
            raise TypeError(f"loss must be a function of states (B, ...), got {_checks.describe(loss)}")
        _checks.one_of("normalisation", normalisation, NORMALISATIONS)
        if normalisation == "correction" and not network.guided:
            raise ValueError("normalisation 'correction' needs a guided network, whose correction gives the unit")
        if not math.isfinite(_checks.real_number("strength", strength)):
            raise ValueError(f"strength must be finite, got {strength:g}")
        self.network, self.loss = network, loss
        self.plan, self.product = _plan(solver), _product(product)
        self.strength, self.normalisation = float(strength), normalisation
        self.steps = None if rollout_steps is None else _checks.positive_integer("rollout_steps", rollout_steps)
        self.evaluations = self.products = 0

    def __call__(self, z: Tensor, levels: tuple[float, ...], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the moved state, and the losses (B,) of the one that was given."""
        t = self.network.time_of(levels[0])
        alpha, _ = self.network.schedule(t)
        field = Field(self.network, self.plan(_thin(levels, self.steps)), (alpha * z).reshape(shape))
        self.evaluations += field.scheme.evaluations
        gradient, losses = self._gradient(field, z)
        return z - self.strength * self._scaled(gradient, field, z, alpha), losses

    def _gradient(self, field: Field, z: Tensor) -> tuple[Tensor, Tensor]:
        """dL/dz (B, d), and the losses."""
        if self.product is None:
            with torch.enable_grad():
                start = z.detach().requires_grad_()
                losses = one_for_each("loss", self.loss(field.follow(start).end.reshape(field.shape)), len(z))
            return _derivative(losses, start), losses.detach()
        with torch.no_grad():
            path = field.follow(z)
        with torch.enable_grad():
            end = path.end.reshape(field.shape).requires_grad_()
            losses = one_for_each("loss", self.loss(end), len(z))
        self.products += field.scheme.evaluations
        with torch.no_grad():
            return transposed(path, _derivative(losses, end).flatten(1), self.product), losses.detach()

    def _scaled(self, gradient: Tensor, field: Field, z: Tensor, alpha: float) -> Tensor:
        """The move of z for a strength of 1."""
        if self.normalisation == "none":
            return gradient / alpha**2  # dL/dx = dL/dz / alpha, and z moves by 1/alpha of what x does
        unit = field.scheme.rhos[0] if self.normalisation == "rms" else self._correction(field, z) / alpha
        size = _rms(gradient)
        return unit * gradient / torch.where(size == 0.0, torch.ones_like(size), size)

    def _correction(self, field: Field, z: Tensor) -> Tensor:
        """Root mean square (B, 1) of what classifier-free guidance adds to the noise."""
        call = self.network.call
        alone = replace(call, conditioning={**call.conditioning, **(call.unconditional or {})}, unconditional=None)
        self.evaluations += 2
        with torch.no_grad():
            return _rms(field.noise(z, 0) - field.noise(z, 0, alone))


@torch.enable_grad()
def _derivative(losses: Tensor, at: Tensor) -> Tensor:
    """Differentiate losses; samples are independent, so one pass serves all."""
    gradient = torch.autograd.grad(losses.sum(), at, allow_unused=True)[0] if losses.requires_grad else None
    if gradient is None:
        raise ValueError("loss must be differentiable by the states it is given, got a number without a graph to them")
    _checks.finite_rows("the gradient of loss", gradient)
    return gradient.detach()


def _product(product: Any) -> Product | None:
    """The function of a product; None for the unrolled sampler."""
    if isinstance(product, str):
        _checks.one_of("product", product, (*PRODUCTS, "unrolled"))
    return None if isinstance(product, str) and product == "unrolled" else product_of(product)


def _plan(solver: Any) -> Callable[[Sequence[float]], Scheme]:
    """How levels become a scheme."""
    if callable(solver):
        return solver
    name: Any = _checks.one_of("solver", solver, SOLVERS)
    return lambda rhos: scheme(name, rhos)


def _sequence(rhos: Any) -> Sequence[float]:
    if not hasattr(rhos, "__len__"):
        raise TypeError(f"rhos must be a sequence of noise levels, got {_checks.describe(rhos)}")
    return rhos


def _window(first: Any, last: Any, steps: int) -> tuple[int, int]:
    """The guided steps."""
    start, stop = _checks.index("guide_from", first, steps), _checks.index("guide_to", last, steps)
    if start > stop:
        raise ValueError(f"guide_from must not be after guide_to, got {start} and {stop}")
    return start, stop


def _thin(levels: tuple[float, ...], steps: int | None) -> tuple[float, ...]:
    """Leave out levels evenly, both ends kept."""
    last = len(levels) - 1
    count = last if steps is None else min(steps, last)
    return tuple(levels[round(j * last / count)] for j in range(count + 1))


def _rms(v: Tensor) -> Tensor:
    """Root mean square of each row, (B, 1)."""
    return v.square().mean(dim=1, keepdim=True).sqrt()
