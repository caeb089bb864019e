"""The diffusion Fisher where there is only a network: traces and products from its outputs [MATH 4.1-4.7].

Formulas alone; how far each is off is in `dfmath.bounds`. They are written as F = (I - S)/sigma^2 with
S = (alpha^2/sigma^2) P, because 1/sigma^4 overflows at a sigma where F itself does not.
"""

from dfmath.approximations.endpoint import EndpointFisher
from dfmath.approximations.gaussian import GaussianFisher
from dfmath.approximations.stochastic_traces import TraceEstimate, hutchinson_trace, hutchpp_trace
from dfmath.approximations.trace_matching import local_loss_trace, trace_matching

__all__ = [
    "EndpointFisher",
    "GaussianFisher",
    "TraceEstimate",
    "hutchinson_trace",
    "hutchpp_trace",
    "local_loss_trace",
    "trace_matching",
]
