"""Between the latents that pipelines denoise and pixels."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from dfmath import _checks

__all__ = ["decoded", "encoded"]

Tensor: TypeAlias = torch.Tensor


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """Return images (B, 3, H, W), about [0, 1], of latents as the pipeline denoises them; differentiable.

    Where there is no VAE, latents are pixels in [-1, 1].
    """
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return 0.5 * (latents + 1.0)
    mean, spread = _scaling(vae, latents)
    pixels: Tensor = vae.decode((latents * spread + mean).to(vae.dtype), return_dict=False)[0]
    return 0.5 * (pixels.to(latents.dtype) + 1.0)


def encoded(pipe: Any, images: Tensor, seed: int | None = None) -> Tensor:
    """Return latents as the pipeline denoises them of images (B, 3, H, W) in [0, 1].

    The mean of the encoder's distribution, or a draw from it where a seed is given; without a graph.
    """
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating of shape (B, 3, H, W), got {_checks.describe(images)}")
    vae = getattr(pipe, "vae", None)
    pixels = 2.0 * images - 1.0
    if vae is None:
        return pixels
    with torch.no_grad():
        found = vae.encode(pixels.to(vae.dtype)).latent_dist
    drawn = found.mode() if seed is None else found.sample(torch.Generator(vae.device).manual_seed(seed))
    mean, spread = _scaling(vae, drawn)
    scaled: Tensor = (drawn - mean) / spread
    return scaled.to(images.dtype)


def _scaling(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """Mean and spread of the VAE's latents: what is denoised has them taken out."""
    config, unit = vae.config, 1.0 / vae.config.scaling_factor
    means, spreads = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if means is not None and spreads is not None:
        mean, spread = (torch.tensor(part).to(like).reshape(1, -1, 1, 1) for part in (means, spreads))
        return mean, spread * unit
    return getattr(config, "shift_factor", None) or 0.0, unit
