"""One run of a sampler, kept as states and noises without graphs: what adjoints and products read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from dfmath.integrations.module_call import ModuleCall, evaluate
from dfmath.integrations.torch import ScoreNetwork

from dfmath import _checks
from dfmath.solvers import Scheme

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class Trajectory:
    """What one run of a sampler leaves: canonical states z = x/alpha, flattened, without graphs.

    Attributes
    ----------
    network, scheme
        What was run.
    shape
        Of a batch of states as the network takes it, (B, ...).
    times
        Of the evaluations.
    states, noises
        z_i and eps_i at every evaluation i, (B, d) each.
    end
        (B, d), the last state.
    """

    network: ScoreNetwork
    scheme: Scheme
    shape: tuple[int, ...]
    times: tuple[float, ...]
    states: tuple[Tensor, ...]
    noises: tuple[Tensor, ...]
    end: Tensor

    def rho(self, i: int) -> float:
        """Noise level of evaluation i."""
        return self.scheme.rhos[i]

    def mean(self, i: int) -> Tensor:
        """The network's posterior mean at evaluation i, (B, d) [MATH 1.1]."""
        return self.states[i] - self.scheme.rhos[i] * self.noises[i]

    def state(self, i: int) -> Tensor:
        """x_i as the network took it, (B, ...)."""
        alpha, _ = self.network.schedule(self.times[i])
        return (alpha * self.states[i]).reshape(self.shape)


def run(network: ScoreNetwork, scheme: Scheme, x: Tensor) -> Trajectory:
    r"""Run a sampler and keep what its adjoint needs.

    .. math:: z_{k+1} = z_{start} + \sum_i w_{ki}\, \epsilon_\theta(z_i, \rho_i)

    Parameters
    ----------
    network
        May be guided.
    scheme
        From `dfmath.solvers.scheme`; its levels are those of times that the network's schedule has.
    x
        (B, ...) states at the first level, x = alpha z, as the network takes them.

    Returns
    -------
    Trajectory
        With two states for each evaluation in memory, on the device of x.

    Raises
    ------
    TypeError, ValueError
        If states or levels do not fit the network.

    Examples
    --------
    >>> import torch
    >>> from dfmath.schedules import EDM
    >>> from dfmath.solvers import scheme
    >>> network = ScoreNetwork(lambda x, t: x / (1.0 + t**2)[:, None] ** 0.5, EDM())
    >>> path = run(network, scheme("ddim", [2.0, 1.0, 0.0]), torch.ones(1, 3))
    >>> len(path.states), path.end.shape
    (2, torch.Size([1, 3]))
    """
    field = Field(network, scheme, x)
    with torch.no_grad():
        return field.follow(field.begin(x.detach()))


class Field:
    """The noise of a network along a scheme, in flattened canonical states."""

    def __init__(self, network: ScoreNetwork, scheme: Scheme, x: Tensor) -> None:
        _checks.instance("network", network, ScoreNetwork)
        _checks.instance("scheme", scheme, Scheme)
        if scheme.stochastic:
            raise ValueError("scheme must be deterministic to be followed back, got one that draws fresh noise")
        self.network, self.scheme, self.shape = network, scheme, tuple(network.door(x).shape)
        self.times = tuple(network.time_of(rho) for rho in scheme.rhos[:-1])

    def begin(self, x: Tensor) -> Tensor:
        """z at the first level."""
        alpha, _ = self.network.schedule(self.times[0])
        return x.reshape(len(x), -1) / alpha

    def follow(self, z: Tensor) -> Trajectory:
        """Run from the first state to the last."""
        noises: list[Tensor] = []
        states = [z]
        self.extend(states, noises, len(self.scheme.stages))
        record = tuple(states[:-1]), tuple(noises), states[-1]
        return Trajectory(self.network, self.scheme, self.shape, self.times, *record)

    def extend(self, states: list[Tensor], noises: list[Tensor], last: int) -> None:
        """Make states up to number `last`, in place."""
        for k in range(len(states) - 1, last):
            stage = self.scheme.stages[k]
            noises.append(self.noise(states[k], k))
            states.append(stage.deterministic(states, noises))

    def noise(self, z: Tensor, i: int, call: ModuleCall | None = None) -> Tensor:
        """eps at state z, of number i."""
        t = self.times[i]
        alpha, _ = self.network.schedule(t)
        x = (alpha * z).reshape(self.shape)
        call = self.network.call if call is None else call
        return evaluate(call, x, call.levels(x, t), "eps").reshape(z.shape)
