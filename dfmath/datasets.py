"""Real data to verify on: the embedded digits, and arrays from files."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np

from dfmath._checks import describe, on_behalf_of
from dfmath._checks import points as check_points

_UNREADABLE = (ValueError, OSError, EOFError, BadZipFile, zlib.error)


def digits() -> np.ndarray:
    """Return scikit-learn's handwritten digits, (1797, 64) float64, pixel values scaled from 0..16 to [-1, 1]."""
    from sklearn.datasets import load_digits

    pixels: np.ndarray = load_digits().data
    return pixels / 8.0 - 1.0


def load_points(path: str | Path) -> np.ndarray:
    """Read data points (N, d) from a ``.npy`` file, or the array ``points`` of an ``.npz``; pickles are refused."""
    points: np.ndarray = load_arrays(path, required=("points",))["points"]
    with on_behalf_of(f"file {str(path)!r}"):
        check_points("points", points)
    return points


def load_arrays(path: str | Path, required: tuple[str, ...], optional: Iterable[str] = ()) -> dict[str, Any]:
    """Read named arrays from an ``.npz`` file, or the first required one from a memory-mapped ``.npy``.

    Raises
    ------
    TypeError, ValueError
        If the file does not exist, is neither format, is damaged, holds pickled objects or other than floats, or lacks
        a required array.
    """
    path = _existing(path)
    try:
        loaded = _load(path)
    except _UNREADABLE as error:
        raise _unreadable(f"file {str(path)!r}", error) from None
    if isinstance(loaded, np.ndarray):
        return {required[0]: _plain(loaded, str(path))} if len(required) == 1 else _missing(path, required[1])
    with loaded:
        for name in required:
            if name not in loaded.files:
                _missing(path, name)
        wanted = [name for name in (*required, *optional) if name in loaded.files]
        return {name: _read(loaded, name, path) for name in wanted}


def holds_named_arrays(path: Any) -> bool:
    """Whether this is a file of several arrays, an ``.npz``, by what it begins with."""
    if not isinstance(path, str | os.PathLike) or not str(path) or not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(2) == b"PK"


def _existing(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be the name of a .npy or .npz file, got {describe(path)}")
    if not str(path):
        raise ValueError("path must name a .npy or .npz file, got an empty name")
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"path must name a .npy or .npz file, got {str(path)!r}, which {what}")
    return path


def _load(path: Path) -> Any:
    """Open the file by what it begins with, not by its name."""
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(b"\x80"):
        raise ValueError("pickled object")
    if not start.startswith((b"\x93NUMPY", b"PK")):
        raise ValueError("another kind of file")
    if start.startswith(b"PK") and not is_zipfile(path):
        raise BadZipFile
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _unreadable(what: str, error: Exception) -> ValueError:
    """Say why NumPy could not read it; its own words are about pickle whatever the reason is."""
    if "object" in str(error).lower():
        reason = "pickled objects are refused"
    elif "another kind" in str(error):
        reason = (
            "got another kind of file; of text with commas below one line of names, numpy.save('points.npy', "
            "numpy.loadtxt(FILE, delimiter=',', skiprows=1)) makes one"
        )
    else:
        reason = "got one that is damaged, cut short or not readable"
    return ValueError(f"{what} must hold numbers in NumPy's formats, .npy or .npz: {reason}")


def _read(archive: Any, name: str, path: Path) -> Any:
    try:
        array = archive[name]
    except _UNREADABLE as error:
        raise _unreadable(f"array {name!r} in file {str(path)!r}", error) from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"array {name!r} in file {str(path)!r} must be a NumPy array, got {describe(array)}")
    if name == "covariances" and array.ndim == 0 and array.dtype.kind == "f":
        return float(array)
    return _plain(array, f"{path}:{name}")


def _plain(array: np.ndarray, where: str) -> np.ndarray:
    """Refuse what is not a float array here, where the file can still be named."""
    if array.dtype not in (np.float32, np.float64):
        came = f"one of shape {array.shape} and dtype {array.dtype}"
        hint = "; numpy.save(FILE, array.astype('float64')) converts it" if array.dtype.kind in "biuf" else ""
        raise TypeError(f"the array in {where!r} must have dtype float32 or float64, got {came}{hint}")
    return array


def _missing(path: Path, name: str) -> Any:
    raise ValueError(f"file {str(path)!r} must hold an array named {name!r}, got none of that name")
