"""Fused kernels on CUDA devices: whether an array can have them, and how they are started.

CuPy compiles and launches them; torch tensors are lent to it without copies (DLPack), on torch's own stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from dfmath.backends._compat import Array, is_cupy_array, is_torch_array

SOURCE = Path(__file__).with_name("cuda_kernels.cu")
OPTIONS = ("-std=c++17", "-fmad=false")
THREADS, SPAN, SQUARES = 128, 4096, 3  # as in the source


def usable(array: Array) -> bool:
    """Whether kernels run on this array: a CuPy array, or a torch tensor on a CUDA device where CuPy is installed."""
    if is_cupy_array(array):
        return not _on_hip()
    return is_torch_array(array) and array.device.type == "cuda" and find_spec("cupy") is not None and not _on_hip()


@cache
def _on_hip() -> bool:
    import cupy

    return bool(cupy.cuda.runtime.is_hip)


def contiguous(array: Array) -> Array:
    """Return the array in C order, itself where it is."""
    if is_torch_array(array):
        return array.detach().contiguous()
    import cupy

    return cupy.ascontiguousarray(array)


def launch(name: str, grid: tuple[int, ...], *arguments: Any) -> None:
    """Start a kernel on blocks of THREADS threads.

    Parameters
    ----------
    name
        The kernel's.
    grid
        Numbers of blocks along each axis.
    arguments
        Arrays in C order, on one device; Python integers and floats.
    """
    arrays = [value for value in arguments if not isinstance(value, int | float)]
    with _stream_of(arrays[0]):
        _module().get_function(name)(grid, (THREADS,), tuple(map(_lent, arguments)))


def _lent(value: Any) -> Any:
    """What CuPy passes on: a view of an array, or a scalar of eight bytes."""
    if isinstance(value, int | float):
        return np.int64(value) if isinstance(value, int) else np.float64(value)
    import cupy

    return value if is_cupy_array(value) else cupy.from_dlpack(value)


@contextmanager
def _stream_of(array: Array) -> Iterator[None]:
    """Work in the order of the library that owns the array."""
    import cupy

    if is_cupy_array(array):
        with array.device:
            yield
        return
    import torch

    stream, number = torch.cuda.current_stream(array.device), array.device.index
    with cupy.cuda.Device(number), cupy.cuda.ExternalStream(stream.cuda_stream, number):
        yield


@cache
def _module() -> Any:
    """The compiled kernels; CuPy loads them on each device that asks."""
    import cupy

    return cupy.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=OPTIONS)
