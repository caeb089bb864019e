"""Likelihoods under a score network: the probability flow with the divergence of one's choice [MATH 2.4]."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from dfmath.backends._compat import accumulation_dtype, array_namespace
from dfmath.integrations.module_call import Levels, ModuleCall, evaluate
from dfmath.integrations.network_fisher import NetworkFisher
from dfmath.integrations.torch import ScoreNetwork

from dfmath import _checks
from dfmath.flow import check_tolerances
from dfmath.runge_kutta import Block, integrate

Tensor: TypeAlias = torch.Tensor
Trace: TypeAlias = "Literal['exact', 'hutchinson'] | Callable[[Tensor, Tensor], Tensor]"


@dataclass(frozen=True)
class NetworkLikelihood:
    """Log-likelihoods of states at low noise under a network.

    Attributes
    ----------
    log_density
        (B,) in nats, of the whole state.
    standard_error
        (B,) over the probes of ``hutchinson``; 0 where the trace is not stochastic, NaN for a single probe.
    evaluations
        (B,) evaluations of the drift; each is one of the network and one of the trace.
    error_estimate
        (B,) estimated Euclidean error of the end points x/alpha, as in `dfmath.flow.FlowResult`.
    """

    log_density: Tensor
    standard_error: Tensor
    evaluations: Tensor
    error_estimate: Tensor

    def bits_per_dimension(self, dim: int, bin_width: float) -> Tensor:
        """Return -log2 of the probability of a bin of the data, for each dimension: (B,).

        Parameters
        ----------
        dim
            d.
        bin_width
            Width of a bin in the units of the states: 2/255 for 8-bit images scaled to [-1, 1].
        """
        dim = _checks.positive_integer("dim", dim)
        if not 0.0 < _checks.real_number("bin_width", bin_width) < math.inf:
            raise ValueError(f"bin_width must be positive and finite, got {bin_width:g}")
        return -(self.log_density / dim + math.log(bin_width)) / math.log(2.0)


def network_log_likelihood(
    network: ScoreNetwork,
    x: Tensor,
    start: float,
    end: float,
    *,
    trace: Trace = "exact",
    probes: int = 1,
    seed: int = 0,
    terminal: Callable[[Tensor], Tensor] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> NetworkLikelihood:
    r"""Return log q_start(x) by carrying states along a network's probability flow to high noise [MATH 2.4].

    .. math:: \log q_s(x_s) = \log q_e(x_e) - d \log\frac{\alpha_s}{\alpha_e}
              + \int_s^e \sigma^2 \operatorname{tr} F_\theta \, d \log \rho

    in canonical coordinates, by an adaptive pair of order 8 with an error control of its own for every state: results
    depend on what else is in the batch by rounding inside the network alone. What lies below `start` is left out: the
    density is that of data with this much noise.

    Parameters
    ----------
    network
        For a guided one there is a warning: no density has its field.
    x
        (B, ...) states at time `start`.
    start, end
        Times of low and of high noise.
    trace
        ``exact``: d products with the Jacobian; ``hutchinson``: random ones, the same along a trajectory, unbiased; or
        a function of (x, t (B,)) that returns tr F, such as a trained trace head.
    probes, seed
        Of ``hutchinson``: Rademacher vectors for each state, from torch's CPU generator.
    terminal
        Log density (B,) of states (B, ...) at time `end`; N(0, sigma^2 I) by default.
    rtol, atol
        As for `dfmath.probability_flow`; networks of single precision need at least about 1e-6.

    Returns
    -------
    NetworkLikelihood

    Raises
    ------
    TypeError, ValueError
        If states, times or tolerances do not fit.
    RuntimeError
        If a trajectory needs too many steps, or stops being finite.
    """
    _checks.instance("network", network, ScoreNetwork)
    if network.guided:
        warnings.warn("a guided field belongs to no density: this is no likelihood", stacklevel=2)
    if network.call.time == "discrete":
        raise ValueError("network is told whole times only, and a flow needs those between: use time='continuous'")
    if not callable(trace):
        _checks.one_of("trace", trace, ("exact", "hutchinson"))
    rtol, atol = check_tolerances(rtol, atol, network.door(x))
    flow = _Flow(network, x, trace, _checks.positive_integer("probes", probes), _checks.random_seed(seed))
    first, last = _log_rho(network, "start", start), _log_rho(network, "end", end)
    (alpha, _), (last_alpha, last_sigma) = network.schedule(float(start)), network.schedule(float(end))
    solution = integrate(flow.drift, flow.tangent, flow.begin(alpha), first, last, flow.blocks(rtol, atol), rtol)
    state = last_alpha * solution.state[:, : flow.dim].reshape(x.shape)
    log_terminal = _normal(state, last_sigma) if terminal is None else terminal(state.to(x.dtype))
    # log q(x) = log q(z) - d log alpha, at both ends.
    moved = flow.dim * math.log(last_alpha / alpha)
    change = solution.state[:, flow.dim : flow.dim + flow.channels]
    return NetworkLikelihood(
        (log_terminal + moved - change.mean(dim=1)).to(x.dtype),
        _standard_error(change, flow.stochastic).to(x.dtype),
        torch.as_tensor(solution.evaluations, device=x.device),
        solution.error.norm(dim=1).to(x.dtype),
    )


class _Flow:
    """dz/d log rho = rho eps_th and d log q/d log rho = -sigma^2 tr F_th, a channel for each probe.

    Rows leave the integrator's batch as they finish; the last coordinate says which rows those that are left are.
    """

    def __init__(self, network: ScoreNetwork, x: Tensor, trace: Trace, probes: int, seed: int) -> None:
        self.network, self.x, self.trace = network, x, trace
        self.dim, self.stochastic = math.prod(x.shape[1:]), trace == "hutchinson"
        self.channels = probes if self.stochastic else 1
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randint(0, 2, (len(x), self.dim, probes), generator=generator) if self.stochastic else None
        self.probes = None if draws is None else (2.0 * draws - 1.0).to(x)

    def begin(self, alpha: float) -> Tensor:
        """z, the channels, and the number of the row."""
        dtype = accumulation_dtype(array_namespace(self.x), self.x)
        z = self.x.detach().reshape(len(self.x), -1).to(dtype) / alpha
        rows = torch.arange(len(z), dtype=dtype, device=z.device)[:, None]
        return torch.cat([z, torch.zeros((len(z), self.channels), dtype=dtype, device=z.device), rows], dim=1)

    def blocks(self, rtol: float, atol: float) -> list[Block]:
        """Errors of the state beside its size and the noise, those of the channels beside a nat."""

        def size(t: Tensor, z: Tensor) -> Tensor:
            return torch.minimum(z.square().mean(dim=1).sqrt(), torch.exp(t))

        return [Block(0, self.dim, atol, size), Block(self.dim, self.dim + self.channels, rtol)]

    def drift(self, log_rho: Tensor, y: Tensor) -> Tensor:
        """Slopes of all coordinates."""
        x, levels, call, rows = self._at(log_rho, y)
        noise = evaluate(call, x, levels, "eps").reshape(len(x), -1).to(y.dtype)
        growth = -(levels.sigma**2)[:, None] * self._traces(x, levels, call, rows).to(y.dtype)
        return torch.cat([torch.exp(log_rho)[:, None] * noise, growth, torch.zeros_like(y[:, -1:])], dim=1)

    def tangent(self, log_rho: Tensor, y: Tensor, e: Tensor) -> Tensor:
        """sigma^2 F e."""
        x, levels, call, _ = self._at(log_rho, y)
        product = NetworkFisher(call, x, levels, self.network.derivative).matvec(e.to(x.dtype))
        return (levels.sigma**2)[:, None] * product.to(e.dtype)

    def _at(self, log_rho: Tensor, y: Tensor) -> tuple[Tensor, Levels, ModuleCall, Tensor]:
        """States x, their noise levels, how the module is called for them, and which rows they are."""
        rows, schedule = y[:, -1].round().long(), self.network.schedule
        times = schedule.time(torch.exp(log_rho))
        levels = Levels(times, *schedule(times))
        x = (levels.alpha[:, None] * y[:, : self.dim]).reshape(-1, *self.x.shape[1:]).to(self.x.dtype)
        return x, levels, self.network.call.of_rows(rows, len(self.x)), rows

    def _traces(self, x: Tensor, levels: Levels, call: ModuleCall, rows: Tensor) -> Tensor:
        """Tr F, or its estimates, (b, channels)."""
        if callable(self.trace):
            return self.trace(x, levels.t).reshape(-1, 1)
        fisher = NetworkFisher(call, x, levels, self.network.derivative)
        if self.probes is None:
            return fisher.trace()[:, None]
        v = self.probes[rows]
        return (v * (fisher @ v)).sum(dim=1)


def _standard_error(samples: Tensor, stochastic: bool) -> Tensor:
    if not stochastic or samples.shape[1] == 1:
        return torch.full_like(samples[:, 0], math.nan if stochastic else 0.0)
    return samples.std(dim=1) / math.sqrt(samples.shape[1])


def _log_rho(network: ScoreNetwork, name: str, t: float) -> float:
    with _checks.on_behalf_of(name):
        rho = network.schedule.rho(_checks.real_number("t", t))
    if rho <= 0.0:
        raise ValueError(f"{name} must be a time with noise, rho > 0, got {t:g}; a density of clean data may not exist")
    return math.log(rho)


def _normal(x: Tensor, sigma: float) -> Tensor:
    dim = math.prod(x.shape[1:])
    return -0.5 * (x.flatten(1).square().sum(dim=1) / sigma**2 + dim * math.log(2.0 * math.pi * sigma**2))
