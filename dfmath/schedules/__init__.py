"""Noise schedules t -> (alpha, sigma), the inverse of rho = sigma/alpha, and f and g^2 [MATH 0, 2.1, 2.2].

A schedule is all that time means here: everything else depends on (x, alpha, sigma) alone. Times may be
Python floats, which give floats, or floating arrays of any array-API namespace, which give arrays of the same
namespace, dtype and device. Arrays are computed in the widest dtype the device has and rounded once at the
end, so a float32 result is as good as float32 can hold, for the float32 time that was given.
"""

from collections.abc import Callable

from dfmath._checks import one_of
from dfmath.schedules.base import Schedule
from dfmath.schedules.discrete import Discrete
from dfmath.schedules.exploding import EDM, VE
from dfmath.schedules.flow_matching import FlowMatching
from dfmath.schedules.variance_preserving import VP, SubVP, VPCosine, VPLinear

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Discrete",
    "FlowMatching",
    "Schedule",
    "SubVP",
    "VPCosine",
    "VPLinear",
    "schedule_by_name",
]

_BY_NAME: dict[str, Callable[[], Schedule]] = {
    "vp": VP.linear,
    "vp-cosine": VP.cosine,
    "subvp": SubVP.linear,
    "ve": VE,
    "edm": EDM,
    "flow-matching": FlowMatching,
}


def schedule_by_name(name: str) -> Schedule:
    """Return the schedule of that name with its default parameters, as the command line offers it.

    Parameters
    ----------
    name : {"vp", "vp-cosine", "subvp", "ve", "edm", "flow-matching"}

    Raises
    ------
    ValueError
        If there is no schedule of that name; the message lists the names and suggests the nearest.

    Examples
    --------
    >>> from dfmath.schedules import schedule_by_name
    >>> schedule_by_name("edm")
    EDM(sigma_min=0.002, sigma_max=80.0)
    """
    return _BY_NAME[one_of("name", name, tuple(_BY_NAME))]()
