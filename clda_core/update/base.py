"""What an update is, what it may read, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from typing_extensions import Protocol

from .._host.borrowing import evaluating
from ..errors import problem
from ..layers import Layer
from ..outputs import Outputs, owned
from .writing import copied

__all__ = ["RoundContext", "Update", "UpdateResult"]


@dataclass(frozen=True)
class RoundContext:
    """What an update may read in one round.

    Attributes:
        teacher: The big model, to be changed in the selected layers only.
        student: The small model, never changed.
        layers: The selected teacher layers.
        related: Student layer by teacher layer name; a teacher layer without a relation is absent.
        inputs: The target batch of this step as the user passed it to ``distill``; ``None`` if none was passed.
        student_inputs: The same for the student, where that takes other inputs; ``None`` where it takes the same.
        mask: That batch's mask, or ``None``.
        forward: ``forward(model, inputs)`` runs a model and reads its :class:`~clda_core.outputs.Outputs`; the
            teacher's logits are of the student's classes, where the KD loss has a ``class_map``. Let
            :meth:`inputs_of` choose the inputs.
        strength: The schedule's factor on the size of the update, in [0, 1].
        class_map: The KD loss's: student class ``i`` is teacher class ``class_map[i]``; ``None`` where the classes are
            the same.
    """

    teacher: nn.Module
    student: nn.Module
    layers: Tuple[Layer, ...]
    related: Mapping[str, Layer]
    inputs: Any
    mask: Optional[Tensor]
    forward: Callable[[nn.Module, Any], Outputs]
    strength: float = 1.0
    class_map: Optional[Sequence[int]] = None
    student_inputs: Any = None
    _cache: Dict[str, Outputs] = field(default_factory=dict, repr=False, compare=False)
    _states: List[Dict[str, Any]] = field(default_factory=list, repr=False, compare=False)

    def student_outputs(self) -> Outputs:
        """Return the student's outputs on ``inputs`` in eval mode, detached; computed once a round.

        Raises:
            CldaError: If this step's ``distill`` got no inputs.
        """
        if "student" not in self._cache:
            self._cache["student"] = self.predict(self.student)
        return self._cache["student"]

    def state_before(self, update: Update) -> Dict[str, Any]:
        """Return a copy of an update's state at the start of the round; made once, so call it before the update."""
        if not self._states:
            self._states.append(copied(update.state_dict()))
        return self._states[0]

    def predict(self, model: nn.Module) -> Outputs:
        """Return a model's outputs on ``inputs`` in eval mode, without a graph and in memory of their own.

        Raises:
            CldaError: If this step's ``distill`` got no inputs.
        """
        with evaluating(model), torch.no_grad():
            return owned(self.forward(model, self.inputs_of(model)))

    def inputs_of(self, model: nn.Module) -> Any:
        """Return what ``model``, the teacher or the student, is run on.

        Raises:
            CldaError: If this step's ``distill`` got no inputs.
        """
        inputs = self.required_inputs()
        return inputs if self.student_inputs is None or model is not self.student else self.student_inputs

    def required_inputs(self) -> Any:
        """Return ``inputs``.

        Raises:
            CldaError: If this step's ``distill`` got no inputs.
        """
        if self.inputs is None:
            raise problem(
                "the update needs this step's target batch",
                expected="the teacher's inputs",
                received="distill() without inputs",
                fix="call learner.distill(student_output, inputs), with teacher_output= beside it if you have that",
            )
        return self.inputs


@dataclass(frozen=True)
class UpdateResult:
    """What an update did.

    Attributes:
        updated: Names of the teacher layers that were written.
        skipped: By layer name (or ``layer: parameter``), why something selected was not written.
        accepted: A guard's decision; ``None`` without a guard, or where nothing was written.
        score_before: The guard's criterion before the update; ``None`` without a decision, or if unknown (NaN).
        score_after: The same after it.
    """

    updated: Tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    accepted: Optional[bool] = None
    score_before: Optional[float] = None
    score_after: Optional[float] = None


class Update(Protocol):
    """Changes the selected teacher layers in place; the learner undoes what it wrote there if it raises.

    An update may have a method ``rehearse(context)`` as well: it does what :meth:`apply` would do that can fail, and
    writes nothing. The learner calls it once, in the first step. Without it both models are run on the inputs there.
    """

    @property
    def needs_relation(self) -> bool:
        """Whether layers without a related student layer cannot be updated."""
        ...

    def apply(self, context: RoundContext) -> UpdateResult:
        """Write to ``context.layers`` of the teacher and say what was done."""
        ...

    def state_dict(self) -> Dict[str, Any]:
        """Return what must survive a checkpoint: tensors and plain Python types only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...


def rehearse(update: Update, context: RoundContext) -> None:
    """Let an update do what can fail in a round, without writing."""
    own = getattr(update, "rehearse", None)
    if callable(own):
        own(context)
    elif context.inputs is not None:
        context.predict(context.teacher)
        context.student_outputs()
