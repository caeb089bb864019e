"""Trace matching: a head for tr F trained by regression, in the paper's form and as a local loss.

The regression is on the sample's own |x0|^2/d [MATH 4.1; Wang et al. 2025, Algorithm 1, DF-TM] or on its own denoising
loss |eps - eps_th|^2/d [MATH 4.3]; their minimisers are posterior moments, and tr F follows from either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from dfmath.integrations.batches import batches
from dfmath.integrations.module_call import device_of
from dfmath.integrations.torch import ScoreNetwork
from dfmath.integrations.trace_model import DataScale, Form, TraceModel, load_trace_model
from dfmath.integrations.training import TrainingPlan, TrainingResult, train
from torch.utils.data import DataLoader

from dfmath import _checks
from dfmath.approximations import hutchinson_trace

__all__ = [
    "TraceComparison",
    "TraceModel",
    "TrainedTrace",
    "compare_with_hutchinson",
    "load_trace_model",
    "train_trace_model",
]

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class TrainedTrace:
    """A trace model, and how its training went."""

    model: TraceModel
    training: TrainingResult


def train_trace_model(
    network: ScoreNetwork,
    data: Any,
    plan: TrainingPlan,
    form: Form = "local-loss",
    *,
    rho: tuple[float, float],
    features: str | None = None,
    batch: int = 256,
    width: int = 128,
    hidden: int = 128,
    validation: Tensor | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> TrainedTrace:
    r"""Train a head for tr F by regression on noised data; the score network stays as it is.

    .. math:: \min_\theta E\big[y/p_\theta + \log p_\theta\big], \; y = |\epsilon - \epsilon_\theta|^2/d
              \quad \text{(local-loss)} \qquad
              \min_\theta E\big[(t_\theta - |x_0|^2/d)^2\big] \quad \text{(paper)}

    The first is the likelihood of a Gamma distribution of mean p: relative errors count alike at all levels, and its
    minimiser is E[y given x], as for every Bregman divergence [MATH 4.1, 4.3].

    Parameters
    ----------
    network
        Not guided.
    data
        Clean samples: a tensor (n, ...), a prior of torch tensors, or a `DataLoader`.
    plan
        Steps, rates, averaging and seed.
    form
        ``local-loss`` or ``paper``.
    rho
        Lowest and highest noise-to-signal ratio; log rho is drawn evenly between.
    features
        Name of the submodule (as in ``module.named_modules()``) whose output the head reads: (B, C), maps
        (B, C, H, W) or tokens (B, T, C). None gives the head a small network of its own.
    batch
        States in a step; a loader has its own.
    width, hidden
        Of the small network, where there is one, and of the head.
    validation
        Clean samples (n, ...) to compare the head on with Hutchinson's traces of the network's own Jacobian, every
        ``plan.every`` steps: the root mean square, over four levels, of the mean difference in standard errors. About 1
        where samples cannot tell them apart; more, too, where the Jacobian is not that of a gradient.
    checkpoint
        File to save progress in and to go on from; see `train`.
    progress
        Called with a short text after each step.

    Returns
    -------
    TrainedTrace

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or the checkpoint is of another training.
    """
    _checks.instance("network", network, ScoreNetwork)
    low, high = _range(network, rho)
    draw = _clean(data, _checks.positive_integer("batch", batch), plan.seed)
    draw = _moved(draw, network)
    first = draw(0, torch.Generator().manual_seed(0))
    with _checks.on_behalf_of("data"):
        network.door(first)
    _refuse_rows(network, len(first))
    shape = network.call.event_shape or tuple(first.shape[1:])
    if features is not None:
        width = _measured_width(network, features, first, low)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(plan.seed)  # of the head's first weights
        scale, sizes = DataScale.of(draw), {"width": width, "hidden": hidden}
        model = TraceModel(network, form, scale, features=features, event_shape=shape, rho=(low, high), **sizes)
    model.module.to(first.device)
    config: dict[str, Any] = {"trace model": model.config, "batch": batch}

    def loss(step: int, generator: torch.Generator) -> Tensor:
        return _loss(model, draw(step, generator), (low, high), generator)

    validate = None if validation is None else partial(_in_standard_errors, model, validation, (low, high), plan.seed)
    found = train(model.module, loss, plan, checkpoint=checkpoint, validate=validate, config=config, progress=progress)
    return TrainedTrace(model, found)


def _in_standard_errors(model: TraceModel, data: Tensor, rho: tuple[float, float], seed: int, _: Any) -> float:
    """How far the head is from Hutchinson's traces, beside how well they are known."""
    rhos = [rho[0] ** (1.0 - share) * rho[1] ** share for share in (0.125, 0.375, 0.625, 0.875)]
    times = tuple(model.network.call.times(torch.tensor(rhos, dtype=torch.float64)).tolist())
    found = compare_with_hutchinson(model, data, times, seed)
    off = [d / e for d, e in zip(found.difference, found.standard_error, strict=True)]
    return math.sqrt(sum(part**2 for part in off) / len(off))


def _clean(data: Any, size: int, seed: int) -> Callable[[int, torch.Generator], Tensor]:
    """Batches of clean samples; of a loader that gives labels, too, the first part."""
    if not isinstance(data, DataLoader):
        return batches(data, size)
    draw = batches(data, seed=seed)

    def first(step: int, generator: torch.Generator) -> Tensor:
        found = draw(step, generator)
        part: Tensor = found[0] if isinstance(found, tuple | list) else found
        return part

    return first


def _loss(model: TraceModel, data: Tensor, rho: tuple[float, float], generator: torch.Generator) -> Tensor:
    """One step's loss; the levels of a batch are spread evenly over log rho."""
    call, count = model.network.call, len(data)
    place = (torch.arange(count) + torch.rand((), generator=generator)) / count
    log_rho = math.log(rho[0]) + (math.log(rho[1]) - math.log(rho[0])) * place.double().to(data.device)
    levels = call.levels(data, call.times(torch.exp(log_rho)))
    eps = torch.randn(data.shape, generator=generator, dtype=data.dtype).to(data.device)
    alpha, sigma = (part.to(data.dtype).reshape(-1, *(1,) * (data.ndim - 1)) for part in (levels.alpha, levels.sigma))
    x = alpha * data + sigma * eps
    with torch.no_grad():
        noise, features = model.ride(x, levels, call)
    share = model.share(noise, features, x, levels)
    if model.form == "paper":
        return (share - data.flatten(1).square().mean(dim=1)).square().mean()
    return ((eps - noise).flatten(1).square().mean(dim=1) / share + torch.log(share)).mean()


def _range(network: ScoreNetwork, rho: Any) -> tuple[float, float]:
    if not isinstance(rho, tuple | list) or len(rho) != 2:
        raise TypeError(f"rho must be the lowest and the highest ratio, got {_checks.describe(rho)}")
    low, high = (_checks.real_number("rho", r) for r in rho)
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"rho must be two positive ratios in ascending order, got ({low:g}, {high:g})")
    with _checks.on_behalf_of("rho"):
        network.schedule.time(low), network.schedule.time(high)
    return low, high


def _moved(draw: Callable[[int, torch.Generator], Tensor], network: ScoreNetwork) -> Any:
    """Batches where the network is; loaders give theirs on the CPU."""
    place = device_of(network.call.owner)
    on_cpu = place.type == "cpu"
    return draw if on_cpu else lambda step, generator: draw(step, generator).to(place)


def _refuse_rows(network: ScoreNetwork, batch: int) -> None:
    """Conditioning of single rows would go with data that change from step to step."""
    for name, value in network.call.conditioning.items():
        if batch > 1 and isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == batch:
            raise ValueError(f"conditioning {name!r} must be shared by all states, got a row for each of {batch}")


def _measured_width(network: ScoreNetwork, features: str, data: Tensor, rho: float) -> int:
    """Number of features that the submodule has, from one evaluation."""
    probe = TraceModel(network, "paper", DataScale(1.0, 1.0), features=features, event_shape=tuple(data.shape[1:]))
    t = network.call.times(torch.tensor([rho], dtype=torch.float64))
    found = probe.ride(
        data[:1], network.call.levels(network.door(data[:1]), t), network.call.of_rows(slice(1), len(data))
    )
    return int(found[1].shape[1]) if found[1] is not None else 0


@dataclass(frozen=True)
class TraceComparison:
    """Head and Hutchinson on the same states, one entry for each time; their difference should be a few errors.

    Attributes
    ----------
    t, rho
        Times and noise-to-signal ratios.
    mean
        Mean of sigma^2 T/d over the states.
    difference, standard_error
        Mean of sigma^2 (T - Hutchinson's estimate)/d, and its standard error.
    """

    t: tuple[float, ...]
    rho: tuple[float, ...]
    mean: tuple[float, ...]
    difference: tuple[float, ...]
    standard_error: tuple[float, ...]


def compare_with_hutchinson(
    model: TraceModel, data: Tensor, times: tuple[float, ...], seed: int, probes: int = 2
) -> TraceComparison:
    """Measure a head beside stochastic traces of its network's own Jacobian at noised data.

    Parameters
    ----------
    model
        To measure.
    data
        (n, ...) clean samples, at least two.
    times
        At which to measure.
    seed
        Of noise and probes.
    probes
        For each state, at least 2.

    Returns
    -------
    TraceComparison
    """
    if not isinstance(data, torch.Tensor) or data.ndim < 2 or len(data) < 2:
        raise ValueError(f"data must be a tensor of at least two samples, (n, ...), got {_checks.describe(data)}")
    generator, rows = torch.Generator().manual_seed(_checks.random_seed(seed)), []
    for t in times:
        alpha, sigma = model.network.schedule(_checks.real_number("times", t))
        x = alpha * data + sigma * torch.randn(data.shape, generator=generator, dtype=data.dtype).to(data.device)
        fisher = model.network.fisher(x, t)
        scale = sigma**2 / math.prod(data.shape[1:])
        own, other = scale * model(x, t), scale * hutchinson_trace(fisher, x.flatten(1), probes, seed).value
        off = own - other
        error = off.std().item() / math.sqrt(len(off))
        rows.append((float(t), sigma / alpha, own.mean().item(), off.mean().item(), error))
    return TraceComparison(*(tuple(column) for column in zip(*rows, strict=True)))
