"""The package as it is installed: what importing it costs, and what it exports."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

import dfmath

HEAVY = ("numba", "torch", "matplotlib", "sklearn", "scipy", "jax", "cupy", "rich", "typer")


def test_import_is_light() -> None:
    code = f"import sys, dfmath; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_imported_later_is_there() -> None:
    """Exports and modules that are asked for after `import dfmath` alone, and nothing else."""
    names = [*dfmath.__all__, *dfmath._MODULES]
    code = "import sys, dfmath; assert not any(m.startswith('dfmath.theorems') for m in sys.modules)"
    code += f"; names = {names}; assert set(names) <= set(dir(dfmath))"
    code += "; print(*(getattr(dfmath, name).__name__ for name in names)); dfmath.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert [name.rpartition(".")[2] for name in done.stdout.split()] == names
    assert "AttributeError: module 'dfmath' has no attribute 'nothing'" in done.stderr


def test_exports_are_documented() -> None:
    for name in dfmath.__all__:
        assert getattr(dfmath, name).__doc__, name


def test_sklearn_mixtures_keep_their_density() -> None:
    from dfmath.integrations.sklearn import mixture_from_sklearn
    from sklearn.mixture import GaussianMixture

    points = np.random.default_rng(0).standard_normal((200, 3))
    for kind in ("spherical", "diag", "tied", "full"):
        fitted = GaussianMixture(2, covariance_type=kind, random_state=0).fit(points)
        q = mixture_from_sklearn(fitted).diffuse(1.0, 0.0)
        np.testing.assert_allclose(q.log_density(points[:5]), fitted.score_samples(points[:5]), rtol=1e-10)
