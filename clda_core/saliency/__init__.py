"""Saliency: how much each parameter matters to a loss. Estimators only score; selection is elsewhere."""

from .base import Probe, SaliencyEstimator, derivatives
from .fisher import Fisher
from .hessian import Hessian
from .histogram import Histogram
from .magnitude import Magnitude
from .probe import PseudoLabelCrossEntropy
from .taylor import Taylor

__all__ = [
    "Fisher",
    "Hessian",
    "Histogram",
    "Magnitude",
    "Probe",
    "PseudoLabelCrossEntropy",
    "SaliencyEstimator",
    "Taylor",
    "derivatives",
]
