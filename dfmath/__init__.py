"""Second-order quantities of diffusion models, exact where there is a closed form: the diffusion Fisher and its kin."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dfmath import backends
from dfmath.evaluation import Evaluation
from dfmath.fisher import DiffusionFisher, PosteriorCovariance
from dfmath.flow import FlowResult, Likelihood, log_likelihood, probability_flow
from dfmath.marginal import Marginal
from dfmath.priors import GaussianMixture, LowRank, PointMasses, Prior
from dfmath.span import OuterProductSpan
from dfmath.transport import OTReport, ot_check

if TYPE_CHECKING:
    from dfmath.explorer import Look, explore
    from dfmath.scene import Frame
    from dfmath.theorems.run import verify

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
    "verify",
]
__version__ = "0.1.0"

# What not every program needs is imported when it is asked for, which keeps `import dfmath` quick.
_LATER = {
    "Frame": "dfmath.scene",
    "Look": "dfmath.explorer",
    "explore": "dfmath.explorer",
    "verify": "dfmath.theorems.run",
}
_MODULES = (
    "approximations",
    "bounds",
    "datasets",
    "normalizers",
    "plots",
    "samplers",
    "schedules",
    "solvers",
    "theorems",
)

if not TYPE_CHECKING:  # or every name would be one

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return getattr(import_module(_LATER[name]), name)
        if name in _MODULES:
            return import_module(f"dfmath.{name}")
        raise AttributeError(f"module 'dfmath' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATER, *_MODULES})
