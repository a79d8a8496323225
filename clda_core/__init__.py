"""Collaborative learning between a big teacher and a small student for unsupervised domain adaptation."""

from .errors import CldaError
from .layers import Layer, group_layers
from .learner import CollaborativeLearner
from .outputs import Outputs
from .report import Report, RoundRecord
from .schedule import Never, Schedule
from .teaching import teach
from .update import init_student

__version__ = "0.1.0"

__all__ = [
    "CldaError",
    "CollaborativeLearner",
    "Layer",
    "Never",
    "Outputs",
    "Report",
    "RoundRecord",
    "Schedule",
    "group_layers",
    "init_student",
    "teach",
]
