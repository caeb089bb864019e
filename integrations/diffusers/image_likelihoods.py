"""Likelihoods of a folder of images under a pipeline's network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from dfmath.integrations.diffusers.folder import latents_of_folder
from dfmath.integrations.diffusers.guided import ends_of, latent_size
from dfmath.integrations.diffusers.pipelines import network_of
from dfmath.integrations.images import dequantise
from dfmath.integrations.likelihood import NetworkLikelihood, network_log_likelihood
from dfmath.integrations.torch import ScoreNetwork

from dfmath import _checks

__all__ = ["ImageLikelihood", "image_likelihoods"]

Tensor: TypeAlias = torch.Tensor
LEVELS = (0.02, 80.0)  # as far as the network knows them


@dataclass(frozen=True)
class ImageLikelihood:
    """The log-likelihood of one image at the lowest noise level.

    Attributes
    ----------
    file
        Its name.
    log_density
        Nats, of the whole latents or pixels, x = alpha x0.
    standard_error
        Over probes or draws; 0 where nothing is stochastic, NaN for one.
    dim
        Numbers of the latents or pixels.
    bits_per_dimension
        Of pixels in 8 bits; None for latents, which have no bins.
    """

    file: str
    log_density: float
    standard_error: float
    dim: int
    bits_per_dimension: float | None


def image_likelihoods(
    pipe: Any,
    folder: str | Path,
    *,
    prompt: str | None = None,
    size: int | None = None,
    rho_min: float | None = None,
    rho_max: float | None = None,
    trace: Literal["exact", "hutchinson", "i-mmse"] = "hutchinson",
    probes: int = 4,
    steps: int = 40,
    batch: int = 4,
    seed: int = 0,
    progress: Callable[[str], None] = lambda file: None,
) -> list[ImageLikelihood]:
    """Return log q of every image of a folder: encoded, or its pixels spread over their bins, and carried up the flow.

    Parameters
    ----------
    pipe
        A diffusers pipeline; its safety and guidance play no part.
    folder, size
        As for `latents_of_folder`; by default the size that the pipeline makes images of.
    prompt
        For all images; by default the caption of each, where the pipeline reads text.
    rho_min, rho_max
        Noise-to-signal ratios that the flow runs between; by default 0.02 and 80, or the ends of what the network knows
        where these are nearer. The density is that of data with noise rho_min.
    trace, probes, steps, seed
        As for `network_log_likelihood`; `steps` are of a fixed grid, and `seed` is of the places in pixels' bins, too.
    batch
        Images carried together.
    progress
        Called with the name of each file that is done.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or the folder holds no images.
    """
    side = pipeline_size(pipe) if size is None else size
    found = latents_of_folder(pipe, folder, size=side, batch=batch)
    clean, width = _states(pipe, found.latents, seed)
    results: list[ImageLikelihood] = []
    for start in range(0, len(found.files), batch):
        rows = slice(start, start + batch)
        texts = list(found.captions[rows]) if prompt is None else [prompt] * len(found.files[rows])
        network = network_of(pipe, texts if hasattr(pipe, "encode_prompt") else None)
        x = clean[rows]
        levels = _levels(network, rho_min, rho_max)
        options: dict[str, Any] = {} if trace == "i-mmse" else {"steps": steps}
        alpha = float(network.schedule(levels[0])[0])
        likelihood = network_log_likelihood(
            network, alpha * x.to(network.call.owner.device), *levels, trace=trace, probes=probes, seed=seed, **options
        )
        for one in _rows(found.files[rows], likelihood, x[0].numel(), alpha * width):
            results.append(one)
            progress(one.file)
    return results


def pipeline_size(pipe: Any) -> int:
    """Return the height of the images that a pipeline makes, in pixels."""
    return int(latent_size(pipe, None)[0] * (pipe.vae_scale_factor if getattr(pipe, "vae", None) is not None else 1))


def _states(pipe: Any, latents: Tensor, seed: int) -> tuple[Tensor, float]:
    """Clean states, and the width of a bin of the data, 0 where there are none."""
    if getattr(pipe, "vae", None) is not None:
        return latents, 0.0
    pixels = dequantise((127.5 * (latents + 1.0)).round().to(torch.int64), seed)
    return pixels.x, pixels.bin_width


def _levels(network: ScoreNetwork, rho_min: float | None, rho_max: float | None) -> tuple[float, float]:
    """Times of the lowest and the highest level."""
    low, high = ends_of(network.schedule)
    least = max(low, LEVELS[0]) if rho_min is None else _checks.real_number("rho_min", rho_min)
    most = min(high, LEVELS[1]) if rho_max is None else _checks.real_number("rho_max", rho_max)
    if not low <= least < most <= high:
        raise ValueError(
            f"rho_min and rho_max must satisfy rho_min < rho_max within the levels that the network knows, "
            f"{low:.3g} to {high:.3g}, got {least:g} and {most:g}"
        )
    return network.schedule.time(least), network.schedule.time(most)


def _rows(files: tuple[str, ...], found: NetworkLikelihood, dim: int, width: float) -> list[ImageLikelihood]:
    bits = found.bits_per_dimension(dim, width).tolist() if width else [None] * len(files)
    values = zip(files, found.log_density.tolist(), found.standard_error.tolist(), bits, strict=True)
    return [ImageLikelihood(file, value, error, dim, bit) for file, value, error, bit in values]
