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
