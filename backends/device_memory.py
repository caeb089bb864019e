"""Tiles that become smaller where a device has no memory for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

from dfmath.backends._compat import Array, is_torch_array

Result = TypeVar("Result")

HALVINGS, LEAST = 8, 2**16  # of tiles, and numbers that a tile has at least
_halved: ContextVar[int] = ContextVar("dfmath_halved", default=0)


def room(most: int) -> int:
    """Return how many numbers a tile may hold, of that many where there is memory enough."""
    return max(min(most, LEAST), most >> _halved.get())


def with_room(work: Callable[[], Result], like: Array) -> Result:
    """Return what the work returns, with tiles halved until they fit; a warning says so.

    Raises
    ------
    MemoryError
        If the smallest tiles do not fit either.
    """
    for halvings in range(HALVINGS + 1):
        token = _halved.set(halvings)
        try:
            found = work()
        except _out_of_memory(like) as error:
            reason = " ".join(str(error).split())
        else:
            if halvings:
                warnings.warn(
                    f"device {like.device} had no room for the usual tiles: they are 1/{2**halvings} as large now",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return found
        finally:
            _halved.reset(token)
    raise MemoryError(
        f"device {like.device} must have room for tiles of {LEAST} numbers and a block of queries, got: "
        f"{reason}; give fewer queries at a time"
    )


def _out_of_memory(like: Array) -> type[BaseException]:
    """What the library raises where a device's memory is full."""
    if is_torch_array(like):
        import torch

        return torch.OutOfMemoryError
    import cupy

    found: type[BaseException] = cupy.cuda.memory.OutOfMemoryError
    return found
