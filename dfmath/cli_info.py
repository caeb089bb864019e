"""``dfmath info``: what is installed here."""

from __future__ import annotations

from typing import Any

from dfmath.console import Json


def info(json: Json = False) -> int:
    """Versions, array libraries, backends and devices."""
    import os

    from dfmath import backends, report

    versions, arrays = report.versions(), report.array_libraries()
    found = {name: version for name, version in versions.items() if version is not None}
    missing = [name for name, version in versions.items() if version is None]
    machine: dict[str, Any] = {"cpu cores": os.cpu_count(), "gpu": _gpus()}
    if json:
        kinds = {"backends": backends.available(), "array libraries": arrays}
        report.print_json({"versions": found, "not installed": missing, **kinds, **machine})
        return 0
    purposes = {
        "array-api": "array-api (any array library)",
        "device": "device (CuPy and torch)",
        "numba": "numba (compiled, for NumPy arrays)",
    }
    rows = found | {
        "not installed": ", ".join(missing) or "nothing is missing",
        "array libraries": ", ".join(arrays),
        "backends": ", ".join(purposes.get(name, name) for name in backends.available()),
        "cpu cores": machine["cpu cores"],
        **({f"gpu {i}": gpu for i, gpu in enumerate(machine["gpu"])} or {"gpu": "none found"}),
    }
    for name, value in rows.items():
        print(f"{name:18}{value}")
    return 0


def _gpus() -> list[str]:
    """Names and memory of the CUDA devices that torch or CuPy see, whichever is installed."""
    try:
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in found]
    except ImportError:
        pass
    try:
        import cupy

        kinds = [cupy.cuda.runtime.getDeviceProperties(i) for i in range(cupy.cuda.runtime.getDeviceCount())]
        return [f"{kind['name'].decode()}, {kind['totalGlobalMem'] / 2**30:.0f} GiB" for kind in kinds]
    except (ImportError, RuntimeError):  # no driver, or no device
        return []
