"""Images with captions from a folder, as the latents of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from dfmath.integrations.diffusers.latents import encoded
from PIL import Image, ImageOps

from dfmath import _checks

__all__ = ["CaptionedLatents", "latents_of_folder"]

Tensor: TypeAlias = torch.Tensor
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class CaptionedLatents:
    """What a folder holds.

    Attributes
    ----------
    latents
        (n, channels, h, w), on the CPU, as the pipeline denoises them: clean samples to train heads on.
    captions
        Of each; empty where there is none.
    files
        Their names, sorted.
    """

    latents: Tensor
    captions: tuple[str, ...]
    files: tuple[str, ...]


def latents_of_folder(
    pipe: Any,
    folder: str | Path,
    *,
    size: int,
    batch: int = 4,
    progress: Callable[[str], None] | None = None,
) -> CaptionedLatents:
    """Encode all images of a folder, by the mean of the encoder; NAME.txt beside NAME.png is its caption.

    Images are taken as they are shown: upright, where the camera was not, and on white, where they are transparent.

    Parameters
    ----------
    pipe
        A diffusers pipeline; pixels in [-1, 1] take the place of latents where it has no VAE.
    folder
        With PNG, JPEG, WebP or BMP files; others are passed over.
    size
        Images are cut to their central square and scaled to size x size.
    batch
        Images encoded together.
    progress
        Called with the name of each file.

    Raises
    ------
    TypeError, ValueError
        If there is no such folder, it has no images, one cannot be read, or an argument does not fit.
    """
    side, count = _checks.positive_integer("size", size), _checks.positive_integer("batch", batch)
    files = _images(Path(folder))
    device, parts = _device(pipe), []
    for start in range(0, len(files), count):
        some = files[start : start + count]
        pixels = torch.stack([_pixels(file, side) for file in some]).to(device)
        parts.append(encoded(pipe, pixels).cpu())
        for file in some:
            if progress is not None:
                progress(file.name)
    captions = tuple(_caption(file) for file in files)
    return CaptionedLatents(torch.cat(parts), captions, tuple(file.name for file in files))


def _images(folder: Path) -> list[Path]:
    """Files with images, by name."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise ValueError(f"folder must hold images, got {str(folder)!r}, which {what}")
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"folder must hold images ({', '.join(SUFFIXES)}), got none in {str(folder)!r}")
    return files


def _pixels(file: Path, side: int) -> Tensor:
    """(3, side, side) in [0, 1]."""
    try:
        with Image.open(file) as opened:
            image = _as_shown(opened)
    except (OSError, SyntaxError, ValueError) as problem:  # the last two are Pillow's for some damaged files
        raise ValueError(f"folder holds an image that cannot be read, {file.name}: {problem}") from None
    short = min(image.size)
    left, top = ((length - short) // 2 for length in image.size)
    square = image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + short, top + short))
    values = np.asarray(square, dtype=np.float32).reshape(side, side, -1) / 255.0
    values = values.clip(0.0, 1.0)  # scaling overshoots at edges, and cuts it off in 8 bits alone
    return torch.from_numpy(values).permute(2, 0, 1).expand(3, -1, -1).contiguous()


def _as_shown(opened: Image.Image) -> Image.Image:
    """Upright and on white: of 8 bits in red, green and blue, or grey floats from 0 to 255."""
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):
        return _deep_grey(image)
    layer = image.convert("RGBA")  # transparent pixels have colours, too, that nobody sees
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, all of whose levels from 256 on are white to Pillow's own conversion."""
    values = np.asarray(image, dtype=np.float32)
    seen = values != image.info.get("transparency", -1)
    return Image.fromarray(np.where(seen, values / np.float32(257.0), np.float32(255.0)))


def _caption(file: Path) -> str:
    text = file.with_suffix(".txt")
    return text.read_text(encoding="utf-8-sig").strip() if text.is_file() else ""


def _device(pipe: Any) -> torch.device:
    module = getattr(pipe, "vae", None) or getattr(pipe, "unet", None)
    return next(module.parameters()).device if module is not None else torch.device("cpu")
