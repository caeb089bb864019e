r"""Log densities from the loss at a point, without a trace or an equation to integrate: the I-MMSE identity.

Noise the canonical state z_s further, z = z_s + sqrt(D) n with D = rho^2 - rho_s^2, and let c^2 = D/rho^2. Since
E[n given z] = c eps*(z), and by the heat equation d E[log q(z)]/dD = E|s + n/sqrt(D)|^2/2 - d/(2 D),

    log q_s(z_s) = E[log q_e(z_e)] + integral over log rho of E[d - |n - c eps*|^2]/c^2

(Kong, Brekelmans, Ver Steeg, *Information-theoretic diffusion*, 2023, for rho_s = 0). With pairs +n, -n and the control
(1 - c^2)(|n|^2 - d)/c^2 of mean 0 the integrand is d - |n|^2 + n . (eps_+ - eps_-)/c - (|eps_+|^2 + |eps_-|^2)/2, which
neither cancels nor grows as c -> 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from dfmath.backends._compat import accumulation_dtype, array_namespace
from dfmath.integrations.batches import seed_of
from dfmath.integrations.module_call import ModuleCall, evaluate
from dfmath.integrations.torch import ScoreNetwork

Tensor: TypeAlias = torch.Tensor

NODES = 40  # of Gauss and Legendre in log rho
PLACES, WEIGHTS = np.polynomial.legendre.leggauss(NODES)
AT_ONCE = 2**24  # numbers in the noises of draws that are evaluated together


def i_mmse_log_densities(
    network: ScoreNetwork,
    x: Tensor,
    rhos: tuple[float, float],
    terminal: Callable[[Tensor], Tensor],
    draws: int,
    seed: int,
) -> Tensor:
    """Return an unbiased estimate of log q_s for each draw, (B, draws); `terminal` (B, ...) -> (B,) is log q_e."""
    step = max(1, AT_ONCE // max(1, (NODES + 1) * x.numel()))
    blocks = [range(start, min(start + step, draws)) for start in range(0, draws, step)]
    parts = [_log_densities(network, x, rhos, terminal, _noises(x, block, seed)) for block in blocks]
    return torch.cat(parts, dim=1)


def _noises(x: Tensor, draws: range, seed: int) -> Tensor:
    """Standard normal (B, draws, NODES + 1, d), a generator for each row and draw: they stay with their rows."""
    dtype, shape = accumulation_dtype(array_namespace(x), x), (NODES + 1, x[0].numel())

    def one(row: int, k: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(seed, row, k)), dtype=dtype)

    return torch.stack([torch.stack([one(row, k) for k in draws]) for row in range(len(x))]).to(x.device)


def _log_densities(
    network: ScoreNetwork, x: Tensor, rhos: tuple[float, float], terminal: Callable[[Tensor], Tensor], draws: Tensor
) -> Tensor:
    """The same for draws that are evaluated together, one copy of the states after the other."""
    (low, high), schedule = rhos, network.schedule
    rows, copies, _, dim = draws.shape
    alpha, call = schedule(schedule.time(low))[0], network.call.repeated(copies, rows)
    z = (x.flatten(1).to(draws.dtype) / alpha).repeat(copies, 1)
    noises = draws.transpose(0, 1).flatten(0, 1)
    half, total = 0.5 * math.log(high / low), torch.zeros_like(z[:, 0])
    for i, (place, weight) in enumerate(zip(PLACES, WEIGHTS, strict=True)):
        level = _Level(call, x, low * math.exp(half * (1.0 + place)), low)
        total += half * weight * level.integrand(z, noises[:, i])
    end = _Level(call, x, high, low)
    total += end.mean_log_density(z, noises[:, NODES], lambda states: _copy_by_copy(terminal, states, rows))
    # log q(x) = log q(z) - d log alpha, at both ends.
    return (total + dim * math.log(end.alpha / alpha)).reshape(copies, rows).mT


def _copy_by_copy(terminal: Callable[[Tensor], Tensor], states: Tensor, rows: int) -> Tensor:
    """A log density that may know its batch."""
    return torch.cat([terminal(part) for part in states.split(rows)])


class _Level:
    """One noise level, seen from the lowest."""

    def __init__(self, call: ModuleCall, like: Tensor, rho: float, low: float) -> None:
        self.call, self.like, self.rho = call, like, rho
        self.t = call.schedule.time(rho)
        self.alpha, _ = call.schedule(self.t)
        self.share = 1.0 - (low / rho) ** 2  # c^2

    def integrand(self, z: Tensor, n: Tensor) -> Tensor:
        """(B,), from a pair of states."""
        c = math.sqrt(self.share)
        up, down = self._noise(z + c * self.rho * n), self._noise(z - c * self.rho * n)
        sizes = 0.5 * (up.square() + down.square())
        return (1.0 - n.square() + n * (up - down) / c - sizes).sum(dim=1)

    def mean_log_density(self, z: Tensor, n: Tensor, terminal: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean of `terminal` at a pair of states; the control is exact for a normal density, (B,)."""
        step = math.sqrt(self.share) * self.rho * n
        pair = 0.5 * (terminal(self._state(z + step)) + terminal(self._state(z - step)))
        return pair.to(z.dtype) + 0.5 * self.share * (n.square() - 1.0).sum(dim=1)

    def _state(self, z: Tensor) -> Tensor:
        return (self.alpha * z).reshape(-1, *self.like.shape[1:]).to(self.like.dtype)

    def _noise(self, z: Tensor) -> Tensor:
        x = self._state(z)
        return evaluate(self.call, x, self.call.levels(x, self.t), "eps").flatten(1).to(z.dtype)
