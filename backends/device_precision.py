"""How precise products of float32 matrices are on a device, and the less precise ones that tensor cores are faster at.

TF32 rounds both factors to 11 bits, bfloat16 to 8, and sums are in float32 either way. A bound that knows this may use
them; what has to be right to float32 may not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from dfmath.backends._compat import Array, is_cupy_array, is_torch_array

TF32, BFLOAT16 = 2.0**-11, 2.0**-8


class Setting(NamedTuple):
    """Where a library says what float32 products are made of: how to ask, to set, and the value for TF32."""

    get: Callable[[], Any]
    put: Callable[[Any], None]
    fast: Any


def factor_rounding(like: Array) -> float:
    """Return how far factors of float32 products are rounded, relatively, as the library is set: 0 for not at all."""
    if is_torch_array(like):
        import torch

        return {"highest": 0.0, "high": TF32}.get(torch.get_float32_matmul_precision(), BFLOAT16)
    if not is_cupy_array(like):
        return 0.0
    setting = _of_cupy()
    if setting is None:
        return TF32 if os.environ.get("CUPY_TF32", "0") not in ("", "0") else 0.0
    return TF32 if setting.get() == setting.fast else 0.0


@contextmanager
def tensor_cores(like: Array) -> Iterator[float]:
    """Let float32 products run on tensor cores within this block, where there are some; yields their factors' rounding.

    For CUDA devices. The setting is the process's own, as torch and CuPy have no other, and is put back.
    """
    setting = _of_torch(like) if is_torch_array(like) else _of_cupy() if is_cupy_array(like) else None
    if setting is None:
        yield factor_rounding(like)
        return
    before, slack = setting.get(), factor_rounding(like)
    setting.put(setting.fast)
    try:
        yield max(TF32, slack)
    finally:
        setting.put(before)


def _of_torch(like: Array) -> Setting | None:
    if like.device.type != "cuda":
        return None
    import torch

    place = torch.backends.cuda.matmul
    name, fast = ("fp32_precision", "tf32") if hasattr(place, "fp32_precision") else ("allow_tf32", True)
    return Setting(lambda: getattr(place, name), lambda value: setattr(place, name, value), fast)


def _of_cupy() -> Setting | None:
    """CuPy has a public word for this in the environment alone, read once; None where its private one has gone."""
    import numpy as np

    try:
        from cupy._core import _routines_linalg as place

        ask, put, fast = place.get_compute_type, place.set_compute_type, place.COMPUTE_TYPE_TF32
    except (ImportError, AttributeError):
        return None
    single = np.dtype(np.float32)
    return Setting(lambda: ask(single), lambda value: put(single, value), fast)
