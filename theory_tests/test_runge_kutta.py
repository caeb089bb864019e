"""The integrator alone: order of the pair, control by rows, and counts that are true."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.linalg import expm

from dfmath.runge_kutta import Block, Solution, _Rows, _stages, integrate, tableau


def _linear(rates: Any, rtol: float) -> Solution:
    """y' = rate y for each row."""
    rates = np.asarray(rates, dtype=np.float64)
    y = np.ones((len(rates), 1))

    def rate_of(t: Any, y: Any) -> Any:
        # Rows leave the batch as they finish: they are told apart by the rate that they carry as second coordinate.
        return y[:, 1:2]

    state = np.concatenate([y, rates[:, None]], axis=1)

    def drift(t: Any, y: Any) -> Any:
        return np.concatenate([rate_of(t, y) * y[:, :1], np.zeros_like(y[:, :1])], axis=1)

    def tangent(t: Any, y: Any, e: Any) -> Any:
        return rate_of(t, y) * e

    return integrate(drift, tangent, state, 0.0, 1.0, [Block(0, 1, 0.0)], rtol)


def test_tableau_satisfies_the_order_conditions() -> None:
    table = tableau()
    np.testing.assert_allclose(table.a.sum(axis=1), table.c, atol=1e-14)
    for order in range(1, 9):
        np.testing.assert_allclose(table.b @ table.c ** (order - 1), 1.0 / order, atol=1e-14)
    np.testing.assert_allclose(table.b @ table.a @ table.c, 1.0 / 6.0, atol=1e-14)
    np.testing.assert_allclose(table.b @ table.a @ table.a @ table.c, 1.0 / 24.0, atol=1e-14)


def test_exponentials() -> None:
    rates = [-5.0, -0.3, 0.0, 2.0]
    found = _linear(rates, 1e-10)
    np.testing.assert_allclose(found.state[:, 0], np.exp(rates), rtol=1e-9)
    assert np.all(np.abs(found.state[:, 0] - np.exp(rates)) <= np.abs(found.error[:, 0]) + 1e-14)


def test_rows_choose_their_own_steps() -> None:
    rates = [-40.0, -5.0, -0.1, 12.0]
    together = _linear(rates, 1e-9)
    assert together.evaluations[0] > 2 * together.evaluations[2]
    for row, rate in enumerate(rates):
        alone = _linear([rate], 1e-9)
        assert alone.evaluations[0] == together.evaluations[row]
        assert alone.state[0, 0] == together.state[row, 0]


def test_tighter_tolerances_cost_as_an_eighth_order_pair_does() -> None:
    counts = [_linear([-20.0], rtol).evaluations[0] for rtol in (1e-6, 1e-12)]
    # Steps grow as rtol^(-1/8): a factor 1e6 costs about 5.6 times; a fifth-order pair would cost 16 times.
    assert 2.0 < counts[1] / counts[0] < 9.0


def test_a_state_that_explodes_is_named() -> None:
    def drift(t: Any, y: Any) -> Any:
        return y**2 * 1e3

    with pytest.raises(RuntimeError, match="row 0"), np.errstate(all="ignore"):
        integrate(drift, lambda t, y, e: 2e3 * y * e, np.ones((1, 1)), 0.0, 1.0, [Block(0, 1, 0.0)], 1e-8)


def _fixed_step_error(steps: int) -> float:
    """Error of y' = A y over [0, 2] in equal steps, by the pair's own stages."""
    matrix = np.array([[-0.3, 2.0], [-2.0, 0.1]])
    y = np.array([[1.0, 0.5]])
    wanted = expm(2.0 * matrix) @ y[0]

    def drift(t: Any, y: Any) -> Any:
        return y @ matrix.T

    h, none = np.array([2.0 / steps]), np.zeros(1, dtype=np.int64)
    for i in range(steps):
        rows = _Rows(none, i * h, h, y, drift(None, y), np.zeros_like(y), none)
        y, _ = _stages(drift, rows, h, (i + 1) * h)
    return float(np.linalg.norm(y[0] - wanted))


def test_measured_order_is_eight() -> None:
    """Halving the step divides the error by 2^8."""
    errors = [_fixed_step_error(steps) for steps in (4, 8, 16)]
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(orders, 8.0, atol=0.3)


def test_error_weights_vanish_on_polynomials() -> None:
    """The embedded results have orders 5 and 3: their differences are blind to lower powers, and to no more."""
    table = tableau()
    nodes = np.append(table.c, 1.0)
    for weights, order in ((table.e5, 5), (table.e3, 3)):
        moments = [abs(float(weights @ nodes**k)) for k in range(order + 1)]
        assert max(moments[:order]) < 1e-13 < 1e-4 < moments[order]


def test_time_runs_backwards_and_stands_still() -> None:
    def drift(t: Any, y: Any) -> Any:
        return np.cos(t)[:, None] * np.ones_like(y)

    def tangent(t: Any, y: Any, e: Any) -> Any:
        return np.zeros_like(e)

    y = np.array([[1.0], [2.0]])
    back = integrate(drift, tangent, y, 2.0, -1.0, [Block(0, 1, 1e-12)], 1e-10)
    np.testing.assert_allclose(back.state, y + np.sin(-1.0) - np.sin(2.0), rtol=1e-10)
    still = integrate(drift, tangent, y, 2.0, 2.0, [Block(0, 1, 1e-12)], 1e-10)
    np.testing.assert_array_equal(still.state, y)


def test_the_worst_block_controls_the_step() -> None:
    """A fast second block costs steps, and what is in no block costs none."""

    def drift(t: Any, y: Any) -> Any:
        return np.stack([-y[:, 0], 30.0 * np.cos(30.0 * t)], axis=1)

    def tangent(t: Any, y: Any, e: Any) -> Any:
        return -e[:, :1]

    y = np.array([[1.0, 0.0]])
    alone, both = (
        integrate(drift, tangent, y, 0.0, 3.0, blocks, 1e-9)
        for blocks in ([Block(0, 1, 0.0)], [Block(0, 1, 0.0), Block(1, 2, 1e-9)])
    )
    assert both.evaluations[0] > 3 * alone.evaluations[0]
    np.testing.assert_allclose(both.state, [[np.exp(-3.0), np.sin(90.0)]], atol=1e-8)
