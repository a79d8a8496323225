"""Updates: what the student does to the selected teacher layers."""

from .average import Average
from .base import Granularity, RoundContext, Update, UpdateResult
from .guard import Criterion, Guard, agreement, mutual_information
from .initialise import init_student
from .masked_distillation import MaskedDistillation

__all__ = [
    "Average",
    "Criterion",
    "Granularity",
    "Guard",
    "MaskedDistillation",
    "RoundContext",
    "Update",
    "UpdateResult",
    "agreement",
    "init_student",
    "mutual_information",
]
