"""Likelihoods under a score network: the probability flow with the divergence of one's choice [MATH 2.4].

Or none: by the I-MMSE identity.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from dfmath.backends._compat import accumulation_dtype, array_namespace
from dfmath.integrations.i_mmse import NODES, i_mmse_log_densities
from dfmath.integrations.module_call import Levels, ModuleCall, evaluate, one_for_each
from dfmath.integrations.network_fisher import NetworkFisher
from dfmath.integrations.torch import ScoreNetwork
from dfmath.integrations.trace_model import TraceModel

from dfmath import _checks
from dfmath.flow import check_tolerances
from dfmath.runge_kutta import Block, Solution, integrate, integrate_evenly

Tensor: TypeAlias = torch.Tensor
Trace: TypeAlias = "Literal['exact', 'hutchinson', 'i-mmse'] | TraceModel | Callable[[Tensor, Tensor], Tensor]"
STEP = 1e-2  # of a difference, in units of the noise: large enough for any precision
TRACES = ("exact", "hutchinson", "i-mmse")


@dataclass(frozen=True)
class NetworkLikelihood:
    """Log-likelihoods of states at low noise under a network.

    Attributes
    ----------
    log_density
        (B,) in nats, of the whole state.
    standard_error
        (B,) over the probes of ``hutchinson`` or draws of ``i-mmse``; 0 where nothing is stochastic, NaN for one.
    evaluations
        (B,) evaluations of the drift, each one of the network and one of the trace; for ``i-mmse``, of the network.
    error_estimate
        (B,) estimated Euclidean error of the end points x/alpha, as in `dfmath.flow.FlowResult`; NaN for a fixed grid,
        0 for ``i-mmse``, which has no trajectories.
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
            Width of a bin in the units of the states x = alpha x0 + sigma eps: alpha at their time, times 2/255 for
            8-bit images scaled to [-1, 1].
        """
        dim = _checks.positive_integer("dim", dim)
        if not 0.0 < _checks.real_number("bin_width", bin_width) < math.inf:
            raise ValueError(f"bin_width must be positive and finite, got {bin_width:g}")
        return -(self.log_density / dim + math.log(bin_width)) / math.log(2.0)


@torch.no_grad()
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
    steps: int | None = None,
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
        ``exact``: d products with the Jacobian; ``hutchinson``: random ones, the same along a trajectory, unbiased; a
        `TraceModel` of this network, whose head rides on the drift's own evaluation, in either form [MATH 4.1, 4.3]; a
        function of (x, t (B,)) that returns tr F; or ``i-mmse``: no flow, the loss of the state noised further, over
        all levels. That is unbiased for an ideal network, where the others are right for a network that is a gradient.
    probes, seed
        Of ``hutchinson``: Rademacher vectors for each state; of ``i-mmse``: pairs of noises at each of 40 levels. From
        torch's CPU generator.
    terminal
        Log density (B,) of states (B, ...) at time `end`; N(0, sigma^2 I) by default.
    rtol, atol
        As for `dfmath.probability_flow`; networks of single precision need at least about 1e-6.
    steps
        Where given, so many equal steps of log rho by the classical Runge-Kutta method of order 4 for all states, four
        evaluations each, instead of an adaptive grid.

    Returns
    -------
    NetworkLikelihood

    Raises
    ------
    TypeError, ValueError
        If states, times or tolerances do not fit; or levels lie outside those that a trace head was trained for.
    RuntimeError
        If a trajectory needs too many steps, or stops being finite.
    """
    _checks.instance("network", network, ScoreNetwork)
    if network.guided:
        warnings.warn("a guided field belongs to no density: this is no likelihood", stacklevel=2)
    if network.call.time == "discrete":
        raise ValueError("network is told whole times only, and a flow needs those between: use time='continuous'")
    _check_trace(trace, network)
    rtol, atol = check_tolerances(rtol, atol, network.door(x))
    probes, seed = _checks.positive_integer("probes", probes), _checks.random_seed(seed)
    first, last = _log_rho(network, "start", start), _log_rho(network, "end", end)
    (alpha, _), (last_alpha, last_sigma) = network.schedule(float(start)), network.schedule(float(end))
    if terminal is None and first > last:
        raise ValueError("end must be a time of more noise than start unless terminal gives the density there")
    at_end = terminal or (lambda x: _normal(x, last_sigma))
    if isinstance(trace, TraceModel):
        trace.refuse_untrained(math.exp(first), math.exp(last))
    if trace == "i-mmse":
        if steps is not None:
            raise ValueError("steps are of the flow, and trace 'i-mmse' has none: leave them out")
        return _by_losses(network, x, (first, last), at_end, probes, seed)
    flow = _Flow(network, x, trace, probes, seed)
    solution = _integrate(flow, flow.begin(alpha), first, last, (rtol, atol), steps)
    state = last_alpha * solution.state[:, : flow.dim].reshape(x.shape)
    # log q(x) = log q(z) - d log alpha, at both ends.
    moved = flow.dim * math.log(last_alpha / alpha)
    change = solution.state[:, flow.dim : flow.dim + flow.channels]
    return NetworkLikelihood(
        (at_end(state.to(x.dtype)) + moved - change.mean(dim=1)).to(x.dtype),
        _standard_error(change, flow.stochastic).to(x.dtype),
        torch.as_tensor(solution.evaluations, device=x.device),
        solution.error.norm(dim=1).to(x.dtype),
    )


def _check_trace(trace: Any, network: ScoreNetwork) -> None:
    if isinstance(trace, TraceModel):
        if trace.network.call.owner is not network.call.owner:
            raise ValueError("trace must be a TraceModel of this network, got one of another")
    elif not callable(trace):
        _checks.one_of("trace", trace, TRACES)


def _by_losses(
    network: ScoreNetwork,
    x: Tensor,
    log_rhos: tuple[float, float],
    terminal: Callable[[Tensor], Tensor],
    draws: int,
    seed: int,
) -> NetworkLikelihood:
    """The I-MMSE estimate."""
    low, high = (math.exp(log_rho) for log_rho in log_rhos)
    if not low < high:
        raise ValueError("end must be a time of more noise than start where trace is 'i-mmse', which noises further")
    found = i_mmse_log_densities(network, x.detach(), (low, high), terminal, draws, seed)
    number = torch.full((len(x),), 2 * NODES * draws, device=x.device)
    error = _standard_error(found, stochastic=True).to(x.dtype)
    return NetworkLikelihood(found.mean(dim=1).to(x.dtype), error, number, torch.zeros_like(error))


def _integrate(
    flow: _Flow, y: Tensor, first: float, last: float, tolerances: tuple[float, float], steps: int | None
) -> Solution:
    rtol, atol = tolerances
    if steps is None:
        return integrate(flow.drift, flow.tangent, y, first, last, flow.blocks(rtol, atol), rtol)
    return integrate_evenly(flow.drift, y, first, last, _checks.positive_integer("steps", steps), flow.dim)


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
        noise, traces = self._noise_and_traces(x, levels, call, rows)
        growth = -(levels.sigma**2)[:, None] * traces.to(y.dtype)
        moved = torch.exp(log_rho)[:, None] * noise.flatten(1).to(y.dtype)
        return torch.cat([moved, growth, torch.zeros_like(y[:, -1:])], dim=1)

    def tangent(self, log_rho: Tensor, y: Tensor, e: Tensor) -> Tensor:
        """sigma^2 F e; from a difference where the trace needs no derivative, so that nothing does."""
        x, levels, call, _ = self._at(log_rho, y)
        if callable(self.trace):
            return self._difference(x, levels, call, e)
        product = NetworkFisher(call, x, levels, self.network.derivative).matvec(e.to(x.dtype))
        return (levels.sigma**2)[:, None] * product.to(e.dtype)

    def _difference(self, x: Tensor, levels: Levels, call: ModuleCall, e: Tensor) -> Tensor:
        """sigma (eps(x + h e) - eps(x))/h, which tells how errors grow, and no more."""
        size = e.square().mean(dim=1, keepdim=True).sqrt()
        h = STEP * levels.sigma[:, None] / torch.where(size == 0.0, torch.ones_like(size), size)
        moved = x + (h * e).to(x.dtype).reshape(x.shape)
        change = evaluate(call, moved, levels, "eps") - evaluate(call, x, levels, "eps")
        return levels.sigma[:, None] * change.flatten(1).to(e.dtype) / h

    def _at(self, log_rho: Tensor, y: Tensor) -> tuple[Tensor, Levels, ModuleCall, Tensor]:
        """States x, their noise levels, how the module is called for them, and which rows they are."""
        rows, schedule = y[:, -1].round().long(), self.network.schedule
        times = schedule.time(torch.exp(log_rho))
        levels = Levels(times, *schedule(times))
        x = (levels.alpha[:, None] * y[:, : self.dim]).reshape(-1, *self.x.shape[1:]).to(self.x.dtype)
        return x, levels, self.network.call.of_rows(rows, len(self.x)), rows

    def _noise_and_traces(self, x: Tensor, levels: Levels, call: ModuleCall, rows: Tensor) -> tuple[Tensor, Tensor]:
        """eps_th, and tr F or its estimates (b, channels)."""
        if isinstance(self.trace, TraceModel):
            noise, trace = self.trace.evaluate(x, levels, call)
            return noise, trace[:, None]
        if self.probes is not None:
            v = self.probes[rows]
            score, product = NetworkFisher(call, x, levels, self.network.derivative).score_and_products(v)
            return -levels.sigma[:, None].to(x.dtype) * score, (v * product).sum(dim=1)
        noise = evaluate(call, x, levels, "eps")
        if callable(self.trace):
            return noise, one_for_each("trace", self.trace(x, levels.t), len(x))[:, None]
        return noise, NetworkFisher(call, x, levels, self.network.derivative).trace()[:, None]


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
