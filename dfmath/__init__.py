"""Second-order quantities of diffusion models, exact where there is a closed form: the diffusion Fisher and its kin."""

from dfmath.priors import GaussianMixture, LowRank, PointMasses

__all__ = ["GaussianMixture", "LowRank", "PointMasses"]
__version__ = "0.1.0"
