"""Every public call at its door: bad input is refused in one sentence, unusual but good input is served."""

from __future__ import annotations

import math
import re
import traceback
import warnings
from pathlib import Path

import array_api_strict
import numpy as np
import pytest
import torch

import dfmath
from dfmath import GaussianMixture, LowRank, PointMasses, bounds, datasets, transport
from dfmath import backends as dfmath_backends
from dfmath.approximations import (
    EndpointFisher,
    GaussianFisher,
    hutchinson_trace,
    hutchpp_trace,
    local_loss_trace,
    trace_matching,
)
from dfmath.approximations.endpoint import VARIANTS
from dfmath.flow import log_likelihood, probability_flow
from dfmath.predictions import convert
from dfmath.schedules import EDM, VE, VP, Discrete, FlowMatching, schedule_by_name
from dfmath.theorems.run import noise_levels, select
from dfmath.transport import ot_check

PACKAGE = (Path(dfmath.__file__).parent, Path(dfmath_backends.__file__).parent)
ELSEWHERE = array_api_strict.Device("device1")

POINTS = np.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
X = np.asarray([[0.1, 0.2], [0.3, 0.4]])
FULL = np.stack([np.eye(2)] * 3)
PRIOR = PointMasses(POINTS)
MIXTURE = GaussianMixture(POINTS, np.asarray([1.0, 2.0, 3.0]))
Q = PRIOR.diffuse(1.0, 0.5)
F = Q.fisher(X)
SPAN = F.span()
WIDE = 2_000_000  # the dense Fisher of one point would take 29 TiB
TORCH = torch.asarray(POINTS)
TORCH_PRIOR, STRICT_PRIOR = PointMasses(TORCH), PointMasses(array_api_strict.asarray(POINTS))
TORCH_X, STRICT_X = torch.asarray(X), array_api_strict.asarray(X)


SINGLE = X.astype(np.float32)


def single(sigma):
    """The same in float32."""
    return PointMasses(POINTS.astype(np.float32)).diffuse(1.0, sigma)


def changed(array, index, value):
    """A copy with one entry that is another."""
    copy = np.array(array)
    copy[index] = value
    return copy


def use(name):
    with dfmath_backends.use(name):
        pass


def numba_on_torch():
    with dfmath_backends.use("numba"):
        TORCH_PRIOR.diffuse(1.0, 1.0).score(TORCH_X)


def points_with_nan_in_the_last_row():
    rows = 2**22 + 5  # more than are looked at together
    return changed(np.zeros((rows, 1), dtype=np.float32), (-1, 0), np.nan)


def wide_fisher():
    return PointMasses(np.zeros((1, WIDE))).diffuse(1.0, 1.0).fisher(np.zeros((1, WIDE)))


def wide_full_rank():
    """Of components with variances of their own: no form of low rank is looked for."""
    return GaussianMixture(np.zeros((2, WIDE)), np.ones(2)).diffuse(1.0, 1.0).fisher(np.zeros((1, WIDE)))


def one_point_covariance():
    """Zero: the posterior of one point is that point."""
    return PointMasses(POINTS[:1]).diffuse(1.0, 1.0).fisher(X).posterior_covariance()


# Name, call, kind of exception, and what its one sentence must say: the argument, what was expected, what came.
BAD = [
    # PointMasses
    ("points-1d", lambda: PointMasses(POINTS[:, 0]), ValueError, "^points", r"\(N, d\)", r"\(3,\)", "leading axis"),
    ("points-3d", lambda: PointMasses(POINTS[None]), ValueError, "^points", r"\(N, d\)", r"\(1, 3, 2\)"),
    ("points-0d", lambda: PointMasses(np.float64(1.5)), ValueError, "^points", r"\(N, d\)", r"numpy.float64 1\.5"),
    ("points-list", lambda: PointMasses([[0.0]]), TypeError, "^points", "array", "got list", "numpy.asarray"),
    ("points-tuple", lambda: PointMasses(((0.0,),)), TypeError, "^points", "array", "got tuple", "numpy.asarray"),
    ("points-none", lambda: PointMasses(None), TypeError, "^points", "array", "got NoneType"),
    ("points-name", lambda: PointMasses("digits"), TypeError, "^points", "array", "got str 'digits'"),
    ("points-integer", lambda: PointMasses(POINTS.astype(int)), TypeError, "^points", "float64", "dtype int64"),
    ("points-boolean", lambda: PointMasses(POINTS > 0), TypeError, "^points", "float64", "dtype bool"),
    ("points-complex", lambda: PointMasses(POINTS + 0j), TypeError, "^points", "float64", "dtype complex128"),
    ("points-object", lambda: PointMasses(POINTS.astype(object)), TypeError, "^points", "float64", "dtype object"),
    ("points-half", lambda: PointMasses(POINTS.astype(np.float16)), TypeError, "^points", "float64", "dtype float16"),
    ("points-swapped", lambda: PointMasses(POINTS.astype(">f8")), TypeError, "^points", "float64", "dtype >f8"),
    ("points-bfloat16", lambda: PointMasses(TORCH.bfloat16()), TypeError, "^points", "float64", "torch.bfloat16"),
    ("points-masked", lambda: PointMasses(np.ma.masked_less(POINTS, 1)), TypeError, "^points", "plain", "MaskedArray"),
    ("points-sparse", lambda: PointMasses(TORCH.to_sparse()), TypeError, "^points", "dense", "torch.sparse_coo"),
    ("points-meta", lambda: PointMasses(TORCH.to("meta")), ValueError, "^points", "hold values", "device meta"),
    ("points-nan", lambda: PointMasses(changed(POINTS, (2, 1), np.nan)), ValueError, "^points", "finite", "row 2$"),
    ("points-inf", lambda: PointMasses(changed(POINTS, (0, 0), np.inf)), ValueError, "^points", "finite", "row 0$"),
    (
        *("points-last-row", lambda: PointMasses(points_with_nan_in_the_last_row()), ValueError),
        *("^points", "finite", "row 4194308$"),
    ),
    ("points-none-at-all", lambda: PointMasses(np.zeros((0, 2))), ValueError, "^points", "at least one", r"\(0, 2\)"),
    ("points-no-dimension", lambda: PointMasses(np.zeros((2, 0))), ValueError, "^points", "at least one", r"\(2, 0\)"),
    # Weights
    (
        "weights-negative",
        lambda: PointMasses(POINTS, np.asarray([1.0, -2, 1])),
        ValueError,
        "^weights",
        "got -2.*row 1",
    ),
    ("weights-nan", lambda: PointMasses(POINTS, np.asarray([1, 1, np.nan])), ValueError, "^weights", "finite", "row 2"),
    ("weights-inf", lambda: PointMasses(POINTS, np.asarray([np.inf, 1, 1])), ValueError, "^weights", "finite", "row 0"),
    (
        "weights-zero",
        lambda: PointMasses(POINTS, np.zeros(3)),
        ValueError,
        "^weights",
        "positive",
        "got zero for all 3",
    ),
    ("weights-short", lambda: PointMasses(POINTS, np.ones(2)), ValueError, "^weights", r"\(3,\)", r"\(2,\)"),
    ("weights-2d", lambda: PointMasses(POINTS, np.ones((3, 1))), ValueError, "^weights", r"\(3,\)", r"\(3, 1\)"),
    ("weights-list", lambda: PointMasses(POINTS, [1.0, 1.0, 1.0]), TypeError, "^weights", "array", "got list"),
    ("weights-integer", lambda: PointMasses(POINTS, np.ones(3, int)), TypeError, "^weights", "float64", "int64"),
    ("weights-scalar", lambda: PointMasses(POINTS, 1.0), TypeError, "^weights", "array", r"got float 1\.0"),
    ("weights-namespace", lambda: PointMasses(POINTS, torch.ones(3)), TypeError, "^weights", "numpy", "torch.Tensor"),
    (
        *("weights-device", lambda: PointMasses(TORCH, torch.ones(3, device="meta")), ValueError),
        *("^weights", r"device of points \(cpu\)", "got meta"),
    ),
    (
        "weights-twice",
        lambda: PointMasses(POINTS, np.ones(3), np.ones(3)),
        ValueError,
        "weights and log_weights",
        "both",
    ),
    (
        *("log-weights-nan", lambda: PointMasses(POINTS, log_weights=np.asarray([0, 0, np.nan])), ValueError),
        *("^log_weights", "finite or -inf", "got nan in row 2"),
    ),
    (
        *("log-weights-none", lambda: PointMasses(POINTS, log_weights=np.full(3, -np.inf)), ValueError),
        *("^log_weights", "positive weight", "got zero"),
    ),
    # GaussianMixture and LowRank
    ("means-1d", lambda: GaussianMixture(POINTS[0], 1.0), ValueError, "^means", r"\(K, d\)", r"\(2,\)"),
    ("means-nan", lambda: GaussianMixture(np.nan * POINTS, 1.0), ValueError, "^means", "finite", "row 0"),
    (
        "covariance-negative",
        lambda: GaussianMixture(POINTS, -1.0),
        ValueError,
        "^covariances",
        "non-negative",
        "got -1$",
    ),
    ("covariance-nan", lambda: GaussianMixture(POINTS, math.nan), ValueError, "^covariances", "finite", "got nan$"),
    (
        "covariance-name",
        lambda: GaussianMixture(POINTS, "full"),
        TypeError,
        "^covariances",
        "LowRank",
        "got str 'full'",
    ),
    ("covariance-none", lambda: GaussianMixture(POINTS, None), TypeError, "^covariances", "LowRank", "got NoneType"),
    ("covariance-true", lambda: GaussianMixture(POINTS, True), TypeError, "^covariances", "scalar", "got bool True"),
    ("covariance-complex", lambda: GaussianMixture(POINTS, 1j), TypeError, "^covariances", "scalar", "got complex"),
    ("covariance-list", lambda: GaussianMixture(POINTS, [1.0] * 3), TypeError, "^covariances", "got list", "asarray"),
    ("covariance-int", lambda: GaussianMixture(POINTS, np.ones(3, int)), TypeError, "^covariances", "float64", "int64"),
    (
        "covariance-shared",
        lambda: GaussianMixture(POINTS, np.eye(2)),
        ValueError,
        "^covariances",
        r"\(3, 2, 2\)",
        r"got .* \(2, 2\) ",
    ),
    (
        *("covariance-4d", lambda: GaussianMixture(POINTS, FULL[None]), ValueError),
        *("^covariances", r"\(3, 2, 2\)", r"got .* shape \(1, 3, 2, 2\)"),
    ),
    (
        *("variance-negative", lambda: GaussianMixture(POINTS, np.asarray([1.0, 1.0, -3.0])), ValueError),
        *("^covariances", "non-negative", "got -3 in component 2"),
    ),
    (
        *("variances-nan", lambda: GaussianMixture(POINTS, changed(np.ones((3, 2)), (1, 1), np.nan)), ValueError),
        *("^covariances", "finite", "got nan in component 1"),
    ),
    (
        *("covariance-asymmetric", lambda: GaussianMixture(POINTS, changed(FULL, (1, 0, 1), 0.5)), ValueError),
        *("^covariances", "symmetric", "asymmetry 0.5 in component 1"),
    ),
    (
        *("covariance-indefinite", lambda: GaussianMixture(POINTS, changed(FULL, (2, 0, 0), -1.0)), ValueError),
        *("^covariances", "positive semidefinite", "eigenvalue -1 in component 2"),
    ),
    (
        *("covariance-infinite", lambda: GaussianMixture(POINTS, changed(FULL, (2, 0, 0), np.inf)), ValueError),
        *("^covariances", "finite", "component 2"),
    ),
    (
        "covariance-namespace",
        lambda: GaussianMixture(POINTS, TORCH),
        TypeError,
        "^covariances",
        "numpy",
        "torch.Tensor",
    ),
    (
        *("low-rank-diagonal", lambda: GaussianMixture(POINTS, LowRank(-POINTS, np.ones((3, 2, 1)))), ValueError),
        *(r"^covariances\.diagonal", "non-negative", "got -1 in component 1"),
    ),
    (
        *("low-rank-shape", lambda: GaussianMixture(POINTS, LowRank(POINTS, np.ones((3, 2)))), ValueError),
        *(r"^covariances\.factors", r"\(3, 2, r\)", r"\(3, 2\)"),
    ),
    (
        *("low-rank-nan", lambda: GaussianMixture(POINTS, LowRank(POINTS, np.full((3, 2, 1), np.nan))), ValueError),
        *(r"^covariances\.factors", "finite", "component 0"),
    ),
    (
        *("low-rank-list", lambda: GaussianMixture(POINTS, LowRank([[1.0]], FULL)), TypeError),
        *(r"^covariances\.diagonal", "array", "got list"),
    ),
    (
        *("low-rank-namespace", lambda: GaussianMixture(POINTS, LowRank(POINTS, torch.asarray(FULL))), TypeError),
        *(r"^covariances\.factors", "numpy", "torch.Tensor"),
    ),
    # Noise levels
    ("alpha-zero", lambda: PRIOR.diffuse(0.0, 1.0), ValueError, "^alpha", "positive", "got 0$"),
    ("alpha-negative", lambda: PRIOR.diffuse(-1.0, 1.0), ValueError, "^alpha", "positive", "got -1$"),
    ("alpha-complex", lambda: PRIOR.diffuse(1j, 1.0), TypeError, "^alpha", "number", "got complex 1j"),
    (
        "alpha-numpy-complex",
        lambda: PRIOR.diffuse(np.complex128(1j), 1.0),
        TypeError,
        "^alpha",
        "float64",
        "complex128",
    ),
    ("alpha-true", lambda: PRIOR.diffuse(True, 1.0), TypeError, "^alpha", "number", "got bool True"),
    ("alpha-numpy-true", lambda: PRIOR.diffuse(np.bool_(True), 1.0), TypeError, "^alpha", "float64", "numpy.bool"),
    ("alpha-text", lambda: PRIOR.diffuse("1", 1.0), TypeError, "^alpha", "number", "got str '1'"),
    ("alpha-list", lambda: PRIOR.diffuse([1.0], 1.0), TypeError, "^alpha", "array", "got list"),
    ("alpha-2d", lambda: PRIOR.diffuse(np.ones((2, 1)), 1.0), ValueError, "^alpha", r"\(B,\)", r"\(2, 1\)"),
    ("alpha-object", lambda: PRIOR.diffuse(np.array(None), 1.0), TypeError, "^alpha", "float64", "object"),
    ("alpha-huge", lambda: PRIOR.diffuse(10**400, 1.0), ValueError, "^alpha", "representable", "got an integer"),
    ("alpha-namespace", lambda: PRIOR.diffuse(torch.ones(()), 1.0), TypeError, "^alpha", "numpy", "torch.Tensor"),
    (
        *("alpha-device", lambda: TORCH_PRIOR.diffuse(torch.ones((), device="meta"), 1.0), ValueError),
        *("^alpha", r"device of prior \(cpu\)", "got meta"),
    ),
    ("sigma-zero-on-points", lambda: PRIOR.diffuse(1.0, 0.0), ValueError, "^sigma", "positive", "got 0$"),
    ("sigma-negative", lambda: MIXTURE.diffuse(1.0, -1.0), ValueError, "^sigma", "zero or positive", "got -1$"),
    (
        "sigma-nan",
        lambda: PRIOR.diffuse(1.0, np.asarray([1.0, np.nan])),
        ValueError,
        "^sigma",
        "finite",
        "nan in row 1",
    ),
    ("sigma-inf", lambda: PRIOR.diffuse(1.0, math.inf), ValueError, "^sigma", "finite", "got inf"),
    ("points-huge", lambda: PointMasses(changed(POINTS, (1, 0), 1e80)), ValueError, "^points", "1e.70", "row 1$"),
    ("x-huge", lambda: PRIOR.diffuse(1.0, 1.0).score(changed(X, (1, 0), -1e80)), ValueError, "^x", "1e.70", "row 1$"),
    (
        "alpha-and-data",
        lambda: PRIOR.diffuse(1e150, 1e-70),
        ValueError,
        "^alpha times the data",
        "at most 1e",
        "alpha 1e",
    ),
    (
        "alpha-and-large-data",
        lambda: PointMasses(1e60 * POINTS).diffuse(1e100, 1.0),
        ValueError,
        "^alpha times the data",
        "at most 1e",
        "alpha 1e",
    ),
    ("alpha-over-sigma", lambda: PRIOR.diffuse(1e20, 1e-70), ValueError, "^alpha/", "at most 1e", "got 1e"),
    (
        "float32-sigma-tiny",
        lambda: single(1e-21).score(SINGLE),
        ValueError,
        "^x has dtype float32",
        "cannot",
        "float64",
    ),
    ("float32-sigma-huge", lambda: single(1e25).score(SINGLE), ValueError, "^x has dtype float32", "cannot", "float64"),
    (
        "float32-trace",
        lambda: single(6e-20).fisher(SINGLE).trace(),
        ValueError,
        "^results must be representable",
        "float32",
        "float64",
    ),
    (
        "float32-log-density",
        lambda: single(1e-19).log_density(100 * SINGLE),
        ValueError,
        "^results must be representable",
        "float32",
        "float64",
    ),
    ("sigma-too-small-for-data", lambda: PRIOR.diffuse(1.0, 1e-80), ValueError, "^sigma", "from 1e-70", "got 1e-80"),
    ("theorem-number", lambda: select([1.2]), TypeError, "^theorem", "builtins.str", "float 1.2"),
    ("levels-text", lambda: noise_levels("high"), TypeError, "^rho_max", "real number", "str 'high'"),
    ("levels-count", lambda: noise_levels(2.0, 1.0, 0), ValueError, "^count", "positive integer", "int 0"),
    ("sigma-tiny", lambda: PRIOR.diffuse(1.0, 1e-200), ValueError, "^sigma", "representable", "got 1e-200"),
    ("sigma-integer", lambda: PRIOR.diffuse(1.0, np.asarray([1, 2])), TypeError, "^sigma", "float64", "int64"),
    (
        *("sigma-device", lambda: STRICT_PRIOR.diffuse(1.0, array_api_strict.ones(2, device=ELSEWHERE)), ValueError),
        *("^sigma", r"device of prior \(.*CPU_DEVICE", "got .*device1"),
    ),
    ("levels-differ", lambda: PRIOR.diffuse(np.ones(2), np.ones(3)), ValueError, "alpha and sigma", "got 2 and 3"),
    ("mass-one", lambda: PRIOR.diffuse(1.0, 1.0, 1.0), ValueError, "^tolerance", r"\[0, 1\)", "got 1$"),
    ("mass-nan", lambda: PRIOR.diffuse(1.0, 1.0, math.nan), ValueError, "^tolerance", r"\[0, 1\)", "got nan"),
    ("mass-text", lambda: PRIOR.diffuse(1.0, 1.0, "0"), TypeError, "^tolerance", "number", "got str '0'"),
    # Queries at one noise level each, and elsewhere than the prior
    ("x-rows", lambda: PRIOR.diffuse(np.ones(3), 1.0).score(X), ValueError, "^x", "3 rows", r"\(2, 2\)"),
    (
        *("x-on-meta", lambda: TORCH_PRIOR.diffuse(1.0, 1.0).score(TORCH_X.to("meta")), ValueError),
        *("^x", r"device of prior \(cpu\)", "got meta"),
    ),
    (
        *("x-on-device1", lambda: STRICT_PRIOR.diffuse(1.0, 1.0).fisher(STRICT_X.to_device(ELSEWHERE)), ValueError),
        *("^x", r"device of prior \(.*CPU_DEVICE", "got .*device1"),
    ),
    # The Fisher as an operator
    ("v-1d", lambda: F.matvec(X[0]), ValueError, "^v", r"\(2, 2\)", r"got .* \(2,\)"),
    ("v-rows", lambda: F.matvec(np.ones((3, 2))), ValueError, "^v", r"\(2, 2\)", r"got .* \(3, 2\)"),
    ("v-nan", lambda: F.matvec(changed(X, (1, 0), np.nan)), ValueError, "^v", "finite", "row 1"),
    ("v-integer", lambda: F.matvec(X.astype(int)), TypeError, "^v", "float64", "int64"),
    ("v-namespace", lambda: F.matvec(TORCH_X), TypeError, "^v", "numpy", "torch.Tensor"),
    (
        "v-device",
        lambda: TORCH_PRIOR.diffuse(1.0, 1.0).fisher(TORCH_X).matvec(TORCH_X.to("meta")),
        ValueError,
        "^v",
        "meta",
    ),
    ("V-2d", lambda: F @ X, ValueError, "^V", r"\(2, 2, k\)", r"got .* \(2, 2\) "),
    ("V-dimension", lambda: F @ np.ones((2, 3, 2)), ValueError, "^V", r"\(2, 2, k\)", r"got .* \(2, 3, 2\)"),
    ("V-list", lambda: F @ [[[1.0]]], TypeError, "^V", "array", "got list"),
    ("solve-list", lambda: F.solve([[1.0, 0.0]]), TypeError, "^v", "array", "got list"),
    ("solve-none", lambda: F.solve(None), TypeError, "^v", "array", "got NoneType"),
    ("solve-inf", lambda: F.solve(changed(X, (0, 0), np.inf)), ValueError, "^v", "finite", "row 0"),
    ("solve-singular", lambda: one_point_covariance().solve(X), ValueError, "^solve", "not singular", "row 0"),
    ("scipy-negative", lambda: F.to_scipy(-1), ValueError, "^i ", "below 2", "got int -1"),
    ("scipy-too-large", lambda: F.to_scipy(2), ValueError, "^i ", "below 2", "got int 2"),
    ("scipy-float", lambda: F.to_scipy(0.0), ValueError, "^i ", "index", r"got float 0\.0"),
    ("scipy-true", lambda: F.to_scipy(True), ValueError, "^i ", "index", "got bool True"),
    (
        "dense-too-large",
        lambda: wide_fisher().to_dense(),
        ValueError,
        "dense matrices",
        "GiB here",
        "2000000 x 2000000",
    ),
    ("eigh-too-large", lambda: wide_fisher().eigh(), ValueError, "eigenvectors", "GiB here", "2000000 x 2000000"),
    (
        "eigvalsh-too-large",
        lambda: wide_full_rank().eigvalsh(),
        ValueError,
        "dense matrices",
        "GiB here",
        "2000000 x 2000000",
    ),
    # The span
    ("form-unknown", lambda: F.span("dta"), ValueError, "^form", "data, centred, orthonormal", "'dta'", "mean 'data'"),
    ("form-none", lambda: F.span(None), ValueError, "^form", "data, centred, orthonormal", "got NoneType"),
    (
        "form-data",
        lambda: MIXTURE.diffuse(1.0, 1.0).fisher(X).span("data"),
        ValueError,
        "^form 'data'",
        "point masses",
        "got a mixture",
    ),
    (
        *(
            "form-centred",
            lambda: GaussianMixture(POINTS, FULL).diffuse(1.0, 1.0).fisher(X).span("centred"),
            ValueError,
        ),
        *("^form 'centred'", "one scalar covariance", "got other covariances"),
    ),
    ("span-tolerance", lambda: F.span("data", 0.1), ValueError, "^tolerance", "must be 0", r"got 0\.1"),
    ("span-negative", lambda: F.span("orthonormal", -1.0), ValueError, "^tolerance", r"\[0, 1\)", "got -1"),
    ("span-text", lambda: F.span("orthonormal", "0"), TypeError, "^tolerance", "number", "got str '0'"),
    ("span-too-large", lambda: wide_full_rank().span(), ValueError, "dense matrices", "GiB here", "2000000"),
    ("span-v-rows", lambda: SPAN.matvec(np.ones((3, 2))), ValueError, "^v", r"\(2, 2\)", r"got .* \(3, 2\)"),
    ("span-v-list", lambda: SPAN.matvec([[1.0, 0.0]]), TypeError, "^v", "array", "got list"),
    ("span-v-complex", lambda: SPAN.matvec(X + 0j), TypeError, "^v", "float64", "complex128"),
    ("span-v-namespace", lambda: SPAN.matvec(TORCH_X), TypeError, "^v", "numpy", "torch.Tensor"),
    # Samples
    ("n-zero", lambda: PRIOR.sample(0, 0), ValueError, "^n ", "positive integer", "got int 0"),
    ("n-float", lambda: Q.sample(2.0, 0), ValueError, "^n ", "positive integer", r"got float 2\.0"),
    ("n-true", lambda: Q.sample_posterior(X, True, 0), ValueError, "^n ", "positive integer", "got bool True"),
    ("n-levels", lambda: PRIOR.diffuse(np.ones(3), 1.0).sample(2, 0), ValueError, "^n ", "must be 3", "got 2"),
    ("n-huge", lambda: PRIOR.sample(10**12, 0), ValueError, "samples", "GiB here", "1000000000000 x 2", "smaller n"),
    ("n-huge-posterior", lambda: Q.sample_posterior(X, 10**12, 0), ValueError, "samples", "GiB here", "1000000000000"),
    ("seed-negative", lambda: PRIOR.sample(2, -1), ValueError, "^seed", "non-negative integer", "got int -1"),
    ("seed-none", lambda: Q.sample(2, None), ValueError, "^seed", "non-negative integer", "got NoneType"),
    ("seed-true", lambda: Q.sample_posterior(X, 2, np.bool_(True)), ValueError, "^seed", "integer", "got numpy.bool"),
    (
        "seed-generator",
        lambda: Q.sample(2, np.random.default_rng(0)),
        ValueError,
        "^seed",
        "integer",
        "got .*Generator",
    ),
    # The flow
    (
        "flow-prior-array",
        lambda: probability_flow(POINTS, X, 1.0, 0.5),
        TypeError,
        "^prior",
        "Prior",
        "got numpy.ndarray",
    ),
    ("flow-prior-marginal", lambda: probability_flow(Q, X, 1.0, 0.5), TypeError, "^prior", "Prior", "got .*Marginal"),
    ("flow-start-zero", lambda: probability_flow(PRIOR, X, 0.0, 1.0), ValueError, "^start", "positive", "got 0$"),
    ("flow-end-nan", lambda: probability_flow(PRIOR, X, 1.0, math.nan), ValueError, "^end", "finite", "got nan$"),
    (
        "flow-end-tiny",
        lambda: probability_flow(PRIOR, X, 1.0, 1e-300),
        ValueError,
        "^end",
        "representable",
        "got 1e-300$",
    ),
    ("flow-start-text", lambda: probability_flow(PRIOR, X, "1", 0.5), TypeError, "^start", "number", "got str '1'"),
    ("flow-start-array", lambda: probability_flow(PRIOR, X, np.ones(2), 0.5), TypeError, "^start", "number", r"\(2,\)"),
    (
        *("flow-time-late", lambda: probability_flow(PRIOR, X, 1.5, 0.5, VP.linear()), ValueError),
        *("^start", r"\[0.0, 1.0\]", r"got 1\.5"),
    ),
    (
        *("flow-time-noise", lambda: probability_flow(PRIOR, X, 1.0, 0.5, FlowMatching()), ValueError),
        *("^start", "alpha = 0", r"got 1\.0"),
    ),
    (
        *("flow-time-data", lambda: probability_flow(PRIOR, X, 0.5, 0.0, VP.linear(), native=True), ValueError),
        *(r"^rho\(end\)", "positive", "got 0"),
    ),
    ("flow-time-edm", lambda: probability_flow(PRIOR, X, 1.0, 0.0, EDM()), ValueError, "^end", "0.002", r"got 0\.0"),
    (
        "flow-schedule-name",
        lambda: probability_flow(PRIOR, X, 0.9, 0.5, "vp"),
        TypeError,
        "^schedule",
        "Schedule",
        "'vp'",
    ),
    (
        "flow-schedule-class",
        lambda: probability_flow(PRIOR, X, 0.9, 0.5, VE),
        TypeError,
        "^schedule",
        "Schedule",
        "class VE",
    ),
    (
        "flow-native",
        lambda: probability_flow(PRIOR, X, 1.0, 0.5, native=True),
        ValueError,
        "native",
        "schedule",
        "None",
    ),
    ("flow-rtol-zero", lambda: probability_flow(PRIOR, X, 1.0, 0.5, rtol=0.0), ValueError, "^rtol", r"1\)", "got 0$"),
    (
        "flow-rtol-true",
        lambda: probability_flow(PRIOR, X, 1.0, 0.5, rtol=True),
        TypeError,
        "^rtol",
        "number",
        "bool True",
    ),
    (
        "flow-atol-negative",
        lambda: probability_flow(PRIOR, X, 1.0, 0.5, atol=-1.0),
        ValueError,
        "^atol",
        "zero",
        "got -1$",
    ),
    (
        "flow-atol-inf",
        lambda: probability_flow(PRIOR, X, 1.0, 0.5, atol=math.inf),
        ValueError,
        "^atol",
        "finite",
        "got inf",
    ),
    ("likelihood-end", lambda: log_likelihood(PRIOR, X, 0.5, -2.0), ValueError, "^end", "positive", "got -2$"),
    ("likelihood-end-none", lambda: log_likelihood(PRIOR, X, 0.5, None), TypeError, "^end", "number", "got NoneType"),
    # Transport
    ("ot-prior", lambda: ot_check(POINTS), TypeError, "^prior", "Prior", "got numpy.ndarray"),
    (
        "ot-swapped",
        lambda: ot_check(PRIOR, 1.0, 2.0),
        ValueError,
        "rho_min and rho_max",
        "rho_min < rho_max",
        "got 2 and 1",
    ),
    ("ot-zero", lambda: ot_check(PRIOR, 1.0, 0.0), ValueError, "^rho_min", "positive", "got 0$"),
    ("ot-text", lambda: ot_check(PRIOR, "80"), TypeError, "^rho_max", "number", "got str '80'"),
    ("ot-start", lambda: ot_check(PRIOR, start="gauss"), ValueError, "^start", "marginal, gaussian", "mean 'gaussian'"),
    ("ot-n", lambda: ot_check(PRIOR, n=0), ValueError, "^n ", "positive integer", "got int 0"),
    ("ot-n-huge", lambda: ot_check(PRIOR, n=10**9), ValueError, "transport costs", "GiB here", "smaller n"),
    (
        "ot-seed",
        lambda: ot_check(PRIOR, 2.0, 1.0, n=2, seed=-1, start="gaussian"),
        ValueError,
        "^seed",
        "integer",
        "int -1",
    ),
    ("ot-schedule", lambda: ot_check(PRIOR, n=2, schedule="vp"), TypeError, "^schedule", "Schedule", "got str 'vp'"),
    (
        "ot-range",
        lambda: ot_check(PRIOR, 200.0, 1.0, n=2, schedule=VE()),
        ValueError,
        "^rho_max",
        "lie in",
        r"got 200\.0",
    ),
    ("ot-tolerance", lambda: ot_check(PRIOR, tolerance=1e-8), ValueError, "^tolerance", "100 rtol", "got 1e-08"),
    ("ot-rtol", lambda: ot_check(PRIOR, rtol=math.nan), ValueError, "^rtol", r"1\)", "got nan"),
    ("jacobian-2d", lambda: transport.asymmetry(np.eye(2)), ValueError, "^jacobian", r"\(B, d, d\)", r"\(2, 2\)"),
    (
        *("jacobian-oblong", lambda: transport.min_eigenvalue(np.ones((1, 2, 3))), ValueError),
        *("^jacobian", r"\(B, d, d\)", r"\(1, 2, 3\)"),
    ),
    ("jacobian-list", lambda: transport.asymmetry_offdiagonal([[1.0]]), TypeError, "^jacobian", "array", "got list"),
    ("pairs-differ", lambda: transport.transport_gap(X, POINTS), ValueError, "^ends", r"\(2, 2\)", r"got .* \(3, 2\)"),
    ("pairs-nan", lambda: transport.transport_gap(X, np.nan * X), ValueError, "^ends", "finite", "row 0"),
    # Backends, theorems and schedules by name
    (
        "backend-unknown",
        lambda: use("numbo"),
        ValueError,
        "^backend",
        "array-api, device, numba",
        "'numbo'",
        "mean 'numba'",
    ),
    (
        "backend-case",
        lambda: use("Numba"),
        ValueError,
        "^backend",
        "array-api, device, numba",
        "'Numba'",
        "mean 'numba'",
    ),
    ("backend-none", lambda: use(None), ValueError, "^backend", "array-api, device, numba", "got None"),
    ("backend-list", lambda: use(["numba"]), ValueError, "^backend", "array-api, device, numba", "got .'numba'"),
    ("backend-arrays", numba_on_torch, TypeError, "^backend 'numba'", "NumPy arrays", "got torch.Tensor"),
    ("theorem-unknown", lambda: select(["1.99"]), ValueError, "^theorem", "a number such", "'1.99'", "did you mean"),
    ("schedule-unknown", lambda: schedule_by_name("sub-vp"), ValueError, "^name", "edm", "'sub-vp'", "mean 'subvp'"),
    ("schedule-case", lambda: schedule_by_name("EDM"), ValueError, "^name", "one of", "'EDM'", "mean 'edm'"),
    ("schedule-none", lambda: schedule_by_name(None), ValueError, "^name", "one of", "got NoneType"),
    # Schedules
    ("beta-text", lambda: VP.linear("0.1"), TypeError, "^beta_min", "real number", "got str '0.1'"),
    ("beta-complex", lambda: VP.linear(np.complex128(1j)), TypeError, "^beta_min", "real number", "complex128"),
    ("beta-true", lambda: VP.linear(np.bool_(True)), TypeError, "^beta_min", "real number", "got numpy.bool"),
    ("beta-order", lambda: VP.linear(2.0, 1.0), ValueError, "beta_min and beta_max", "<=", r"beta_max=1\.0"),
    ("sigma-order", lambda: VE(1.0, 0.5), ValueError, "sigma_min and sigma_max", "<", r"sigma_max=0\.5"),
    ("time-integer", lambda: VE()(np.asarray([0, 1])), TypeError, "^t ", "real floating", "int64"),
    ("time-complex", lambda: VE().drift(np.asarray([0.5j])), TypeError, "^t ", "real floating", "complex128"),
    ("time-masked", lambda: VE()(np.ma.masked_less([0.1, 0.5], 0.2)), TypeError, "^t ", "plain", "MaskedArray"),
    ("time-meta", lambda: VE()(torch.ones(2, device="meta")), ValueError, "^t ", "hold values", "device meta"),
    ("time-outside", lambda: VE().rho(np.asarray([0.5, 1.5])), ValueError, "^t ", r"\[0.0, 1.0\]", r"1\.5 at index 1"),
    ("time-huge", lambda: VE()(10**400), ValueError, "^t ", "representable", "got an integer"),
    ("ratio-outside", lambda: VE().time(1e3), ValueError, "^rho ", "lie in", r"got 1000\.0"),
    (
        "table-ragged",
        lambda: Discrete([[0.9], [0.5, 0.1]]),
        ValueError,
        "^alphas_cumprod",
        "one-dimensional",
        "lengths",
    ),
    ("table-none", lambda: Discrete(None), TypeError, "^alphas_cumprod", "one-dimensional", "got NoneType"),
    ("table-text", lambda: Discrete([0.9, "0.1"]), TypeError, "^alphas_cumprod", "real numbers", "got dtype"),
    ("table-meta", lambda: Discrete(torch.ones(2, device="meta")), ValueError, "^alphas_cumprod", "values", "meta"),
    # Predictions
    (
        "convert-source",
        lambda: convert(X, X, 1.0, 1.0, "epsilon", "x0"),
        ValueError,
        "^source",
        "eps, score",
        "mean 'eps'",
    ),
    ("convert-target", lambda: convert(X, X, 1.0, 1.0, "eps", None), ValueError, "^target", "eps, score", "NoneType"),
    ("convert-value", lambda: convert(X.tolist(), X, 1.0, 1.0, "eps", "x0"), TypeError, "^value", "array", "got list"),
    (
        "convert-0d",
        lambda: convert(np.array(1.0), np.array(1.0), 1.0, 1.0, "eps", "x0"),
        ValueError,
        "^x ",
        "B",
        r"\(\)",
    ),
    ("convert-alpha", lambda: convert(X, X, True, 1.0, "eps", "x0"), TypeError, "^alpha", "number", "got bool True"),
    (
        "convert-sigma",
        lambda: convert(X, X, 1.0, -0.5, "eps", "x0"),
        ValueError,
        "^sigma",
        "not negative",
        r"got -0\.5",
    ),
    (
        *("convert-row", lambda: convert(X, X, np.asarray([1.0, math.inf]), 1.0, "eps", "x0"), ValueError),
        *("^alpha", "finite", "got inf: index 1"),
    ),
    ("convert-home", lambda: convert(TORCH_X, X, 1.0, 1.0, "eps", "x0"), TypeError, "^value", "numpy", "torch.Tensor"),
    (
        *(
            "convert-device",
            lambda: convert(TORCH_X, TORCH_X, torch.ones(2, device="meta"), 1.0, "eps", "x0"),
            ValueError,
        ),
        *("^alpha", r"device of x \(cpu\)", "got meta"),
    ),
    # Approximations
    (
        "moment-rows",
        lambda: trace_matching(np.ones(3), X, 1.0, 1.0),
        ValueError,
        "^second_moment",
        r"\(2,\)",
        r"\(3,\)",
    ),
    ("moment-sigma", lambda: trace_matching(np.ones(2), X, 1.0, 0.0), ValueError, "^sigma", "positive", "got 0$"),
    (
        *(
            "moment-device",
            lambda: trace_matching(torch.ones(2), TORCH_X, 1.0, torch.ones(2, device="meta")),
            ValueError,
        ),
        *("^sigma", r"device of mean \(cpu\)", "got meta"),
    ),
    ("loss-nan", lambda: local_loss_trace(np.asarray([1.0, np.nan]), 1.0, 2), ValueError, "^loss", "finite", "row 1"),
    ("loss-dim", lambda: local_loss_trace(np.ones(2), 1.0, 2.0), ValueError, "^dim", "positive integer", r"float 2\.0"),
    ("probes", lambda: hutchinson_trace(F, X, 1, 0), ValueError, "^probes", "at least 2", "got 1"),
    ("probes-like", lambda: hutchinson_trace(F, [[1.0]], 2, 0), TypeError, "^like", "array", "got list"),
    ("probes-home", lambda: hutchinson_trace(F, TORCH_X, 2, 0), TypeError, "^like", "numpy", "torch.Tensor"),
    ("probes-matrix", lambda: hutchinson_trace(np.eye(2), X, 2, 0), TypeError, "^matvec", "function", "numpy.ndarray"),
    (
        "probes-result",
        lambda: hutchinson_trace(lambda v: None, X, 2, 0),
        TypeError,
        "^matvec's result",
        "array",
        "NoneType",
    ),
    ("probes-law", lambda: hutchinson_trace(F, X, 2, 0, "normal"), ValueError, "^distribution", "gaussian", "'normal'"),
    ("shift-text", lambda: hutchpp_trace(F, X, 4, 0, "1"), TypeError, "^shift", "number", "got str '1'"),
    ("shift-inf", lambda: hutchpp_trace(F, X, 4, 0, math.inf), ValueError, "^shift", "finite", "got inf"),
    ("endpoint-shape", lambda: EndpointFisher(POINTS, X, 1.0, 1.0), ValueError, "^endpoint", r"\(2, 2\)", r"\(3, 2\)"),
    (
        "endpoint-dtype",
        lambda: EndpointFisher(np.float32(X), X, 1.0, 1.0),
        TypeError,
        "^endpoint",
        "float64",
        "float32",
    ),
    ("variant", lambda: EndpointFisher(X, X, 1.0, 1.0, "Centered"), ValueError, "^variant", "paper", "mean 'centred'"),
    (
        *("trace-missing", lambda: EndpointFisher(X, X, 1.0, 1.0, "calibrated"), ValueError),
        *("^posterior_trace", "be given", "got none"),
    ),
    (
        "spectrum-2d",
        lambda: GaussianFisher(X, None, 1.0, 1.0),
        ValueError,
        "^covariance_eigenvalues",
        r"\(r,\)",
        r"\(2, 2\)",
    ),
    (
        "spectrum-negative",
        lambda: GaussianFisher(-X[0], None, 1.0, 1.0),
        ValueError,
        "^covariance_eig",
        "zero",
        r"-0\.1",
    ),
    (
        "basis",
        lambda: GaussianFisher(X[0], X, 1.0, 1.0),
        ValueError,
        "^basis",
        "orthonormal",
        "off the identity by about",
    ),
    # Bounds
    ("bound-negative", lambda: bounds.weight_factor(-1.0), ValueError, "^logit_error", "zero or positive", "got -1"),
    ("bound-none", lambda: bounds.weight_factor(None), TypeError, "^logit_error", "number", "got NoneType"),
    (
        "bound-complex",
        lambda: bounds.weight_factor(np.asarray([1j])),
        TypeError,
        "^logit_error",
        "float64",
        "complex128",
    ),
    ("bound-integer", lambda: bounds.weight_factor(np.asarray([1])), TypeError, "^logit_error", "float64", "int64"),
    ("bound-object", lambda: bounds.weight_factor(np.asarray([None])), TypeError, "^logit_error", "float64", "object"),
    (
        "bound-meta",
        lambda: bounds.weight_factor(torch.ones(2, device="meta")),
        ValueError,
        "^logit_error",
        "values",
        "meta",
    ),
    ("bound-sigma", lambda: bounds.endpoint_error(1.0, 0.0, 1.0, 0.0), ValueError, "^sigma", "positive", "got 0"),
    (
        *("bound-home", lambda: bounds.fisher_spectrum(X[0], TORCH_X[0], 1.0), TypeError),
        *("^alpha", "numpy", "torch.Tensor"),
    ),
    (
        *("bound-device", lambda: bounds.fisher_spectrum(TORCH_X[0], 1.0, TORCH_X[0].to("meta")), ValueError),
        *("^sigma", "hold values", "device meta"),
    ),
    (
        *("bound-shapes", lambda: bounds.fisher_spectrum(np.ones(2), np.ones(3), 1.0), ValueError),
        *("diameter, alpha", "broadcast", r"got \(2,\), \(3,\)"),
    ),
    ("bound-dim", lambda: bounds.local_loss_error(1.0, 1.0, 1.0, 2.5), ValueError, "^dim", "integer", r"float 2\.5"),
    ("omitted-none", lambda: bounds.omitted_mass(np.ones(2), None), TypeError, "^best_kept", "number", "got NoneType"),
    ("omitted-inf", lambda: bounds.omitted_mass(np.ones(2), math.inf), ValueError, "^best_kept", "finite", "infinity"),
    (
        *("omitted-shape", lambda: bounds.omitted_mass(np.ones((2, 3)), np.ones(3)), ValueError),
        *("best_kept", "broadcast", r"got \(2,\), \(3,\)"),
    ),
]


def assert_refused(call, kind, *fragments):
    """Our own raise statement, in one line that names the argument, what was expected and what came."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Exception) as caught:
            call()
    message, innermost = str(caught.value), traceback.extract_tb(caught.value.__traceback__)[-1]
    assert caught.type is kind, message
    assert "\n" not in message
    assert [f for f in fragments if not re.search(f, message)] == [], message
    assert set(PACKAGE) & set(Path(innermost.filename).parents), f"{message}: by accident, in {innermost.filename}"
    assert innermost.line.startswith("raise "), f"{message}: by accident, in {innermost.line}"


@pytest.mark.parametrize(("call", "kind", "fragments"), [pytest.param(*b[1:3], b[3:], id=b[0]) for b in BAD])
def test_bad_input_is_refused_in_one_sentence(call, kind, fragments):
    assert_refused(call, kind, *fragments)


METHODS = {
    "log_density": lambda x: Q.log_density(x),
    "score": lambda x: Q.score(x),
    "posterior_mean": lambda x: Q.posterior_mean(x),
    "fisher": lambda x: Q.fisher(x),
    "sample_posterior": lambda x: Q.sample_posterior(x, 2, 0),
    "probability_flow": lambda x: probability_flow(PRIOR, x, 1.0, 0.5),
    "log_likelihood": lambda x: log_likelihood(PRIOR, x, 0.5, 1.0),
}
BAD_QUERIES = {
    "1d": (X[0], ValueError, r"\(B, 2\)", r"got .* \(2,\)", "leading axis"),
    "3d": (X[None], ValueError, r"\(B, 2\)", r"got .* \(1, 2, 2\)"),
    "dimension": (np.ones((2, 3)), ValueError, r"\(B, 2\)", r"got .* \(2, 3\)"),
    "nan": (changed(X, (1, 0), np.nan), ValueError, "finite", "row 1$"),
    "inf": (changed(X, (0, 1), -np.inf), ValueError, "finite", "row 0$"),
    "list": (X.tolist(), TypeError, "array", "got list", "numpy.asarray"),
    "none": (None, TypeError, "array", "got NoneType"),
    "integer": (X.astype(int), TypeError, "float32 or float64", "int64"),
    "complex": (X + 0j, TypeError, "float32 or float64", "complex128"),
    "object": (X.astype(object), TypeError, "float32 or float64", "object"),
    "half": (X.astype(np.float16), TypeError, "float32 or float64", "float16"),
    "masked": (np.ma.masked_less(X, 0.2), TypeError, "plain numpy.ndarray", "MaskedArray"),
    "namespace": (TORCH_X, TypeError, r"namespace of prior \(numpy\)", "got torch.Tensor"),
}


@pytest.mark.parametrize("bad", BAD_QUERIES.values(), ids=BAD_QUERIES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_bad_queries_are_refused_by_every_method(method, bad):
    x, kind, *fragments = bad
    assert_refused(lambda: method(x), kind, "^x must", *fragments)


# Files. Each entry writes a file and returns its path.


def npy(folder, array, **options):
    np.save(folder / "data.npy", array, **options)
    return folder / "data.npy"


def npz(folder, **arrays):
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def raw(folder, content, name="data.npy"):
    (folder / name).write_bytes(content)
    return folder / name


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])
    return path


def flipped(path):
    """One bit of the data is another: the checksum says so."""
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    return path


BAD_FILES = [
    ("missing", lambda folder: folder / "nowhere.npy", ValueError, "^path", "nowhere.npy", "does not exist"),
    ("folder", lambda folder: folder, ValueError, "^path", ".npy or .npz", "is a folder"),
    ("none", lambda folder: None, TypeError, "^path", ".npy or .npz", "got NoneType"),
    ("array", lambda folder: POINTS, TypeError, "^path", ".npy or .npz", "got numpy.ndarray"),
    ("text", lambda folder: raw(folder, b"hello", "data.txt"), ValueError, "data.txt", "NumPy", "another kind of file"),
    ("text-in-npy", lambda folder: raw(folder, b"1.0, 2.0"), ValueError, "data.npy", "NumPy", "another kind of file"),
    ("empty", lambda folder: raw(folder, b""), ValueError, "data.npy", "NumPy", "another kind of file"),
    (
        "pickle",
        lambda folder: raw(folder, b"\x80\x04N."),
        ValueError,
        "data.npy",
        "NumPy",
        "pickled objects are refused",
    ),
    (
        *("pickled-npy", lambda folder: npy(folder, np.asarray([None, {}]), allow_pickle=True), ValueError),
        *("data.npy", "NumPy", "pickled objects are refused"),
    ),
    (
        *("pickled-npz", lambda folder: npz(folder, points=np.asarray([None, 1])), ValueError),
        *("'points' in file", "data.npz", "pickled objects are refused"),
    ),
    ("cut-npy", lambda folder: cut(npy(folder, POINTS), 8), ValueError, "data.npy", "NumPy", "damaged"),
    ("cut-npz", lambda folder: cut(npz(folder, points=POINTS), 30), ValueError, "data.npz", "NumPy", "damaged"),
    (
        *("flipped-npz", lambda folder: flipped(npz(folder, points=np.ones((50, 2)))), ValueError),
        *("'points' in file", "data.npz", "damaged"),
    ),
    ("no-points", lambda folder: npz(folder, x=POINTS), ValueError, "data.npz", "array named 'points'", "got none"),
    ("1d-npy", lambda folder: npy(folder, POINTS[0]), ValueError, "data.npy", "points", r"\(N, d\)", r"\(2,\)"),
    ("1d-npz", lambda folder: npz(folder, points=POINTS[0]), ValueError, "data.npz", "points", r"\(N, d\)", r"\(2,\)"),
    ("3d-npy", lambda folder: npy(folder, FULL), ValueError, "data.npy", "points", r"\(N, d\)", r"\(3, 2, 2\)"),
    ("no-rows", lambda folder: npy(folder, POINTS[:0]), ValueError, "data.npy", "points", "at least one", r"\(0, 2\)"),
    ("nan", lambda folder: npy(folder, np.nan * POINTS), ValueError, "data.npy", "points", "finite", "row 0"),
    ("integer", lambda folder: npy(folder, POINTS.astype(int)), TypeError, "data.npy", "float64", "int64", "astype"),
    ("half", lambda folder: npy(folder, np.float16(POINTS)), TypeError, "data.npy", "float64", "float16", "astype"),
]


@pytest.mark.parametrize("read", [datasets.load_points, PointMasses.from_file])
@pytest.mark.parametrize(("write", "kind", "fragments"), [pytest.param(*b[1:3], b[3:], id=b[0]) for b in BAD_FILES])
def test_bad_files_are_refused_by_name(write, kind, fragments, read, tmp_path):
    path = write(tmp_path)
    assert_refused(lambda: read(path), kind, *fragments)


BAD_PRIORS = [
    (
        "weights",
        lambda folder: npz(folder, points=POINTS, weights=np.ones(2)),
        PointMasses,
        "weights",
        r"\(3,\)",
        r"\(2,\)",
    ),
    ("both", lambda folder: npz(folder, points=POINTS, weights=X, log_weights=X), PointMasses, "weights", "both"),
    ("npy", lambda folder: npy(folder, POINTS), GaussianMixture, "array named 'covariances'", "got none"),
    ("means", lambda folder: npz(folder, covariances=POINTS), GaussianMixture, "array named 'means'", "got none"),
    (
        "psd",
        lambda folder: npz(folder, means=POINTS, covariances=-FULL),
        GaussianMixture,
        "semidefinite",
        "component 0",
    ),
]


@pytest.mark.parametrize(("write", "prior", "fragments"), [pytest.param(*b[1:3], b[3:], id=b[0]) for b in BAD_PRIORS])
def test_bad_priors_in_files_are_refused_by_name(write, prior, fragments, tmp_path):
    path = write(tmp_path)
    assert_refused(lambda: prior.from_file(path), ValueError, str(path), *fragments)


# Good input


def assert_same(result, expected):
    np.testing.assert_allclose(np.asarray(result), np.asarray(expected), rtol=1e-14, atol=1e-14)


def read_only(array, folder):
    array = array.copy()
    array.flags.writeable = False
    return array


def memory_mapped(array, folder):
    path = folder / f"{len(list(folder.iterdir()))}.npy"
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def fortran(array, folder):
    return np.asfortranarray(array)


def strided(array, folder):
    return np.repeat(np.repeat(array, 2, axis=0), 3, axis=1)[::2, ::3]


@pytest.mark.parametrize("backend", ["numba", "array-api"])
@pytest.mark.parametrize("layout", [read_only, memory_mapped, fortran, strided])
def test_any_layout_in_memory_gives_the_same(layout, backend, tmp_path):
    points, x = layout(POINTS, tmp_path), layout(X, tmp_path)
    with dfmath_backends.use(backend):
        q = PointMasses(points, layout(POINTS + 1.0, tmp_path)[:, 0]).diffuse(1.0, layout(X, tmp_path)[:, 0])
        plain = PointMasses(POINTS, POINTS[:, 0] + 1.0).diffuse(1.0, X[:, 0].copy())
        for name in ("log_density", "score", "posterior_mean"):
            assert_same(getattr(q, name)(x), getattr(plain, name)(X))
        assert_same(q.fisher(x).matvec(x), plain.fisher(X).matvec(X))
        assert_same(q.fisher(x).solve(x), plain.fisher(X).solve(X))


def test_files_that_are_good_make_the_priors_that_were_saved(tmp_path):
    assert_same(PointMasses.from_file(str(npy(tmp_path, POINTS))).points, POINTS)
    assert datasets.load_points(npy(tmp_path, np.float32(POINTS))).dtype == np.float32
    saved = npz(tmp_path, means=POINTS, covariances=np.float32(0.5), weights=np.ones(3))
    q = GaussianMixture.from_file(saved).diffuse(1.0, 0.5)
    assert_same(q.score(X), GaussianMixture(POINTS, 0.5).diffuse(1.0, 0.5).score(X))


@pytest.mark.parametrize("xp", [np, torch, array_api_strict], ids=["numpy", "torch", "strict"])
def test_float32_goes_in_and_float32_comes_out(xp):
    points, x = xp.asarray(POINTS, dtype=xp.float32), xp.asarray(X, dtype=xp.float32)
    for prior in (PointMasses(points), GaussianMixture(points, 1.0), GaussianMixture(points, points + 1.0)):
        q = prior.diffuse(1.0, 0.5)
        results = [q.log_density(x), q.score(x), q.posterior_mean(x), q.sample(2, 0), q.sample_posterior(x, 2, 0)]
        results += [q.fisher(x).trace(), q.fisher(x).to_dense(), probability_flow(prior, x, 1.0, 0.5).x]
        assert all(result.dtype == xp.float32 for result in results)


NUMBERS = [0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), np.asarray(0.5), np.float32([0.5])[0]]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: f"{type(n).__name__}-{getattr(n, 'dtype', '')}")
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_numbers_of_every_kind_are_the_same_number(number, library):
    put = {"numpy": np.asarray, "torch": torch.asarray}[library]
    points, x = put(POINTS), put(X)
    for prior, plain in [
        (PointMasses(points), PointMasses(points)),
        (GaussianMixture(points, number), GaussianMixture(points, 0.5)),
    ]:
        assert_same(prior.diffuse(number, number).score(x), plain.diffuse(0.5, 0.5).score(x))
        assert_same(prior.diffuse(1.0, 1.0, tolerance=number).score(x), plain.diffuse(1.0, 1.0, 0.5).score(x))
        assert_same(probability_flow(prior, x, 1.0, number).x, probability_flow(plain, x, 1.0, 0.5).x)
    assert_same(convert(x, x, number, number, "eps", "x0"), convert(x, x, 0.5, 0.5, "eps", "x0"))
    assert bounds.fisher_spectrum(number, 1.0, number) == bounds.fisher_spectrum(0.5, 1.0, 0.5)
    assert VE(number) == VE(0.5)
    F = PointMasses(points).diffuse(1.0, 1.0).fisher(x)
    assert_same(hutchpp_trace(F, x, 4, 0, number).value, F.trace())


def test_levels_may_be_0d_arrays_of_the_prior_and_whole_numbers():
    for level in (torch.asarray(1.0), torch.asarray(1.0, dtype=torch.float64), 1, np.int64(1)):
        assert_same(TORCH_PRIOR.diffuse(level, level).score(TORCH_X), PRIOR.diffuse(1.0, 1.0).score(X))
        assert_same(GaussianMixture(TORCH, level).diffuse(1.0, 1.0).score(TORCH_X), PRIOR.diffuse(1.0, 2**0.5).score(X))


def test_whole_numbers_may_be_numpys():
    one, seed = np.int64(1), np.uint8(3)
    assert_same(Q.sample(np.int32(2), seed), Q.sample(2, 3))
    assert_same(Q.sample_posterior(X, one, seed), Q.sample_posterior(X, 1, 3))
    assert_same(F.to_scipy(one).matvec(X[1]), F.matvec(X)[1])
    assert_same(local_loss_trace(X[0], 1.0, one), local_loss_trace(X[0], 1.0, 1))


@pytest.mark.parametrize("name", ["weights", "log_weights", "points", "covariances", "diagonals", "alpha", "sigma"])
def test_what_requires_grad_goes_in_without_a_warning(name):
    value = {"points": TORCH, "diagonals": TORCH + 1.0, "alpha": torch.asarray(1.0), "covariances": torch.asarray(1.0)}
    value = value.get(name, torch.asarray([1.0, 2.0, 3.0] if "weights" in name else [1.0, 2.0])).double()
    value = value.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if name in ("covariances", "diagonals"):
            prior = GaussianMixture(TORCH, value)
        else:
            prior = PointMasses(**{"points": TORCH, name: value}) if name not in ("alpha", "sigma") else TORCH_PRIOR
        q = prior.diffuse(value if name == "alpha" else 1.0, value if name == "sigma" else 1.0)
        q.fisher(TORCH_X).error_bound()
        q.fisher(TORCH_X).span("orthonormal")
        q.log_density(TORCH_X).sum().backward()
    assert value.grad.isfinite().all() and (value.grad != 0).any()
    if name == "weights":  # the density does not change when all weights are scaled
        assert abs(float(value.grad @ value.detach())) < 1e-15


def test_everything_stays_on_a_device_that_is_not_the_default():
    points = array_api_strict.asarray(POINTS).to_device(ELSEWHERE)
    full = array_api_strict.asarray(FULL).to_device(ELSEWHERE)
    for prior in (PointMasses(points, points[:, 0] + 1.0), GaussianMixture(points, full)):
        q = prior.diffuse(1.0, points[:, 1] + 0.5)
        F = q.fisher(points)
        results = [q.log_density(points), q.score(points), q.sample(3, 0), q.sample_posterior(points, 2, 0)]
        results += [F.trace(), F.to_dense(), F.solve(points), F.error_bound(), F.span("orthonormal").vectors]
        results += [probability_flow(prior, points, 0.5, 0.4, VP.linear(), native=True).x]
        assert all(result.device == ELSEWHERE for result in results)


def test_a_flow_from_a_level_to_itself_moves_nothing():
    for start, schedule, native in [(1.0, None, False), (0.5, VP.linear(), False), (0.5, VP.linear(), True)]:
        flow = probability_flow(PRIOR, X, start, start, schedule, jacobian=True, log_density=True, native=native)
        assert_same(flow.x, X)
        assert_same(flow.jacobian, np.stack([np.eye(2)] * 2))
        assert_same(flow.log_density_change, np.zeros(2))


# An empty batch has empty answers.

EMPTY_KINDS = [("numpy", "numba"), ("numpy", "array-api"), ("torch", "array-api"), ("strict", "array-api")]
NAMESPACES = {"numpy": np, "torch": torch, "strict": array_api_strict}


@pytest.fixture(params=EMPTY_KINDS, ids="-".join)
def xp(request):
    library, backend = request.param
    with dfmath_backends.use(backend):
        yield NAMESPACES[library]


COVARIANCES = {
    "points": lambda put: None,
    "scalar": lambda put: 1.0,
    "scalars": lambda put: put(POINTS[:, 0] + 1.0),
    "diagonals": lambda put: put(POINTS),
    "full": lambda put: put(FULL),
    "low-rank": lambda put: LowRank(put(POINTS), put(FULL[:, :, :1])),
}


@pytest.mark.parametrize("levels", ["one-level", "a-level-each"])
@pytest.mark.parametrize("form", COVARIANCES)
def test_an_empty_batch_has_empty_answers(xp, form, levels):
    covariances = COVARIANCES[form](xp.asarray)
    points, x = xp.asarray(POINTS), xp.asarray(X[:0])
    prior = PointMasses(points) if covariances is None else GaussianMixture(points, covariances)
    q = prior.diffuse(1.0, 0.5 if levels == "one-level" else x[:, 0])
    shapes = [
        (q.log_density(x), (0,)),
        *[(result, (0, 2)) for result in (q.score(x), q.posterior_mean(x))],
        (q.sample_posterior(x, 3, 0), (0, 3, 2)),
    ]
    for operator in (q.fisher(x), q.fisher(x).posterior_covariance()):
        shapes += [(operator.trace(), (0,)), (operator.logdet(), (0,)), (operator.error_bound(), (0,))]
        shapes += [(operator.diagonal(), (0, 2)), (operator.eigvalsh(), (0, 2)), (operator.eigh()[1], (0, 2, 2))]
        shapes += [(operator.matvec(x), (0, 2)), (operator.solve(x), (0, 2)), (operator.to_dense(), (0, 2, 2))]
        shapes += [(operator @ xp.zeros((0, 2, 3), dtype=xp.float64), (0, 2, 3))]
    for name in {"points": ("data", "centred", "orthonormal"), "scalar": ("centred", "orthonormal")}.get(form, ()):
        span = q.fisher(x).span(name)
        shapes += [(span.matvec(x), (0, 2)), (span.trace(), (0,)), (span.to_dense(), (0, 2, 2))]
    assert [tuple(result.shape) for result, _ in shapes] == [shape for _, shape in shapes]
    assert all(result.dtype == xp.float64 for result, _ in shapes)


@pytest.mark.parametrize("native", [False, True])
def test_an_empty_batch_flows_nowhere(xp, native):
    prior, x, schedule = PointMasses(xp.asarray(POINTS)), xp.asarray(X[:0]), VP.linear()
    flow = probability_flow(prior, x, 0.9, 0.5, schedule, jacobian=True, log_density=True, native=native)
    likelihood = log_likelihood(prior, x, 0.5, 0.9, schedule)
    assert tuple(flow.x.shape) == (0, 2) and tuple(flow.jacobian.shape) == (0, 2, 2)
    for result in (flow.log_density_change, flow.evaluations, flow.error_estimate, likelihood.log_density):
        assert tuple(result.shape) == (0,)


def test_an_empty_batch_has_empty_approximations(xp):
    x, none = xp.asarray(X[:0]), xp.asarray(X[:0, 0])
    F = PointMasses(xp.asarray(POINTS)).diffuse(1.0, 1.0).fisher(x)
    results = [trace_matching(none, x, 1.0, none), local_loss_trace(none, 1.0, 2)]
    results += [hutchinson_trace(F, x, 3, 0).value, hutchpp_trace(F, x, 4, 0).standard_error]
    results += [GaussianFisher(xp.asarray(X[0]), None, 1.0, 1.0, none).kappa, bounds.omitted_mass(x, none)]
    results += [EndpointFisher(x, x, 1.0, none, v, none if v == "calibrated" else None).trace() for v in VARIANTS]
    results += [*bounds.fisher_spectrum(none, none, none), *VP.linear()(none), VE().time(none)]
    results += [transport.min_eigenvalue(F.to_dense()), transport.asymmetry(F.to_dense())]
    assert all(tuple(result.shape) == (0,) for result in results)
    assert tuple(convert(x, x, none, none, "eps", "x0").shape) == (0, 2)
