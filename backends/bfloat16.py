"""Products of all pairs in bfloat16 through torch, for bounds on CPUs that have matrix units for it (Intel's AMX).

bfloat16 has eight significant bits: u = 2^-8. Two factors are rounded to it, their products are summed in float32, and
the sum is rounded to it again, so |fl(a . b) - a . b| <= ((1 + u)^3 (1 + gamma_n) - 1) |a| |b| with gamma_n of float32.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from dfmath.backends.precision import ROUND_32, gamma
from numba import njit, prange

ROUND_16 = 2.0**-8
LEAST = 256  # dimensions from which a product costs more than rounding the points and widening the result


@cache
def matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones, and torch is there to ask it to."""
    described = Path("/proc/cpuinfo")
    if not described.exists() or "amx_bf16" not in described.read_text() or find_spec("torch") is None:
        return False
    import torch

    return bool(torch.backends.mkldnn.is_available())  # which sums in float32


def pays(dim: int) -> bool:
    """Whether products of vectors this long are worth asking for."""
    return dim >= LEAST and matrix_units()


def error(dim: int) -> float:
    """Bound |fl(a . b) - a . b| / (|a| |b|)."""
    return (1.0 + ROUND_16) ** 3 * (1.0 + gamma(dim + 8, ROUND_32)) - 1.0


def all_pairs(x: Any, points: Any, out: Any) -> None:
    """Fill in x . y for all pairs of rows, in the layout of `threaded.all_pairs`."""
    import torch

    rows, columns = (torch.from_numpy(_rounded(part)).view(torch.bfloat16) for part in (x, points))
    products = (rows @ columns.T).view(torch.int16).numpy().view(np.uint16)
    _widen(products, out.view(np.uint32))


@njit(cache=True, parallel=True, nogil=True)
def _round(words: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Bits of float32 to those of the nearest bfloat16, ties to even."""
    for n in prange(words.shape[0]):
        for j in range(words.shape[1]):
            word = np.uint32(words[n, j])
            up = np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
            out[n, j] = np.int16((word + up) >> np.uint32(16))


def _rounded(rows: Any) -> Any:
    out = np.empty(rows.shape, dtype=np.int16)
    _round(rows.view(np.uint32), out)
    return out


@njit(cache=True, parallel=True, nogil=True)
def _widen(words: Any, out: Any) -> None:  # pragma: no cover - compiled
    width = out.shape[2]
    for b in prange(out.shape[1]):
        for n in range(words.shape[1]):
            out[n // width, b, n % width] = np.uint32(words[b, n]) << np.uint32(16)
