"""The integrator alone: order of the pair, control by rows, and counts that are true."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dfmath.runge_kutta import Block, Solution, integrate, tableau


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
    together = _linear([-40.0, -0.1], 1e-9)
    assert together.evaluations[0] > 2 * together.evaluations[1]
    for row, rate in enumerate([-40.0, -0.1]):
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
