"""azula's denoisers as score networks, and networks and priors as denoisers of azula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

import torch
from azula.denoise import Denoiser, DiracPosterior, GaussianPosterior
from azula.noise import Schedule as AzulaSchedule
from dfmath.integrations.module_call import evaluate
from dfmath.integrations.torch import ScoreNetwork

from dfmath import _checks
from dfmath.priors import Prior
from dfmath.schedules import EDM

__all__ = ["AzulaDenoiser", "network_from_azula"]

Tensor: TypeAlias = torch.Tensor
HALVINGS = 60  # of [0, 1], to the last bit of float64


def network_from_azula(denoiser: Denoiser, **conditioning: Any) -> ScoreNetwork:
    """Return an azula denoiser as a score network in canonical coordinates, where its own schedule is left behind.

    Times are noise-to-signal ratios, from the denoiser's schedule at 0 to that at 1; the posterior mean is its own at
    the time of its schedule that has this ratio.

    Parameters
    ----------
    denoiser
        With a schedule whose ratio grows.
    **conditioning
        Keyword arguments of every call.

    Raises
    ------
    TypeError, ValueError
        If it is no denoiser, or its schedule's ratio does not grow from a number that is not negative.
    """
    _checks.instance("denoiser", denoiser, Denoiser)
    low, high = (_ratio(denoiser.schedule, torch.tensor(t, dtype=torch.float64)).item() for t in (0.0, 1.0))
    if not 0.0 <= low < high:
        raise ValueError(f"denoiser's schedule must grow from less noise to more, got ratios {low:g} to {high:g}")

    def module(z: Tensor, rho: Tensor, **given: Any) -> Tensor:
        t = _time(denoiser.schedule, rho.to(torch.float64))
        t = t[0] if bool((t == t[0]).all()) else t  # one time for all is what every denoiser of azula takes
        alpha, _ = denoiser.schedule(t)
        x = alpha.to(z.dtype).reshape(-1, *(1,) * (z.ndim - 1)) * z
        mean: Tensor = denoiser(x, t.to(z.dtype), **given).mean
        return mean

    schedule = EDM(low, min(high, 1e30))
    return ScoreNetwork(module, schedule, "denoiser", conditioning=conditioning, wraps=denoiser)


class AzulaDenoiser(Denoiser):
    """A score network, or an exact prior of torch tensors, as a denoiser for azula's samplers and guidance.

    A network's posterior is its mean. A prior's has the diagonal of its covariance, too [MATH 1.1, 1.2]. A network of
    discrete times is evaluated at the whole time whose noise level is nearest in log rho, with z = x/alpha as it is.

    Parameters
    ----------
    model
        `ScoreNetwork` or prior; a prior's states are flattened inside.
    schedule
        azula's, of the states x it will be given.
    """

    def __init__(self, model: ScoreNetwork | Prior, schedule: AzulaSchedule) -> None:
        super().__init__()
        if not isinstance(model, ScoreNetwork | Prior):
            raise TypeError(f"model must be a ScoreNetwork or a prior, got {_checks.describe(model)}")
        _checks.instance("schedule", schedule, AzulaSchedule)
        self.model, self.schedule = model, schedule
        wrapped = model.call.owner if isinstance(model, ScoreNetwork) else None
        self.module = wrapped if isinstance(wrapped, torch.nn.Module) else None  # for what asks for parameters

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior | GaussianPosterior:
        """Return the posterior at states x_t (B, ...) and time t, () or (B).

        Keyword arguments are conditioning of the network, beside its own or in its place; TypeError for a prior.
        """
        alpha, sigma = (level.to(torch.float64).reshape(-1) for level in self.schedule(t))
        if not isinstance(self.model, Prior):
            return DiracPosterior(_predicted(self.model, x_t, alpha, sigma, kwargs))
        if kwargs:
            raise TypeError(f"a prior takes no keyword arguments, got {', '.join(sorted(kwargs))}")
        return _exact(self.model, x_t, alpha, sigma)


def _predicted(network: ScoreNetwork, x: Tensor, alpha: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Tensor:
    """The network's posterior mean, at the size that its own schedule gives these states."""
    call = replace(network.call, conditioning={**network.call.conditioning, **conditioning})
    own = call.times((sigma / alpha).expand(len(x)))
    change = (call.schedule(own)[0] / alpha).to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    states = network.door(change * x)
    return evaluate(call, states, call.levels(states, own), "x0")


def _exact(prior: Prior, x: Tensor, alpha: Tensor, sigma: Tensor) -> GaussianPosterior:
    levels = (level.to(x.dtype).expand(len(x)) for level in (alpha, sigma))
    q, flat = prior.diffuse(*levels), x.flatten(1)
    variance = q.fisher(flat).posterior_covariance().diagonal()
    return GaussianPosterior(q.posterior_mean(flat).reshape(x.shape), variance.reshape(x.shape))


def _ratio(schedule: AzulaSchedule, t: Tensor) -> Tensor:
    alpha, sigma = schedule(t)
    return sigma / alpha


def _time(schedule: AzulaSchedule, rho: Tensor) -> Tensor:
    """The time at which a schedule has this ratio, by halving: azula's schedules need no inverse."""
    low, high = torch.zeros_like(rho), torch.ones_like(rho)
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        above = _ratio(schedule, middle) > rho
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * (low + high)
