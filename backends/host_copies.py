"""Copies from the host to CUDA devices that run beside the work on what is there already.

Values go through pinned memory on a stream of their own. It begins when the work that was queued before has ended,
because memory for the copy may be what that work still reads, and it is the reading thread that waits for its end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from dfmath.backends._compat import Array, beside, is_cupy_array, is_torch_array


def on_the_callers_stream(work: Callable[[int], Any], like: Array) -> Callable[[int], Any]:
    """Return the work to be done by another thread, in this thread's order of work on the device of `like`."""
    streams = _streams(like)

    def done(i: int) -> Any:
        with ExitStack() as stack:
            for stream in streams():
                stack.enter_context(stream)
            return work(i)

    return done


def _streams(like: Array) -> Callable[[], tuple[AbstractContextManager[Any], ...]]:
    """What to enter in another thread: the device and stream that are current here."""
    if is_torch_array(like) and like.device.type == "cuda":
        import torch

        current = torch.cuda.current_stream(like.device)
        return lambda: (torch.cuda.stream(current),)
    if is_cupy_array(like):
        import cupy

        with like.device:
            stream = cupy.cuda.get_current_stream()
        return lambda: (like.device, stream)
    return tuple


def sent(values: Any, like: Array) -> Array:
    """Return NumPy values in their own dtype, in the namespace and on the device of `like`."""
    if is_torch_array(like) and like.device.type == "cuda":
        return _by_torch(values, like)
    return _by_cupy(values, like) if is_cupy_array(like) else beside(values, like)


def _by_torch(values: Any, like: Array) -> Array:
    import torch

    dtype, before = getattr(torch, str(values.dtype)), torch.cuda.current_stream(like.device)
    found = torch.empty(values.shape, dtype=dtype, device=like.device)
    pinned = torch.empty(values.shape, dtype=dtype, pin_memory=True)
    pinned.numpy()[...] = values
    copies = torch.cuda.Stream(like.device)
    copies.wait_stream(before)
    with torch.cuda.stream(copies):
        found.copy_(pinned, non_blocking=True)
    copies.synchronize()
    return found


def _by_cupy(values: Any, like: Array) -> Array:
    import cupy
    import cupyx

    with like.device:
        found = cupy.empty(values.shape, values.dtype)
        pinned = cupyx.empty_pinned(values.shape, values.dtype)
        pinned[...] = values
        copies = cupy.cuda.Stream(non_blocking=True)
        copies.wait_event(cupy.cuda.get_current_stream().record())
        found.set(pinned, stream=copies)
        copies.synchronize()
    return found
