"""Pipelines from folders: nothing is downloaded, and no pickle is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

__all__ = ["saved_pipeline"]


def saved_pipeline(path: str | Path) -> Any:
    """Return the pipeline that a folder holds.

    Parameters
    ----------
    path
        Where `save_pretrained` wrote it, with weights as safetensors.

    Raises
    ------
    ValueError
        If there is none, or it can't be loaded.
    """
    if not (Path(path) / "model_index.json").is_file():
        raise ValueError(
            f"model must be a folder that a diffusers pipeline was saved in by save_pretrained, got {str(path)!r}, "
            "which has no model_index.json"
        )
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except (KeyError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"model: the pipeline in {str(path)!r} could not be loaded: {error}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe
