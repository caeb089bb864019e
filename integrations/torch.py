"""torch score networks with the methods of an exact marginal, at time t."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from dfmath.integrations.module_call import (
    OUTPUTS,
    ModuleCall,
    Output,
    TimeInput,
    check_device,
    check_time_input,
    evaluate,
)
from dfmath.integrations.network_fisher import DERIVATIVES, Derivative, NetworkFisher, symmetry_defect

from dfmath import _checks
from dfmath.predictions import Prediction
from dfmath.schedules import Schedule

__all__ = ["NetworkFisher", "NetworkMarginal", "ScoreNetwork", "symmetry_defect"]

Tensor: TypeAlias = torch.Tensor
WHOLE = 1e-6  # how far a time that was made from a noise level may lie from the whole number that it is


class ScoreNetwork:
    r"""A torch network that predicts the noise, the score, the data or a velocity, as a model of the noised density.

    Its methods are those of `dfmath.Marginal`, at time t of a schedule x = alpha(t) x0 + sigma(t) eps:

    .. math:: s_\theta = -\epsilon_\theta/\sigma, \qquad m_\theta = (x + \sigma^2 s_\theta)/\alpha, \qquad
              F_\theta = -\partial s_\theta/\partial x

    whatever the network predicts [MATH 0, 1.1]. States x have any shape (B, ...), and results have the same; operators
    act on flattened states (B, d). The module is called in evaluation mode and in its own dtype; it, its gradients and
    the states of random numbers are left as they were found. Results keep a graph where x requires grad, else none.

    Parameters
    ----------
    module
        ``module(x, time, **conditioning)``, an `nn.Module` or any function, that returns a tensor of x's shape.
    schedule
        That the network was trained with, from `dfmath.schedules`.
    prediction
        ``eps``, ``score``, ``x0``, ``v`` or ``flow``: what the module predicts at x. ``denoiser``: it is
        called as ``module(z, rho)`` with z = x/alpha and rho = sigma/alpha and predicts x0, as k-diffusion's and EDM's
        preconditioned networks do. ``edm``: the raw network inside EDM's preconditioning (Karras et al. 2022, table 1).
    time
        What the module is told: ``continuous`` (default), t; ``discrete``, t as an integer, for a `Discrete` schedule;
        or a function of t (B,). Not for ``denoiser`` and ``edm``, which are told rho and log(rho)/4.
    event_shape
        Shape of one state as the module takes it, where callers hand in flattened ones (B, d).
    conditioning
        Keyword arguments of every call; tensors of B rows belong to the states of a batch of B.
    unconditional
        What to replace in `conditioning` for the unconditional call of classifier-free guidance.
    guidance
        w: predictions are u + w (c - u) with c conditional and u not. For w other than 1 such a field belongs to no
        density: likelihoods warn.
    derivative
        How products with the Jacobian are made unless `fisher` is told: ``jvp``, ``vjp`` or ``double-backward``.
    sigma_data
        Of ``edm``.
    wraps
        The `nn.Module` that a function calls, if `module` is one: its mode, dtype and device count.

    Raises
    ------
    TypeError, ValueError
        Here, if an argument does not fit; in every call, if states, times or what the module returns do not.

    References
    ----------
    Karras, Aittala, Aila, Laine, *Elucidating the design space of diffusion-based generative models*, 2022.

    Examples
    --------
    >>> import torch
    >>> from dfmath.schedules import VP
    >>> network = ScoreNetwork(lambda x, t: 0.0 * x, VP.linear())
    >>> network.score(torch.ones(2, 3, 4, 4), t=0.5).shape
    torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self,
        module: Callable[..., Any],
        schedule: Schedule,
        prediction: Output = "eps",
        *,
        time: TimeInput = None,
        event_shape: tuple[int, ...] | None = None,
        conditioning: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
        guidance: float = 1.0,
        derivative: Derivative = "jvp",
        sigma_data: float = 0.5,
        wraps: torch.nn.Module | None = None,
    ) -> None:
        if not callable(module):
            raise TypeError(f"module must be an nn.Module or a function, got {_checks.describe(module)}")
        if wraps is not None and not isinstance(wraps, torch.nn.Module):
            raise TypeError(f"wraps must be an nn.Module, got {_checks.describe(wraps)}")
        _checks.instance("schedule", schedule, Schedule)
        _checks.one_of("prediction", prediction, OUTPUTS)
        check_time_input(time, prediction, schedule)
        guidance = _checks.real_number("guidance", guidance)
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be finite, got {guidance:g}")
        if guidance != 1.0 and unconditional is None:
            raise ValueError(
                f"guidance {guidance:g} needs unconditional, the arguments of the call without conditioning"
            )
        if not 0.0 < _checks.real_number("sigma_data", sigma_data) < math.inf:
            raise ValueError(f"sigma_data must be positive and finite, got {sigma_data:g}")
        _checks.one_of("derivative", derivative, DERIVATIVES)
        self.derivative: Derivative = derivative
        shape = None if event_shape is None else tuple(_checks.positive_integer("event_shape", n) for n in event_shape)
        self.call = ModuleCall(
            module,
            schedule,
            prediction,
            time,
            shape,
            dict(conditioning or {}),
            unconditional,
            guidance,
            sigma_data,
            wraps,
        )

    def with_times_kept(self) -> ScoreNetwork:
        """Return the same network told its times in float32 where its own dtype is half precision.

        For modules that take a time of another dtype than their states, as those of diffusers do.
        """
        other = copy.copy(self)
        other.call = replace(self.call, keep_time=True)
        return other

    def __repr__(self) -> str:
        kind, call = type(self.call.module).__name__, self.call
        return f"<ScoreNetwork {kind}, prediction {call.output!r}, {call.schedule!r}, guidance {call.guidance:g}>"

    @classmethod
    def from_pipeline(cls, pipe: Any, prompt: str | Sequence[str] | None = None, **options: Any) -> ScoreNetwork:
        """Return the network of a diffusers pipeline; see `dfmath.integrations.diffusers.network_of`."""
        from dfmath.integrations.diffusers import network_of

        return network_of(pipe, prompt, **options)

    @property
    def schedule(self) -> Schedule:
        """The schedule."""
        return self.call.schedule

    @property
    def guided(self) -> bool:
        """Whether predictions are guided, and so belong to no density."""
        return self.call.unconditional is not None and self.call.guidance != 1.0

    def at(self, t: float | Tensor) -> NetworkMarginal:
        """Return the model of the density at one time, or at one for each state (B,); methods as `Marginal`'s."""
        return NetworkMarginal(self, t)

    def noise(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Return eps_th(x, t), in x's shape."""
        return self._predict(x, t, "eps")

    def score(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Return s_th(x, t), the model of grad log q_t, in x's shape."""
        return self._predict(x, t, "score")

    def posterior_mean(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Return m_th(x, t), the model of E[x0 given x], in x's shape [MATH 1.1]."""
        return self._predict(x, t, "x0")

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Return the probability flow's dx/dt = f x - (g^2/2) s_th, in x's shape [MATH 2.1]."""
        levels = self.call.levels(self.door(x), t)
        drift, spread = (
            part.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
            for part in (self.schedule.drift(levels.t), 0.5 * self.schedule.diffusion_squared(levels.t))
        )
        return drift * x - spread * self.score(x, t)

    def fisher(self, x: Tensor, t: float | Tensor, derivative: Derivative | None = None) -> NetworkFisher:
        """Return F_th = -ds_th/dx at states x as an operator on flattened states, (B, d, d).

        Parameters
        ----------
        x
            (B, ...).
        t
            Time: a number, or (B,).
        derivative
            ``jvp``, ``vjp`` or ``double-backward``, see `NetworkFisher`; that of the network unless given.
        """
        way = self.derivative if derivative is None else derivative
        _checks.one_of("derivative", way, DERIVATIVES)
        return NetworkFisher(self.call, self.door(x), self.call.levels(x, t), way)

    def time_of(self, rho: float) -> float:
        """Return the time of a noise level, whole where the module is told whole times; ValueError if it has none."""
        with _checks.on_behalf_of("rhos"):
            t = float(self.schedule.time(rho))
        if self.call.time != "discrete":
            return t
        if abs(t - round(t)) > WHOLE:
            raise ValueError(
                f"rhos must be levels of whole times for a network of discrete times, got {rho:g} at {t:g}"
            )
        return float(round(t))

    def canonical_noise(self, z: Tensor, rho: float) -> Tensor:
        """Return eps_th at the canonical state z = x/alpha and noise level rho, in z's shape [MATH 2.2]."""
        t = self.time_of(rho)
        alpha, _ = self.schedule(t)
        return self.noise(alpha * z, t)

    def _predict(self, x: Tensor, t: Any, target: Prediction) -> Tensor:
        """Evaluate the module once and convert."""
        return evaluate(self.call, x, self.call.levels(self.door(x), t), target)

    def door(self, x: Any) -> Tensor:
        """Validate states."""
        if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"x must be a float32 or float64 torch tensor, got {_checks.describe(x)}")
        event = self.call.event_shape
        if x.ndim < 2:
            raise ValueError(f"x must have shape (B, ...), got {_checks.describe(x)}")
        if event is not None and tuple(x.shape[1:]) not in (event, (math.prod(event),)):
            raise ValueError(f"x must have shape (B, {', '.join(map(str, event))}), or flattened, got {tuple(x.shape)}")
        check_device(self.call.owner, x)
        _checks.finite_rows("x", x.detach())
        return x


class NetworkMarginal:
    """A score network at one time: the methods of `dfmath.Marginal` that a network has."""

    def __init__(self, network: ScoreNetwork, t: float | Tensor) -> None:
        self.network, self.t = network, t
        self.alpha, self.sigma = network.schedule(t)

    def __repr__(self) -> str:
        return f"<NetworkMarginal of {self.network!r} at t = {self.t}>"

    def noise(self, x: Tensor) -> Tensor:
        """Return eps_th(x), in x's shape."""
        return self.network.noise(x, self.t)

    def score(self, x: Tensor) -> Tensor:
        """Return s_th(x), in x's shape."""
        return self.network.score(x, self.t)

    def posterior_mean(self, x: Tensor) -> Tensor:
        """Return m_th(x), in x's shape."""
        return self.network.posterior_mean(x, self.t)

    def fisher(self, x: Tensor, derivative: Derivative | None = None) -> NetworkFisher:
        """Return F_th(x) as an operator on flattened states."""
        return self.network.fisher(x, self.t, derivative)
