"""How precise products of float32 matrices are on a device, and the less precise ones that tensor cores are faster at.

TF32 rounds both factors to 11 bits, bfloat16 to 8, and sums are in float32 either way. A bound that knows this may use
them; what has to be right to float32 may not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dfmath.backends._compat import Array, is_cupy_array, is_torch_array

TF32, BFLOAT16 = 2.0**-11, 2.0**-8


def factor_rounding(like: Array) -> float:
    """Return how far factors of float32 products are rounded, relatively, as the library is set: 0 for not at all."""
    if is_torch_array(like):
        import torch

        return {"highest": 0.0, "high": TF32}.get(torch.get_float32_matmul_precision(), BFLOAT16)
    return TF32 if is_cupy_array(like) and os.environ.get("CUPY_TF32", "0") not in ("", "0") else 0.0


@contextmanager
def tensor_cores(like: Array) -> Iterator[float]:
    """Let float32 products run on tensor cores within this block, where there are some; yields their factors' rounding.

    For torch on CUDA devices. The setting is the process's own, as torch has no other, and is put back.
    """
    if not is_torch_array(like) or like.device.type != "cuda":
        yield factor_rounding(like)
        return
    setting, name, fast = _torch_setting()
    before = getattr(setting, name)
    setattr(setting, name, fast)
    try:
        yield max(TF32, factor_rounding(like))
    finally:
        setattr(setting, name, before)


def _torch_setting() -> tuple[Any, str, Any]:
    """Where torch says what float32 products on CUDA devices are made of."""
    import torch

    setting = torch.backends.cuda.matmul
    return (setting, "fp32_precision", "tf32") if hasattr(setting, "fp32_precision") else (setting, "allow_tf32", True)
