"""Updates: what the student does to the selected teacher layers."""

from .aligned_average import AlignedAverage
from .average import Average
from .base import RoundContext, SourceLoss, Update, UpdateResult
from .guard import Criterion, Guard, agreement, consensus, mutual_information
from .initialise import init_student
from .keep_best import KeepBest
from .masked_distillation import MaskedDistillation

__all__ = [
    "AlignedAverage",
    "Average",
    "Criterion",
    "Guard",
    "KeepBest",
    "MaskedDistillation",
    "RoundContext",
    "SourceLoss",
    "Update",
    "UpdateResult",
    "agreement",
    "consensus",
    "init_student",
    "mutual_information",
]
