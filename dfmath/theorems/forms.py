"""What an operator says of itself in its several forms [MATH 1.2]."""

from __future__ import annotations

from typing import Any

import numpy as np

from dfmath.operators import SymmetricOperator
from dfmath.theorems.case import QUERIES, Case
from dfmath.theorems.compare import relative
from dfmath.theorems.registry import NotApplicable, Outcome, theorem

_DIM = 128  # dense matrices are taken up to this dimension


@theorem(
    "1.2e", "One operator, many forms", r"F e_j,\ F_{jj},\ \mathrm{tr} F,\ \lambda(F),\ F^{-1} v", "linear algebra"
)
def forms(case: Case) -> Outcome:
    """Products with unit vectors against every other form of F and P, which are swept or decomposed on their own."""
    if case.dim > _DIM:
        raise NotApplicable(f"dense matrices are compared up to d = {_DIM}, and d = {case.dim}")
    operators = (case.fisher, case.fisher.posterior_covariance())
    return Outcome(max(_disagreement(case, operator) for operator in operators), case.precision, case.promise)


def _disagreement(case: Case, operator: SymmetricOperator) -> float:
    """The largest difference between forms, relative to the spectral norm (for inverses: times the condition)."""
    eye = np.broadcast_to(np.eye(case.dim), (QUERIES, case.dim, case.dim))
    matrix = case.host(operator @ case.model.build(eye))
    values = np.linalg.eigvalsh((matrix + matrix.swapaxes(1, 2)) / 2)
    size = np.abs(values).max(axis=1)
    size = np.maximum(size, float(np.finfo(case.model.dtype).tiny / np.finfo(case.model.dtype).eps))  # no denormals
    found, vectors = (case.host(part) for part in operator.eigh())
    rebuilt = (vectors * found[:, None, :]) @ vectors.swapaxes(1, 2)
    pairs = [
        (operator.to_dense(), matrix),
        (rebuilt, matrix),
        (operator.diagonal(), np.diagonal(matrix, axis1=1, axis2=2)),
        (operator.trace()[:, None] / case.dim, np.trace(matrix, axis1=1, axis2=2)[:, None] / case.dim),
        (operator.eigvalsh(), values),
    ]
    worst = max(relative(case.host(got), wanted, size) / case.dim**0.5 for got, wanted in pairs)
    return max(worst, _inverses(case, operator, matrix, values))


def _inverses(case: Case, operator: SymmetricOperator, matrix: Any, values: Any) -> float:
    """F (F^-1 v) and log det, for the rows whose eigenvalues are positive and within 1e4 of each other."""
    sound = values[:, 0] > 1e-4 * values[:, -1]
    if not sound.any():
        return 0.0
    i = int(sound.argmax())
    row, v = operator.row(i), case.v64[i]
    back = matrix[i] @ case.host(row.solve(case.v[i : i + 1, :]))[0] - v
    log_det = float(case.host(row.logdet())[0]) - float(np.log(values[i]).sum())
    return 1e-4 * max(float(np.linalg.norm(back) / np.linalg.norm(v)), abs(log_det) / case.dim)
