"""An adaptive Runge-Kutta integrator for batches, with error control and step size of its own for every row.

The pair is Dormand and Prince's 8(5,3) in Hairer's form; its coefficients are the published ones that
`scipy.integrate.DOP853` carries. Steps are chosen on the host, states never leave their namespace and device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from dfmath.backends._compat import Array, array_namespace, from_numpy, index_dtype, to_numpy
from dfmath.backends.combination import combination

Drift = Callable[[Array, Array], Array]  # (t (b,), y (b, n)) -> dy/dt (b, n)
Tangent = Callable[
    [Array, Array, Array], Array
]  # (t (b,), y (b, n), e (b, m)) -> J e (b, m), of the first m coordinates

_ORDER = 8
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 8.0
_MAX_STEPS = 100_000


class Block(NamedTuple):
    """A range of coordinates whose error is measured together, as root mean square, against floor + rtol size.

    `size` (t (b,), block (b, m)) -> (b,) is the block's own root mean square unless given.
    """

    start: int
    stop: int
    floor: float
    size: Callable[[Array, Array], Array] | None = None


class _Tableau(NamedTuple):
    a: Any
    b: Any
    c: Any
    e3: Any
    e5: Any


@dataclass(frozen=True)
class Solution:
    """End states (B, n), evaluations of the drift (B,), and the transported sum of local errors (B, m)."""

    state: Array
    evaluations: Any
    error: Array


@dataclass(frozen=True)
class _Rows:
    """The rows still under way. Times and steps are on the host, states on the device."""

    index: Any  # which rows of the batch, host
    t: Any
    h: Any
    y: Array
    slope: Array
    error: Array
    evaluations: Any

    def take(self, keep: Any) -> _Rows:
        xp = array_namespace(self.y)
        at = from_numpy(np.flatnonzero(keep), self.y, index_dtype(self.y))
        device = {name: xp.take(getattr(self, name), at, axis=0) for name in ("y", "slope", "error")}
        host = {name: getattr(self, name)[keep] for name in ("index", "t", "h", "evaluations")}
        return _Rows(**host, **device)


@cache
def tableau() -> _Tableau:
    """Return the coefficients of the 8(5,3) pair."""
    from scipy.integrate import DOP853

    return _Tableau(DOP853.A, DOP853.B, DOP853.C, DOP853.E3, DOP853.E5)


def integrate(
    drift: Drift, tangent: Tangent, y: Array, start: float, end: float, blocks: list[Block], rtol: float
) -> Solution:
    """Integrate every row of y from `start` to `end`.

    Parameters
    ----------
    drift, tangent
        The right-hand side, and the product of its Jacobian with an error in the first block's coordinates.
    y
        (B, n) initial states.
    blocks
        Ranges of coordinates with the floors of their error norms; a row's error is its worst block's.
    rtol
        Local error per step, relative to the block's size.

    Raises
    ------
    RuntimeError
        If a row needs more than 100,000 steps, or its state stops being finite.
    """
    rows = _begin(drift, y, start, end, blocks, rtol)
    if not len(rows.index):
        return Solution(rows.y, rows.evaluations, rows.error)
    finished: list[_Rows] = []
    for _ in range(_MAX_STEPS):
        rows = _step(drift, tangent, rows, end, blocks, rtol)
        done = rows.t == end
        if done.any():
            finished.append(rows.take(done))
            if done.all():
                return _collect(finished)
            rows = rows.take(~done)
    raise RuntimeError(f"the flow of row {rows.index[0]} needs more than {_MAX_STEPS} steps; loosen rtol")


def integrate_evenly(drift: Drift, y: Array, start: float, end: float, steps: int, dim: int) -> Solution:
    """Integrate every row of y by equal steps of Kutta's classical method of order 4; its error is NaN, (B, dim).

    `drift` is as in `integrate`; four evaluations for each step.
    """
    xp, count, h = array_namespace(y), y.shape[0], (end - start) / steps
    for i in range(steps):
        t = xp.full_like(y[:, 0], start + i * h)
        a = drift(t, y)
        b = drift(t + 0.5 * h, y + 0.5 * h * a)
        c = drift(t + 0.5 * h, y + 0.5 * h * b)
        d = drift(t + h, y + h * c)
        y = y + (h / 6.0) * (a + 2.0 * b + 2.0 * c + d)
    return Solution(y, np.full(count, 4 * steps), xp.full_like(y[:, :dim], xp.nan))


def _begin(drift: Drift, y: Array, start: float, end: float, blocks: list[Block], rtol: float) -> _Rows:
    """Start with a step that moves the state by about one percent; the controller takes it from there."""
    xp, count = array_namespace(y), y.shape[0]
    t = np.full(count, float(start))
    slope = drift(from_numpy(t, y), y)
    # How many tolerances the state is worth, at most, and how many it moves by in a unit of time.
    speed = (_block_norms(slope, blocks) / _tolerances(t, y, blocks, rtol)).max(axis=1)
    h = np.minimum(0.01 / rtol / np.maximum(speed, 1e-300), 0.1 * abs(end - start))
    error = xp.zeros_like(y[:, blocks[0].start : blocks[0].stop])
    return _Rows(np.arange(count), t, np.sign(end - start) * h, y, slope, error, np.ones(count, dtype=np.int64))


def _step(drift: Drift, tangent: Tangent, rows: _Rows, end: float, blocks: list[Block], rtol: float) -> _Rows:
    """Try one step for every row; rows whose error is too large keep their state and get a smaller step."""
    last = np.abs(rows.h) >= np.abs(end - rows.t) * (1 - 1e-12)
    h = np.where(last, end - rows.t, rows.h)
    t_new = np.where(last, end, rows.t + h)
    y_new, slopes = _stages(drift, rows, h, t_new)
    ratio, local = _errors(rows, t_new, y_new, h, slopes, blocks, rtol)
    accept = ratio <= 1.0
    if not np.isfinite(ratio).all():
        row = rows.index[int(np.flatnonzero(~np.isfinite(ratio))[0])]
        raise RuntimeError(
            f"the flow of row {row}, or its Jacobian, is not finite; leave that row out, or check the noise levels"
        )
    factor = np.clip(_SAFETY * np.maximum(ratio, 1e-16) ** (-1.0 / _ORDER), _SHRINK, _GROW)
    error = _transport(tangent, rows, h, t_new, y_new, slopes[-1]) + local
    return replace(
        rows,
        t=np.where(accept, t_new, rows.t),
        h=h * np.where(accept, factor, np.minimum(factor, 1.0)),
        y=_choose(accept, y_new, rows.y),
        slope=_choose(accept, slopes[-1], rows.slope),
        error=_choose(accept, error, rows.error),
        evaluations=rows.evaluations + len(tableau().b),
    )


def _stages(drift: Drift, rows: _Rows, h: Any, t_new: Any) -> tuple[Array, list[Array]]:
    table, step = tableau(), from_numpy(h, rows.y)[:, None]
    slopes = [rows.slope]
    for i in range(1, len(table.b)):
        y = rows.y + step * combination(table.a[i, :i], slopes)
        slopes.append(drift(from_numpy(rows.t + table.c[i] * h, rows.y), y))
    y_new = rows.y + step * combination(table.b, slopes)
    slopes.append(drift(from_numpy(t_new, rows.y), y_new))
    return y_new, slopes


def _errors(
    rows: _Rows, t_new: Any, y_new: Array, h: Any, slopes: list[Array], blocks: list[Block], rtol: float
) -> tuple[Any, Array]:
    """Return Hairer's combined error of the worst block, and the fifth-order one of the first block's coordinates.

    The combined error is of the order of the result itself, and as often below its error as above; the fifth-order one
    is above it wherever steps are in the asymptotic range. The state's own rounding counts with it.
    """
    table, xp = tableau(), array_namespace(y_new)
    fifth = combination(table.e5, slopes)
    tolerance = np.maximum(_tolerances(rows.t, rows.y, blocks, rtol), _tolerances(t_new, y_new, blocks, rtol))
    e5 = _block_norms(fifth, blocks) / tolerance
    e3 = _block_norms(combination(table.e3, slopes), blocks) / tolerance
    total = np.sqrt(e5**2 + 0.01 * e3**2)
    damping = np.divide(e5, total, out=np.zeros_like(e5), where=total != 0)
    first = slice(blocks[0].start, blocks[0].stop)
    local = from_numpy(h, y_new)[:, None] * fifth[:, first]
    rounding = float(xp.finfo(y_new.dtype).eps) * xp.abs(y_new[:, first])
    return (np.abs(h)[:, None] * e5 * damping).max(axis=1), local + xp.sign(local) * rounding


def _transport(tangent: Tangent, rows: _Rows, h: Any, t_new: Any, y_new: Array, slope_new: Array) -> Array:
    """Carry the error made so far along the flow's own linearisation, by the classical fourth-order rule.

    The state halfway is that of the cubic through both ends and their slopes.
    """
    t, e, step = rows.t, rows.error, from_numpy(h, rows.y)[:, None]
    y_half = 0.5 * (rows.y + y_new) + 0.125 * step * (rows.slope - slope_new)

    def along(when: Any, y: Array, error: Array) -> Array:
        return tangent(from_numpy(when, y), y, error)

    k1 = along(t, rows.y, e)
    k2 = along(t + 0.5 * h, y_half, e + 0.5 * step * k1)
    k3 = along(t + 0.5 * h, y_half, e + 0.5 * step * k2)
    k4 = along(t_new, y_new, e + step * k3)
    return e + step / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)


def _tolerances(t: Any, y: Array, blocks: list[Block], rtol: float) -> Any:
    """Error that each block may make in a step: (B, blocks) on the host."""
    sizes = _block_norms(y, blocks)
    for i, block in enumerate(blocks):
        if block.size is not None:
            sizes[:, i] = to_numpy(block.size(from_numpy(t, y), y[:, block.start : block.stop]))
    return np.maximum(np.array([block.floor for block in blocks]) + rtol * sizes, 1e-300)


def _block_norms(values: Array, blocks: list[Block]) -> Any:
    """Root mean square of each block, (B, blocks) on the host."""
    xp = array_namespace(values)
    parts = [values[:, block.start : block.stop] for block in blocks]
    return np.stack([to_numpy(xp.sqrt(xp.mean(part**2, axis=1))) for part in parts], axis=1)


def _choose(accept: Any, new: Array, old: Array) -> Array:
    if accept.all():
        return new
    xp = array_namespace(new)
    return xp.where(from_numpy(accept, new, xp.bool)[:, None], new, old)


def _collect(finished: list[_Rows]) -> Solution:
    """Put finished rows back into the order they came in."""
    xp = array_namespace(finished[0].y)
    order = np.argsort(np.concatenate([rows.index for rows in finished]))
    at = from_numpy(order, finished[0].y, index_dtype(finished[0].y))
    evaluations = np.concatenate([rows.evaluations for rows in finished])[order]
    state = xp.take(xp.concat([rows.y for rows in finished], axis=0), at, axis=0)
    error = xp.take(xp.concat([rows.error for rows in finished], axis=0), at, axis=0)
    return Solution(state, evaluations, error)
