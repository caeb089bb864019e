"""The one file that imports the array-API compatibility layer."""

from __future__ import annotations

from typing import Any

import array_api_compat
from array_api_compat import (
    device,
    is_cupy_array,
    is_dask_array,
    is_jax_array,
    is_numpy_array,
    is_torch_array,
    size,
    to_device,
)

Array = Any
Namespace = Any

__all__ = [
    "Array",
    "Namespace",
    "accumulation_dtype",
    "array_namespace",
    "beside",
    "device",
    "from_numpy",
    "gather_rows",
    "has_no_values",
    "index_dtype",
    "is_cupy_array",
    "is_dask_array",
    "is_jax_array",
    "is_numpy_array",
    "is_torch_array",
    "numpy_namespace",
    "size",
    "to_device",
    "to_numpy",
]


def array_namespace(*arrays: Array) -> Namespace:
    """Return the array-API namespace that the arrays share."""
    return array_api_compat.array_namespace(*arrays)


def numpy_namespace() -> Namespace:
    """Return NumPy's array-API namespace."""
    import array_api_compat.numpy as xp

    return xp


def accumulation_dtype(xp: Namespace, like: Array) -> Any:
    """Return the widest real floating dtype the array's device computes in: float64 wherever it exists.

    JAX without its 64-bit mode and Apple's MPS device have none; sums are then kept in float32, and
    ``DiffusionFisher.error_bound`` says what that costs.
    """
    info = xp.__array_namespace_info__()
    kinds = info.dtypes(device=device(like), kind="real floating")
    return kinds.get("float64", xp.float32)


def index_dtype(like: Array) -> Any:
    """Return the integer dtype that indices have beside this array: int64, and int32 in JAX without its 64-bit mode."""
    return array_namespace(like).__array_namespace_info__().default_dtypes(device=device(like))["integral"]


def to_numpy(array: Array) -> Any:
    """Return the array's values as a NumPy array, detached and on the host."""
    import numpy as np

    if is_torch_array(array):
        return _torch_values(array)
    if is_numpy_array(array):
        return np.asarray(array)
    if is_jax_array(array):
        return np.asarray(array)
    try:
        return np.from_dlpack(to_device(array, "cpu"))
    except (ValueError, TypeError, AttributeError, BufferError):
        if hasattr(array, "get"):
            return array.get()
        # A namespace whose host has another name: where its arrays go by default.
        home = array_namespace(array).__array_namespace_info__().default_device()
        return np.asarray(to_device(array, home))


def _torch_values(tensor: Array) -> Any:
    """The values of a torch tensor; inside `torch.func.jvp` and `vjp` results have no memory of their own to see."""
    import numpy as np

    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except RuntimeError:
        return np.asarray(tensor.tolist()).reshape(tuple(tensor.shape))


def has_no_values(array: Array) -> str:
    """Say why there are no numbers to look at in a torch tensor on device meta or inside `vmap`; empty if there are."""
    if not is_torch_array(array):
        return ""
    if array.is_meta:
        return "on device meta"
    import torch

    # Public torch has no word for this; where the private one goes, vmap's own message remains.
    batched = getattr(getattr(torch._C, "_functorch", None), "is_batchedtensor", None)
    return "inside vmap: give the whole batch (B, d) instead" if batched is not None and batched(array) else ""


def from_numpy(values: Any, like: Array, dtype: Any = None) -> Array:
    """Return NumPy values as an array in the namespace, on the device and (unless given) in the dtype of `like`."""
    xp = array_namespace(like)
    return xp.asarray(values, dtype=like.dtype if dtype is None else dtype, device=device(like))


def beside(values: Any, like: Array) -> Array:
    """Return NumPy values in their own dtype, in the namespace and on the device of `like`."""
    return from_numpy(values, like, getattr(array_namespace(like), str(values.dtype)))


def gather_rows(array: Array, rows: Array) -> Array:
    """Return ``array[rows]`` along the first axis for a one-dimensional integer index."""
    return array_namespace(array).take(array, rows, axis=0)
