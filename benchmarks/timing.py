"""Fair times of several ways to do one thing, the memory they need, and what machine it was."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], Any]

SHORT, BURST = 0.05, 0.1  # seconds: shorter calls are repeated for as long
REST = 0.3  # seconds before each call: threads of the call before, OpenBLAS's above all, go on waiting busily


def interleaved(
    calls: Mapping[str, Call], rounds: int, patience: float = 30.0, rest: float = REST
) -> dict[str, list[float]]:
    """Seconds of each call, once in every round, so that a slow spell of the machine hits all of them.

    A call that has used up `patience` seconds sits out the remaining rounds: its list is shorter, and says so. `rest`
    is for contenders that disturb each other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if sum(seconds[name]) < patience:
                time.sleep(rest)
                seconds[name].append(_awake(call))
    return seconds


def _awake(call: Call) -> float:
    """Seconds of a call; of a short one the median of some in a row: after a rest, threads take long to wake."""
    found = [_once(call)]
    while found[0] < SHORT and sum(found) < BURST:
        found.append(_once(call))
    return statistics.median(found[1:] or found)


def _once(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def peak_memory(call: Call) -> int | None:
    """Bytes by which the resident set grows, at most, during a call; None where the system does not tell."""
    if not Path("/proc/self/statm").exists():
        return None
    before, peak, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return peak[0]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sgemm_rate(n: int = 4096, rounds: int = 5) -> float:
    """Floating-point operations per second of NumPy's float32 matrix product, the best of a few."""
    a = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    return 2 * n**3 / min(interleaved({"sgemm": lambda: a @ a}, rounds)["sgemm"])


def bandwidth(size: int = 2**28, rounds: int = 5) -> float:
    """Bytes per second that one thread of NumPy moves in a copy, the best of a few."""
    source, target = np.ones(size // 8), np.zeros(size // 8)
    return 2 * size / min(interleaved({"copy": lambda: np.copyto(target, source)}, rounds)["copy"])


def machine() -> dict[str, Any]:
    """Processor, cores, commit and versions."""
    from dfmath.report import versions

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "commit": _commit(),
        "versions": {name: version for name, version in versions().items() if version is not None},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def _commit() -> str | None:
    """The commit of these sources; None where they lie in no repository, or installed in a folder of another's."""
    return _git("describe", "--always", "--dirty") if _git("ls-files", Path(__file__).name) else None


def _git(*command: str) -> str | None:
    try:
        found = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None
    return found.stdout.strip() or None


def write(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: an interruption leaves no half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def folder(path: str) -> Path:
    """Return a folder to write results to, made if need be; before the work, not after it."""
    found = Path(path)
    if not path or (found.exists() and not found.is_dir()):
        raise ValueError(f"output must name a folder, got {path!r}")
    found.mkdir(parents=True, exist_ok=True)
    return found
