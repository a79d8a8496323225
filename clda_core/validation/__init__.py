"""Validation: scores of a network on target data without labels, which tell the better of two networks."""

from .base import ByClass, MakesView, Validator
from .consistency import ConsistencyIoU, HardConsistency, SoftConsistency
from .density import NeighbourhoodDensity
from .entropy import NegativeEntropy
from .mixval import MixVal, mixed
from .mutual_information import ConsistentInformation, MutualInformation
from .scores import validate, validation_statistics

__all__ = [
    "ByClass",
    "ConsistencyIoU",
    "ConsistentInformation",
    "HardConsistency",
    "MakesView",
    "MixVal",
    "MutualInformation",
    "NegativeEntropy",
    "NeighbourhoodDensity",
    "SoftConsistency",
    "Validator",
    "mixed",
    "validate",
    "validation_statistics",
]
