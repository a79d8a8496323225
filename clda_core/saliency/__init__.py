"""Saliency: how much each parameter matters to a loss. Estimators only score; selection is elsewhere."""

from .base import Elementwise, Probe, RandomVectors, SaliencyEstimator, derivatives
from .fisher import Fisher
from .hessian import Hessian
from .histogram import Histogram
from .magnitude import Magnitude
from .probe import PseudoLabelCrossEntropy
from .rates import saliency_rates
from .taylor import Taylor
from .threshold import (
    FixedThreshold,
    MeanThreshold,
    QuantileThreshold,
    ReferenceThreshold,
    Threshold,
    layer_saliency_rates,
)

__all__ = [
    "Elementwise",
    "Fisher",
    "FixedThreshold",
    "Hessian",
    "Histogram",
    "Magnitude",
    "MeanThreshold",
    "Probe",
    "PseudoLabelCrossEntropy",
    "QuantileThreshold",
    "RandomVectors",
    "ReferenceThreshold",
    "SaliencyEstimator",
    "Taylor",
    "Threshold",
    "derivatives",
    "layer_saliency_rates",
    "saliency_rates",
]
