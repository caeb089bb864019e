"""Second-order quantities of diffusion models, exact where there is a closed form: the diffusion Fisher and its kin."""

from dfmath import backends
from dfmath.evaluation import Evaluation
from dfmath.explorer import Frame, Look, explore
from dfmath.fisher import DiffusionFisher, PosteriorCovariance
from dfmath.flow import FlowResult, Likelihood, log_likelihood, probability_flow
from dfmath.marginal import Marginal
from dfmath.priors import GaussianMixture, LowRank, PointMasses, Prior
from dfmath.span import OuterProductSpan
from dfmath.transport import OTReport, ot_check

__all__ = [
    "DiffusionFisher",
    "Evaluation",
    "FlowResult",
    "Frame",
    "GaussianMixture",
    "Likelihood",
    "Look",
    "LowRank",
    "Marginal",
    "OTReport",
    "OuterProductSpan",
    "PointMasses",
    "PosteriorCovariance",
    "Prior",
    "backends",
    "explore",
    "log_likelihood",
    "ot_check",
    "probability_flow",
]
__version__ = "0.1.0"
