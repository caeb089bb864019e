"""What samples alone say of a score network: its loss, its mean score, and whether its levels agree [MATH 1.8]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from dfmath.integrations.torch import ScoreNetwork

from dfmath import _checks

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class Calibration:
    r"""Statistics of a score network over noised data, one for each time, ascending.

    Attributes
    ----------
    t, rho
        Times and noise-to-signal ratios.
    loss, loss_error
        E|eps - eps_th|^2/d, and its standard error. Of the ideal network it is (d - sigma^2 E tr F)/d, and no network's
        is lower.
    mean_score, mean_score_noise
        |mean of sigma s_th|/sqrt(d), and what sampling alone makes of it where the mean is 0, as it is for the score of
        any density [MATH 1.8].
    martingale, martingale_error
        The regression of alpha_u s_u(x_u) on alpha_t s_t(x_t), less 1, for each time t and the one before it, u; with
        standard error. 0 for the scores of one density, since alpha_t s_t(x_t) = E[alpha_u s_u(x_u) given x_t]
        [MATH 1.8]. NaN for the first time.
    """

    t: tuple[float, ...]
    rho: tuple[float, ...]
    loss: tuple[float, ...]
    loss_error: tuple[float, ...]
    mean_score: tuple[float, ...]
    mean_score_noise: tuple[float, ...]
    martingale: tuple[float, ...]
    martingale_error: tuple[float, ...]


def calibrate(network: ScoreNetwork, data: Tensor, times: Sequence[float], seed: int, batch: int = 256) -> Calibration:
    """Measure a network's loss, mean score and martingale property on noised data.

    Parameters
    ----------
    network
        Not guided: a guided field is no density's.
    data
        (n, ...) clean samples, at least two.
    times
        At which to measure, in any order.
    seed
        Of torch's CPU generator.
    batch
        States evaluated at a time.

    Returns
    -------
    Calibration

    Raises
    ------
    TypeError, ValueError
        If the network is guided, there are fewer than two samples, or times do not fit the schedule.
    """
    _checks.instance("network", network, ScoreNetwork)
    if network.guided:
        raise ValueError("network must not be guided: a guided field belongs to no density that could be checked")
    if not isinstance(data, torch.Tensor) or data.ndim < 2 or len(data) < 2:
        raise ValueError(f"data must be a tensor of at least two samples, (n, ...), got {_checks.describe(data)}")
    ordered = sorted(_checks.real_number("times", t) for t in times)
    if not ordered:
        raise ValueError("times must hold at least one time, got none")
    _checks.positive_integer("batch", batch)
    generator = torch.Generator().manual_seed(_checks.random_seed(seed))
    rows, before = [], None
    alpha, sigma, x = 1.0, 0.0, data
    for t in ordered:
        new_alpha, new_sigma = network.schedule(t)
        # The same samples, noised on from the level before.
        share, fresh = new_alpha / alpha, torch.randn(data.shape, generator=generator, dtype=data.dtype).to(data.device)
        x = share * x + math.sqrt(max(new_sigma**2 - (share * sigma) ** 2, 0.0)) * fresh
        alpha, sigma = new_alpha, new_sigma
        noise = torch.cat([network.noise(part, t) for part in x.split(batch)]).double().reshape(len(x), -1)
        true = ((x - alpha * data) / sigma).double().reshape(len(x), -1)
        score = -noise * (alpha / sigma)  # alpha s
        rows.append((t, sigma / alpha, *_loss(noise, true), *_mean(noise), *_martingale(score, before)))
        before = score
    return Calibration(*(tuple(column) for column in zip(*rows, strict=True)))


def _loss(noise: Tensor, true: Tensor) -> tuple[float, float]:
    return _mean_and_error((noise - true).square().mean(dim=1))


def _mean(noise: Tensor) -> tuple[float, float]:
    count, dim = noise.shape
    size = noise.square().sum(dim=1).mean().item()
    return noise.mean(dim=0).norm().item() / math.sqrt(dim), math.sqrt(size / (count * dim))


def _martingale(score: Tensor, before: Tensor | None) -> tuple[float, float]:
    if before is None:
        return math.nan, math.nan
    size = score.square().sum(dim=1).mean()
    return _mean_and_error(((before - score) * score).sum(dim=1) / size)


def _mean_and_error(samples: Tensor) -> tuple[float, float]:
    return samples.mean().item(), samples.std().item() / math.sqrt(len(samples))
