"""Where a benchmark's arrays are, when what was asked of them is done, and how fast products are there."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
from dfmath.benchmarks.timing import interleaved, peak_memory, sgemm_rate

SIDE = 8192  # of the matrices whose product says what a device can do


class Place(ABC):
    """One kind of arrays on one device."""

    @abstractmethod
    def put(self, values: Any) -> Any:
        """Return NumPy values as arrays of this kind."""

    def finished(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return the call, ending when its results are there."""
        return call

    def peak_memory(self, call: Callable[[], Any]) -> int | None:
        """Bytes that the call needs beyond what is there, None where nobody tells."""
        return peak_memory(call)

    def about(self) -> dict[str, Any]:
        """Rates that times are held against; the first is what shares are of."""
        return {"sgemm flop/s": sgemm_rate()}


class Host(Place):
    """NumPy arrays."""

    def put(self, values: Any) -> Any:
        return values


class TorchHost(Place):
    """torch tensors of the CPU."""

    def put(self, values: Any) -> Any:
        import torch

        return torch.from_numpy(values)


class Cuda(Place):
    """torch tensors on a CUDA device."""

    def __init__(self) -> None:
        _needs_device("cuda", "torch")

    def put(self, values: Any) -> Any:
        import torch

        return torch.from_numpy(values).cuda()

    def finished(self, call: Callable[[], Any]) -> Callable[[], Any]:
        import torch

        def done() -> Any:
            found = call()
            torch.cuda.synchronize()
            return found

        return done

    def peak_memory(self, call: Callable[[], Any]) -> int | None:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.finished(call)()
        return int(torch.cuda.max_memory_allocated()) - before

    def about(self) -> dict[str, Any]:
        import torch

        with tensor_cores(False):
            plain = self._product_rate("float32")
        with tensor_cores(True):
            rounded = self._product_rate("float32")
        return {
            "sgemm flop/s": plain,
            "TF32 flop/s": rounded,
            "bfloat16 flop/s": self._product_rate("bfloat16"),
            "copy bytes/s": self._bandwidth(),
            "device": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "CUDA": torch.version.cuda,
        }

    def _product_rate(self, dtype: str) -> float:
        import torch

        a = torch.randn(SIDE, SIDE, device="cuda").to(getattr(torch, dtype))
        return 2 * SIDE**3 / self._best(lambda: a @ a)

    def _bandwidth(self) -> float:
        import torch

        source = torch.empty(2**28, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best(lambda: target.copy_(source))

    def _best(self, call: Callable[[], Any]) -> float:
        done = self.finished(call)
        done()
        return min(interleaved({"call": done}, 5)["call"])


class Cupy(Cuda):
    """CuPy arrays; torch measures the device and is among the peers, on the same memory."""

    def __init__(self) -> None:
        _needs_device("cupy", "torch", "cupy")

    def put(self, values: Any) -> Any:
        import cupy

        return cupy.asarray(values)

    def peak_memory(self, call: Callable[[], Any]) -> int | None:
        return None  # two libraries with a pool each


PLACES: dict[str, type[Place]] = {"numpy": Host, "torch": TorchHost, "cuda": Cuda, "cupy": Cupy}


def _needs_device(name: str, *libraries: str) -> None:
    missing = [library for library in libraries if importlib.util.find_spec(library) is None]
    if missing:
        raise ValueError(
            f"backend {name!r} needs {' and '.join(missing)}, which is not installed; pip install it first"
        )
    import torch

    if not torch.cuda.is_available():
        raise ValueError(f"backend {name!r} needs a CUDA device that torch sees, got none; 'dfmath info' lists devices")


@contextmanager
def tensor_cores(on: bool) -> Any:
    """Let torch round the factors of float32 products on CUDA devices to TF32, or not, within this block."""
    import torch

    place, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    place.allow_tf32 = on
    try:
        yield
    finally:
        place.allow_tf32 = before


def shared(values: Any) -> Any:
    """Return an array of any of these libraries as a torch tensor on the same memory."""
    import torch

    return torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.as_tensor(values)
