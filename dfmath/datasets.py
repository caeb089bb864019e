"""Real data to verify on: the embedded digits, and arrays from files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dfmath._checks import describe


def digits() -> np.ndarray:
    """Return scikit-learn's handwritten digits, (1797, 64) float64, pixel values scaled from 0..16 to [-1, 1]."""
    from sklearn.datasets import load_digits

    pixels: np.ndarray = load_digits().data
    return pixels / 8.0 - 1.0


def load_points(path: str | Path) -> np.ndarray:
    """Read data points (N, d) from a ``.npy`` file, or the array ``points`` of an ``.npz``; pickles are refused."""
    points: np.ndarray = load_arrays(path, required=("points",))["points"]
    return points


def load_arrays(path: str | Path, required: tuple[str, ...], optional: Iterable[str] = ()) -> dict[str, Any]:
    """Read named arrays from an ``.npz`` file, or the first required one from a memory-mapped ``.npy``.

    Raises
    ------
    ValueError
        If the file does not exist, is neither format, holds pickled objects, or lacks a required array.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"file {str(path)!r} does not exist")
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        pickled = "pickle" in str(error).lower() and path.suffix in (".npy", ".npz")
        reason = "pickled objects are refused" if pickled else "not a NumPy array file"
        raise ValueError(f"file {str(path)!r} must be a .npy or .npz of numbers: {reason}") from None
    if isinstance(loaded, np.ndarray):
        return {required[0]: _plain(loaded, str(path))} if len(required) == 1 else _missing(path, required[1])
    with loaded:
        for name in required:
            if name not in loaded.files:
                _missing(path, name)
        wanted = [name for name in (*required, *optional) if name in loaded.files]
        return {name: _read(loaded, name, path) for name in wanted}


def _read(archive: Any, name: str, path: Path) -> Any:
    try:
        array = archive[name]
    except ValueError:
        raise ValueError(
            f"array {name!r} in file {str(path)!r} must hold numbers: pickled objects are refused"
        ) from None
    if name == "covariances" and array.ndim == 0 and array.dtype.kind == "f":
        return float(array)
    return _plain(array, f"{path}:{name}")


def _plain(array: np.ndarray, where: str) -> np.ndarray:
    """Refuse what is not a float array here, where the file can still be named."""
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(
            f"the array in {where!r} must have dtype float32 or float64, got {describe(array)}; "
            "save it with .astype('float64')"
        )
    return array


def _missing(path: Path, name: str) -> Any:
    raise ValueError(f"file {str(path)!r} must hold an array named {name!r}")
