"""Is the probability-flow map an optimal transport map [MATH 3.1-3.5]?

It is exactly when its Jacobian is symmetric positive semidefinite everywhere (Brenier), so the check integrates the
Jacobian along many trajectories and measures how far it is from that.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dfmath import _checks
from dfmath.backends._compat import Array, Namespace, array_namespace, from_numpy, to_numpy
from dfmath.flow import FlowResult, check_prior_and_schedule, check_tolerances, probability_flow
from dfmath.priors import PointMasses, Prior

if TYPE_CHECKING:
    from dfmath.schedules import Schedule

STARTS = ("marginal", "gaussian")


@dataclass(frozen=True)
class PerStart:
    """A quantity at every start, (n,), with its mean and the standard error of that mean."""

    values: Any
    mean: float
    standard_error: float


@dataclass(frozen=True)
class OTReport:
    """What `ot_check` found.

    Attributes
    ----------
    asymmetry
        |A - A^T|_F/(2 |A|_F) in [0, 1] at each start; it does not depend on the axes.
    asymmetry_offdiagonal
        The published index, |B - B^T|_F/(sqrt 2 |B|_F) with B = A - diag A; it depends on the axes.
    min_eigenvalue
        Smallest eigenvalue of (A + A^T)/2 at each start.
    transport_gap
        (mean |z_T - z_0|^2 - W2^2)/W2^2 over the n matched pairs, W2^2 by exact discrete optimal transport. Zero says
        that no re-matching of the n pairs is shorter; it is exact for those pairs, not an estimate for the densities.
    is_transport
        Whether every asymmetry is at most `tolerance` and every smallest eigenvalue at least -tolerance |A|_F.
    tolerance
        The verdict's threshold, well above the integration error `rtol` of A.
    evaluations, error_estimate
        Mean evaluations for each trajectory, and the largest estimated error of an end point.
    starts, ends, jacobians
        (n, d), (n, d), (n, d, d) in canonical coordinates z = x/alpha.
    """

    asymmetry: PerStart
    asymmetry_offdiagonal: PerStart
    min_eigenvalue: PerStart
    transport_gap: float
    is_transport: bool
    tolerance: float
    evaluations: float
    error_estimate: float
    starts: Array
    ends: Array
    jacobians: Array


def ot_check(
    prior: Prior,
    rho_max: float = 80.0,
    rho_min: float = 0.02,
    n: int = 64,
    seed: int = 0,
    schedule: Schedule | None = None,
    *,
    start: str = "marginal",
    tolerance: float = 1e-6,
    rtol: float = 1e-9,
) -> OTReport:
    """Check whether the flow from rho_max down to rho_min is an optimal transport map [MATH 3.1, 3.4].

    Parameters
    ----------
    prior
        Data distribution with a closed form.
    rho_max, rho_min
        Noise-to-signal ratios of the map's two ends, in the units of the data; a warning says where they do not span
        the data.
    n, seed
        Number of starts, and the seed that draws them.
    schedule
        Integrate in this schedule's own time and coordinates instead of the canonical ones. By [MATH 3.3] nothing but
        discretisation error can change.
    start
        Starts z_T from the prior's ``marginal`` at rho_max, or ``gaussian`` ones, N(0, rho_max^2 I).
    tolerance
        Threshold of the verdict; at least 100 `rtol`.
    rtol
        Local error of the integration for each step.

    Returns
    -------
    OTReport
        Indices of every start with mean and standard error, the verdict and its tolerance; starts, ends and Jacobians
        in canonical coordinates.

    Raises
    ------
    TypeError, ValueError
        If an argument is of another kind, or out of range.

    Examples
    --------
    >>> import numpy as np
    >>> line = PointMasses(np.array([[-1.0, -1.0], [0.0, 0.0], [2.0, 2.0]]))
    >>> ot_check(line, rho_max=20.0, n=4).is_transport
    True
    """
    check_prior_and_schedule(prior, schedule)
    home = prior.home
    rho_max, rho_min = (_checks.noise_number(*end, home) for end in (("rho_max", rho_max), ("rho_min", rho_min)))
    if not rho_min < rho_max:
        raise ValueError(f"rho_min and rho_max must satisfy rho_min < rho_max, got {rho_min:g} and {rho_max:g}")
    _checks.one_of("start", start, STARTS)
    n = _checks.positive_integer("n", n)
    _checks.fits_in_memory("the transport costs", n, n, instead="draw fewer with smaller n")
    rtol, tolerance = check_tolerances(rtol, 0.0, home)[0], _checks.real_number("tolerance", tolerance)
    if not 100 * rtol <= tolerance < 1:
        raise ValueError(f"tolerance must be in [100 rtol, 1) = [{100 * rtol:g}, 1), got {tolerance:g}")
    z = _draw_starts(prior, rho_max, n, seed, start)
    flow = _flow(prior, z, rho_max, rho_min, schedule, rtol)
    if (note := range_note(prior, rho_max, rho_min)) is not None:
        warnings.warn(note, stacklevel=2)
    return _report(z, flow, tolerance, 10 * rtol)


def range_note(prior: Prior, rho_max: float, rho_min: float) -> str | None:
    """Say so where a map between these levels tells little of the data: they are not inside the range of noise.

    Above the data's size q is nearly one Gaussian, below the distances of its points nothing moves any more, and every
    flow is nearly a transport map. The size is the root mean square of 256 draws' distances from their mean.
    """
    draws = to_numpy(prior.sample(256, 0)).astype(np.float64)
    size = math.sqrt(float(((draws - draws.mean(axis=0)) ** 2).sum(axis=1).mean()))
    if size == 0.0 or (rho_min <= size / 3.0 and rho_max >= 3.0 * size):
        return None
    return (
        f"noise from rho = {rho_max:g} to {rho_min:g} does not span the data, {size:.3g} from their mean: the "
        f"verdict is of this range alone; take rho_max above {3 * size:.3g} and rho_min below {size / 3:.3g}"
    )


def asymmetry(jacobian: Array) -> Array:
    """Return |A - A^T|_F/(2 |A|_F) for A (B, d, d): 0 for symmetric, 1 for antisymmetric matrices [MATH 3.4]."""
    xp = _square(jacobian)
    size = _frobenius(jacobian)
    ratio = _frobenius(jacobian - xp.matrix_transpose(jacobian)) / xp.where(size > 0, 2 * size, xp.ones_like(size))
    return ratio


def asymmetry_offdiagonal(jacobian: Array, floor: float = 0.0) -> Array:
    """Return the published index |B - B^T|_F/(sqrt 2 |B|_F), B = A - diag A, for A (B, d, d) [MATH 3.4].

    It is 0 where B is: |B|_F at most `floor` |A|_F counts as B = 0: a quotient of integration errors says nothing.
    """
    xp, floor = _square(jacobian), _checks.fraction("floor", floor)
    eye = xp.eye(jacobian.shape[1], dtype=jacobian.dtype, device=jacobian.device)
    off = jacobian * (1 - eye)
    size = _frobenius(off)
    present = size > floor * _frobenius(jacobian)
    ratio = _frobenius(off - xp.matrix_transpose(off)) / xp.where(present, math.sqrt(2) * size, xp.ones_like(size))
    return xp.where(present, ratio, xp.zeros_like(ratio))


def min_eigenvalue(jacobian: Array) -> Array:
    """Return the smallest eigenvalue of (A + A^T)/2 for A (B, d, d)."""
    xp = _square(jacobian)
    return xp.linalg.eigvalsh((jacobian + xp.matrix_transpose(jacobian)) / 2)[:, 0]


def transport_gap(starts: Array, ends: Array) -> float:
    """Return (mean |z_T - z_0|^2 - W2^2)/W2^2 for matched samples (n, d), W2^2 by exact assignment [MATH 3.4]."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    _checks.points("starts", starts, "(n, d)")
    _checks.points("ends", ends, "(n, d)")
    if tuple(starts.shape) != tuple(ends.shape):
        raise ValueError(f"ends must have the shape of starts, {tuple(starts.shape)}, got {_checks.describe(ends)}")
    a, b = (to_numpy(points).astype(np.float64) for points in (starts, ends))
    _checks.fits_in_memory("the transport costs", len(a), len(b), instead="take fewer pairs")
    cost = cdist(a, b, "sqeuclidean")
    best = float(cost[linear_sum_assignment(cost)].mean())
    excess = float(np.trace(cost)) / len(a) - best
    return excess / best if best > 0 else (math.inf if excess > 0 else 0.0)


def official_points(collinear: bool = False) -> PointMasses:
    """Return the published experiment's three points, or three points on a line through the origin [MATH 3.5]."""
    bent = [[0.5, 0.0], [0.0, -0.5], [0.0, 0.0]]
    line = [[0.5, 0.5], [-0.5, -0.5], [0.0, 0.0]]
    return PointMasses(np.array(line if collinear else bent))


def official_schedules() -> dict[str, Schedule]:
    """Return the published experiment's four schedules, wide enough for rho from 80 to 0.02."""
    from dfmath.schedules import EDM, VE, VP, SubVP

    return {
        "VP": VP.linear(),
        "sub-VP": SubVP.linear(),
        "VE": VE(sigma_min=0.01, sigma_max=100.0),
        "EDM": EDM(),
    }


def _draw_starts(prior: Prior, rho_max: float, n: int, seed: int, start: str) -> Array:
    if start == "marginal":
        return prior.diffuse(1.0, rho_max).sample(n, seed)
    rng = np.random.default_rng(_checks.random_seed(seed))
    return from_numpy(rho_max * rng.standard_normal((n, prior.dim)), prior.home)


def _flow(prior: Prior, z: Array, rho_max: float, rho_min: float, schedule: Schedule | None, rtol: float) -> FlowResult:
    """Return the flow in canonical coordinates, integrated in the schedule's own where one is given."""
    atol = rtol * rho_min
    if schedule is None:
        return probability_flow(prior, z, rho_max, rho_min, jacobian=True, rtol=rtol, atol=atol)
    times = _time("rho_max", rho_max, schedule), _time("rho_min", rho_min, schedule)
    before, after = float(schedule(times[0])[0]), float(schedule(times[1])[0])
    x = before * z
    flow = probability_flow(prior, x, *times, schedule, jacobian=True, rtol=rtol, atol=after * atol, native=True)
    assert flow.jacobian is not None
    matrix = flow.jacobian * (before / after)
    return FlowResult(flow.x / after, matrix, None, flow.evaluations, flow.error_estimate / after)


def _report(z: Array, flow: FlowResult, tolerance: float, floor: float) -> OTReport:
    matrix = flow.jacobian
    skew, smallest = _per_start(asymmetry(matrix)), _per_start(min_eigenvalue(matrix))
    scale = to_numpy(_frobenius(matrix))
    verdict = bool((skew.values <= tolerance).all() and (smallest.values >= -tolerance * scale).all())
    return OTReport(
        asymmetry=skew,
        asymmetry_offdiagonal=_per_start(asymmetry_offdiagonal(matrix, floor)),
        min_eigenvalue=smallest,
        transport_gap=transport_gap(z, flow.x),
        is_transport=verdict,
        tolerance=tolerance,
        evaluations=float(to_numpy(flow.evaluations).mean()),
        error_estimate=float(to_numpy(flow.error_estimate).max()),
        starts=z,
        ends=flow.x,
        jacobians=matrix,
    )


def _per_start(values: Array) -> PerStart:
    host = to_numpy(values).astype(np.float64)
    error = float(host.std(ddof=1) / math.sqrt(len(host))) if len(host) > 1 else math.nan
    return PerStart(host, float(host.mean()), error)


def _time(name: str, rho: float, schedule: Schedule) -> float:
    with _checks.on_behalf_of(name):
        return float(schedule.time(rho))


def _square(jacobian: Any) -> Namespace:
    """Validate Jacobians (B, d, d) and return their namespace."""
    _checks.real_array("jacobian", jacobian, "(B, d, d)", 3)
    if jacobian.shape[1] != jacobian.shape[2]:
        raise ValueError(f"jacobian must have shape (B, d, d), got {_checks.describe(jacobian)}")
    _checks.finite_rows("jacobian", jacobian)
    return array_namespace(jacobian)


def _frobenius(matrix: Array) -> Array:
    xp = array_namespace(matrix)
    return xp.sqrt(xp.sum(matrix**2, axis=(1, 2)))
