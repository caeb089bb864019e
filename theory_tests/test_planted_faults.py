"""`dfmath verify` must fail when the source is wrong: faults are planted in a copy of the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FAULTS = {
    "sign of the Fisher term": (
        "backends/moments.py",
        "lambda within, between: within - between",
        "lambda within, between: within + between",
        "1.2b",
    ),
    "sign of the Fisher term in the flow": (
        "dfmath/flow.py",
        "weight[:, None, None] * fisher.product",
        "-weight[:, None, None] * fisher.product",
        "2.3",
    ),
    "a weight perturbed by 1e-6": (
        "dfmath/parameters.py",
        "    return Diagonal(points[None, ...], logs[None, :], still)",
        "    logs = logs.copy()\n    logs[0] += 1e-6\n    return Diagonal(points[None, ...], logs[None, :], still)",
        "1.3",
    ),
    "a weight perturbed by 1e-6 in the kernel": (
        "backends/sweep.py",
        "        w, n = logits[i] / mass, chosen[i]\n",
        "        w, n = logits[i] / mass * (1.0 + (1e-6 if i == 0 else 0.0)), chosen[i]\n",
        "1.3",
    ),
    "an error bound of zero": (
        "dfmath/rounding.py",
        "    return xp.where(bound <= float(xp.finfo(dtype).max), bound,",
        "    bound = 0.0 * moved\n    return xp.where(bound <= float(xp.finfo(dtype).max), bound,",
        "4.9b",
    ),
    "sign of the likelihood": (
        "dfmath/flow.py",
        "return Likelihood(terminal - flow.log_density_change,",
        "return Likelihood(terminal + flow.log_density_change,",
        "2.4",
    ),
    "sign of the Fisher term in the official experiment": (
        "dfmath/flow.py",
        "weight[:, None, None] * fisher.product",
        "-weight[:, None, None] * fisher.product",
        "3.5c",
    ),
    "a drift ten per cent off": (
        "dfmath/schedules/variance_preserving.py",
        "return -speed * xp.sin(speed * (t + self.s))",
        "return -1.1 * speed * xp.sin(speed * (t + self.s))",
        "2.1",
    ),
    "a squared diffusion of the other sign": (
        "dfmath/schedules/variance_preserving.py",
        "return -2.0 * self._drift(xp, t)",
        "return 2.0 * self._drift(xp, t)",
        "2.1b",
    ),
    "a Jacobian that a schedule's drift does not stretch": (
        "dfmath/flow.py",
        "turn = turn + stretch[:, None, None] * matrix",
        "pass",
        "3.3",
    ),
    "a density a hundredth of a nat off": (
        "dfmath/marginal.py",
        "lambda x, dtype: self.moments(x, dtype=dtype).log_mass, along, rows)",
        "lambda x, dtype: self.moments(x, dtype=dtype).log_mass + 0.01, along, rows)",
        "2.4c",
    ),
    "the published index with another factor": (
        "dfmath/transport.py",
        "xp.where(present, math.sqrt(2) * size, xp.ones_like(size))",
        "xp.where(present, 1.5 * size, xp.ones_like(size))",
        "3.5",
    ),
    "a span's trace without its vectors' lengths": (
        "dfmath/span.py",
        "xp.sum(self.coefficients * squares, axis=1)",
        "xp.sum(self.coefficients, axis=1)",
        "1.6",
    ),
    "an eighth of the squared diameter for a quarter": (
        "dfmath/bounds.py",
        "half = 0.5 * alpha / sigma * diameter",
        "half = 0.5**1.5 * alpha / sigma * diameter",
        "1.7",
    ),
    "a bound two per cent too small": (
        "dfmath/bounds.py",
        "return (inner * inner * inner * inner + outer * outer * outer * outer) ** 0.5",
        "return 0.98 * (inner * inner * inner * inner + outer * outer * outer * outer) ** 0.5",
        "4.5",
    ),
    "a variance halved": (
        "dfmath/bounds.py",
        "return 2.0 * (frobenius_squared - diagonal_squared_sum)",
        "return frobenius_squared - diagonal_squared_sum",
        "4.7",
    ),
    "a bound halved": (
        "dfmath/bounds.py",
        "return _at_most(omitted_mass, 1.0) * diameter, half",
        "return 0.5 * _at_most(omitted_mass, 1.0) * diameter, half",
        "4.8",
    ),
    "a diagonal of the wrong matrix": (
        "dfmath/operators.py",
        'return self._out(self.forms("diagonal").diagonal)',
        'return self._out(self.forms("diagonal").diagonal) * 1.001',
        "1.2e",
    ),
    "alpha squared by mistake": (
        "dfmath/marginal.py",
        'self.alpha = _checks.noise_array("alpha", alpha, home, zero_allowed=False)',
        'self.alpha = _checks.noise_array("alpha", alpha, home, zero_allowed=False) ** 2',
        "1.1b",
    ),
}


def _copy(folder: Path) -> Path:
    """The package as it is installed: one folder, whatever way this copy was installed."""
    shutil.copytree(ROOT / "dfmath", folder / "dfmath", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("backends", "integrations"):
        target = folder / "dfmath" / name
        shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _verify(folder: Path, *only: str, backend: str = "array-api") -> subprocess.CompletedProcess[str]:
    options = [word for number in only for word in ("--only", number)]
    # A few hundred points, and no kernels to compile where the fault is not in them.
    options += ["--limit", "300", "--backend", backend]
    command = [sys.executable, "-m", "dfmath", "verify", "--json", *options]
    # Without the repository on the path and before any installed copy: the folder's own package is imported.
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "NUMBA_CACHE_DIR": str(folder / "cache"),
        "NUMBA_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def _plant(folder: Path, file: str, right: str, wrong: str) -> None:
    path = folder / (file if file.startswith("dfmath/") else f"dfmath/{file}")
    source = path.read_text()
    assert source.count(right) == 1, f"{file} no longer holds what the fault replaces"
    path.write_text(source.replace(right, wrong))


IN_KERNELS = "a weight perturbed by 1e-6 in the kernel"  # that alone needs them, compiled anew


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=pytest.mark.slow) if name == IN_KERNELS else name for name in FAULTS]
)
def test_a_planted_fault_is_named(fault: str, tmp_path: Path) -> None:
    file, right, wrong, number = FAULTS[fault]
    folder = _copy(tmp_path)
    _plant(folder, file, right, wrong)
    done = _verify(folder, number, backend="numba" if fault == IN_KERNELS else "array-api")
    assert done.returncode == 1, done.stderr
    failed = [t["number"] for t in json.loads(done.stdout)["theorems"] if t["verdict"] == "fail"]
    assert failed == [number]


@pytest.mark.slow
def test_the_copy_passes_without_a_fault(tmp_path: Path) -> None:
    done = _verify(_copy(tmp_path), *(number for *_, number in FAULTS.values()))
    assert done.returncode == 0, done.stdout + done.stderr
