"""Collaborative learning between a big teacher and a small student for unsupervised domain adaptation."""

from __future__ import annotations as _annotations

import sys as _sys
from typing import List as _List

from . import checkpoint
from .errors import CldaError
from .history import RoundRecord
from .layers import Layer, group_layers
from .learner import CollaborativeLearner
from .outputs import Outputs
from .report import Report
from .saliency import saliency_rates
from .schedule import Never, Schedule
from .teaching import teach
from .update import init_student
from .validation import validate

__version__ = "0.2.0.dev0"

__all__ = [
    "CldaError",
    "CollaborativeLearner",
    "Layer",
    "Never",
    "Outputs",
    "Report",
    "RoundRecord",
    "Schedule",
    "checkpoint",
    "group_layers",
    "init_student",
    "saliency_rates",
    "teach",
    "validate",
]

_ours = {name: module for name, module in _sys.modules.items() if name.startswith("clda_core.")}
_public = {name: module for name, module in _ours.items() if hasattr(module, "__all__")}
for _module in _public.values():  # tab completion then shows what a module offers, not what it imports
    _module.__dir__ = _module.__all__.copy  # type: ignore[method-assign]


def __dir__() -> _List[str]:
    """Return the public names and modules, for tab completion."""
    return sorted({*__all__, *(name.split(".")[1] for name in _public)})
