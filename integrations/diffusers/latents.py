"""Between the latents that pipelines denoise and pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch

from dfmath import _checks

__all__ = ["decoded", "encoded"]

Tensor: TypeAlias = torch.Tensor
# What diffusers' pipelines leave for float32 where a VAE's config has force_upcast.
UPCAST = {"decode": (torch.float16,), "encode": (torch.float16, torch.bfloat16)}


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """Return images (B, 3, H, W), about [0, 1], of latents as the pipeline denoises them; differentiable.

    Where there is no VAE, latents are pixels in [-1, 1]. A VAE of float16 with ``force_upcast`` in its config decodes
    in float32, and is left as it was found.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return 0.5 * (latents + 1.0)
    wide = latents.to(torch.promote_types(latents.dtype, _dtype(vae, "decode")))
    mean, spread = _scaling(vae, wide)
    pixels: Tensor = _called(vae, "decode", wide * spread + mean, return_dict=False)[0]
    return 0.5 * (pixels.to(latents.dtype) + 1.0)


def encoded(pipe: Any, images: Tensor, seed: int | None = None) -> Tensor:
    """Return latents as the pipeline denoises them of images (B, 3, H, W) in [0, 1].

    The mean of the encoder's distribution, or a draw from it where a seed is given; without a graph. A VAE of half
    precision with ``force_upcast`` in its config encodes in float32, and is left as it was found.
    """
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating of shape (B, 3, H, W), got {_checks.describe(images)}")
    vae = getattr(pipe, "vae", None)
    pixels = 2.0 * images - 1.0
    if vae is None:
        return pixels
    with torch.no_grad():
        found = _called(vae, "encode", pixels).latent_dist
    drawn = found.mode() if seed is None else found.sample(torch.Generator(vae.device).manual_seed(seed))
    mean, spread = _scaling(vae, drawn)
    scaled: Tensor = (drawn - mean) / spread
    return scaled.to(images.dtype)


class _Method(torch.nn.Module):
    """One method of a VAE as a module, which can be called with other parameters than the VAE's."""

    def __init__(self, vae: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.vae, self.name = vae, name

    def forward(self, x: Tensor, **options: Any) -> Any:
        """Call it."""
        return getattr(self.vae, self.name)(x, **options)


def _dtype(vae: Any, method: str) -> torch.dtype:
    """What a method is called in: the VAE's own dtype, or float32 where that would overflow."""
    upcast = getattr(vae.config, "force_upcast", False) and vae.dtype in UPCAST[method]
    return torch.float32 if upcast else vae.dtype


def _called(vae: Any, method: str, x: Tensor, **options: Any) -> Any:
    """Call a method, with copies of the parameters if not in their dtype: a graph outlives a VAE's change of dtype."""
    dtype = _dtype(vae, method)
    if dtype == vae.dtype:
        return getattr(vae, method)(x.to(dtype), **options)
    module = _Method(vae, method)
    parts = chain(module.named_parameters(), module.named_buffers())
    copies = {name: part.to(dtype) for name, part in parts if part.is_floating_point()}
    with _without_checkpoints(vae):
        return torch.func.functional_call(module, copies, (x.to(dtype),), options)


@contextmanager
def _without_checkpoints(vae: torch.nn.Module) -> Iterator[None]:
    """Keep all activations: what is computed again for gradients would meet the VAE's own parameters, not copies."""
    parts = [part for part in vae.modules() if getattr(part, "gradient_checkpointing", False)]
    try:
        for part in parts:
            part.gradient_checkpointing = False
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True


def _scaling(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """Mean and spread of the VAE's latents: what is denoised has them taken out."""
    config, unit = vae.config, 1.0 / vae.config.scaling_factor
    means, spreads = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if means is not None and spreads is not None:
        mean, spread = (torch.tensor(part).to(like).reshape(1, -1, 1, 1) for part in (means, spreads))
        return mean, spread * unit
    return getattr(config, "shift_factor", None) or 0.0, unit
