"""Which student layer a teacher layer is related to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, Tuple

from torch import nn

from typing_extensions import Protocol

from .layers import Layer
from .outputs import Outputs

__all__ = ["ModelView", "RelatedLayers", "Relation"]


@dataclass(frozen=True)
class ModelView:
    """A model and the layers it was divided into."""

    model: nn.Module
    layers: Tuple[Layer, ...]


@dataclass(frozen=True)
class RelatedLayers:
    """The result of relating two models.

    Attributes:
        pairs: Student layer by teacher layer name.
        unrelated: By teacher layer name, why it has no student layer.
    """

    pairs: Mapping[str, Layer]
    unrelated: Mapping[str, str] = field(default_factory=dict)


class Relation(Protocol):
    """Relates teacher layers to student layers; it only reads the models.

    Attributes:
        needs_inputs: Whether a batch of inputs is needed; if so the learner relates at the first round.
    """

    needs_inputs: bool

    def __call__(self, teacher: ModelView, student: ModelView, inputs: Any = None) -> RelatedLayers:
        """Relate every teacher layer to a student layer, or say by name why it is unrelated."""
        ...
