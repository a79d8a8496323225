"""What an update is, what it may read, and what it reports."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

from torch import Tensor, nn
from typing_extensions import Protocol, runtime_checkable

from .._host.borrowing import borrowed
from .._host.plain import copied
from ..errors import problem
from ..layers import Layer
from ..outputs import Outputs, owned
from ..strategy import vouched_for
from .writing import Snapshot, names_in

__all__ = ["RoundContext", "SourceLoss", "Update", "UpdateResult"]

SourceLoss = Callable[[nn.Module], Tensor]
"""The host's supervised loss on source data, as a function of the network: ``source_loss(teacher) -> scalar``."""


@dataclass(frozen=True, eq=False)
class RoundContext:
    """What an update may read in one round.

    Attributes:
        teacher: The big model, to be changed in the selected layers only.
        student: The small model, never changed.
        layers: The selected teacher layers.
        related: Student layer by teacher layer name; a teacher layer without a relation is absent.
        inputs: The target batch of this step as the user passed it to ``distill``; ``None`` if none was passed.
        mask: That batch's mask, or ``None``.
        forward: ``forward(model, inputs)`` runs a model and reads its :class:`~clda_core.outputs.Outputs`; the
            teacher's logits are of the student's classes, where the KD loss has a ``class_map``. Let
            :meth:`inputs_of` choose the inputs.
        strength: The schedule's factor on the size of the update, in [0, 1].
        class_map: The KD loss's: student class ``i`` is teacher class ``class_map[i]``; ``None`` where the classes are
            the same.
        student_inputs: The batch for the student, where that takes other inputs; ``None`` where it takes the same.
        view: The same images on another view, as ``distill`` got it; ``None`` if there is none.
        student_view: The view for the student, where that takes other inputs.
        source_loss: The host's supervised loss on source data, a function of the network; ``None`` if there is none.
        trust: How far the student is trusted by its lead, in [0, 1]; see :mod:`clda_core.lead`.
        learning_rate: The host's at its peak so far, where its optimizer is of Adam's kind; ``None`` where that is not
            known.
        loss_scale: By what a loss is multiplied before it is differentiated by the teacher, and its gradients divided:
            1 unless the host scales its own loss, as for float16.
        cotrained: Whether the host trains the teacher too, which gradients that it left there have shown.
        teacher_before: The teacher's outputs on ``inputs`` before the round, where they are known;
            :meth:`teacher_outputs` gives them in any case.
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
    view: Any = None
    student_view: Any = None
    source_loss: Optional[SourceLoss] = None
    trust: float = 1.0
    learning_rate: Optional[float] = None
    loss_scale: float = 1.0
    cotrained: bool = False
    teacher_before: Optional[Outputs] = None
    _cache: Dict[str, Outputs] = field(default_factory=dict, repr=False)
    _before: Dict[int, Before] = field(default_factory=dict, repr=False)

    def student_outputs(self) -> Outputs:
        """Return the student's outputs on ``inputs`` in eval mode, detached; computed once a round.

        Raises:
            CldaError: If this step's ``distill`` got no inputs.
        """
        if "student" not in self._cache:
            self._cache["student"] = self.predict(self.student)
        return self._cache["student"]

    def teacher_outputs(self) -> Outputs:
        """Return the teacher's outputs on ``inputs`` before the update, in the student's classes and without a graph.

        Ask before the update writes: they are computed at the first call where ``distill`` did not.

        Raises:
            CldaError: If this step's ``distill`` got no inputs.
        """
        if "teacher" not in self._cache:
            known = self.teacher_before
            self._cache["teacher"] = self.predict(self.teacher) if known is None else known
        return self._cache["teacher"]

    def has_view(self) -> bool:
        """Return whether both models can be run on another view."""
        return self.view is not None and (self.student_inputs is None or self.student_view is not None)

    def view_of(self, model: nn.Module) -> Any:
        """Return the view that ``model``, the teacher or the student, is run on; ``None`` where there is none."""
        return self.view if model is not self.student or self.student_inputs is None else self.student_view

    def predict(self, model: nn.Module, inputs: Any = None) -> Outputs:
        """Return a model's outputs in eval mode, without a graph and in memory of their own.

        Args:
            model: The teacher or the student.
            inputs: What it is called with; by default what :meth:`inputs_of` returns.

        Raises:
            CldaError: If this step's ``distill`` got no inputs.
        """
        with borrowed(model):
            return owned(self.forward(model, self.inputs_of(model) if inputs is None else inputs))

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

    def before(self, update: Update) -> Before:
        """Return the selected layers and an update's state as they are now, to go back to.

        Made once for each update, so ask for it before the update writes. The learner asks for that of its own update,
        which is the guard's where there is one.
        """
        if id(update) not in self._before:
            self._before[id(update)] = Before(self, update)
        return self._before[id(update)]

    def take_back(self, update: Update) -> None:
        """Go back to what :meth:`before` has kept for an update; nothing was written where it was not asked."""
        if id(update) in self._before:
            self._before[id(update)].take_back()


class Before:
    """What a round may change, as it was: the selected layers, and the state of an update.

    Args:
        context: The round.
        update: The update.
    """

    def __init__(self, context: RoundContext, update: Update) -> None:
        self._snapshot = Snapshot(context.teacher, names_in(context.layers))
        self._take_state_back = keep_state(update, context)

    def take_back(self) -> None:
        """Let both be as they were."""
        self._snapshot.restore()
        self._take_state_back()

    def go_halfway_back(self) -> None:
        """Let the layers be the mean of what they were and what they are."""
        self._snapshot.go_halfway_back()


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

    No more than :meth:`apply` is needed. What else an update may have is declared by :class:`NeedsRelation`,
    :class:`WeighsTrust`, :class:`Stateful`, :class:`KeepsState`, :class:`Rehearses` and :class:`KnowsTeacher`.
    """

    def apply(self, context: RoundContext) -> UpdateResult:
        """Write to ``context.layers`` of the teacher and say what was done."""
        ...


@runtime_checkable
class NeedsRelation(Protocol):
    """An update that says whether it needs related layers; one that does not say so needs none."""

    @property
    def needs_relation(self) -> bool:
        """Whether layers without a related student layer cannot be updated."""
        ...


@runtime_checkable
class WeighsTrust(Protocol):
    """An update that goes by the trust in the student itself; of others the strength is multiplied by it."""

    @property
    def weighs_trust(self) -> bool:
        """Whether ``context.trust`` is heeded in :meth:`Update.apply`."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """An update that remembers something from round to round."""

    def state_dict(self) -> Dict[str, Any]:
        """Return what must survive a checkpoint: tensors and plain Python types only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...


@runtime_checkable
class KeepsState(Protocol):
    """A :class:`Stateful` update that can go back after a round without a copy of its whole state."""

    def keep(self, context: RoundContext) -> Callable[[], None]:
        """Return what lets the state be as it is now, after a round of this context; it may be called twice."""
        ...


@runtime_checkable
class Rehearses(Protocol):
    """An update that can do what may fail in a round without writing; of others both models are run on the inputs."""

    def rehearse(self, context: RoundContext) -> None:
        """Do all that :meth:`Update.apply` would do and that can fail, and write nothing; called in the first step."""
        ...


@runtime_checkable
class KnowsTeacher(Protocol):
    """An update that can tell whether the state it has restored belongs to a teacher."""

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raise unless it does."""
        ...


def check_update(update: Any) -> None:
    """Raise unless this is an update that saves what it restores."""
    state = ("state_dict", "load_state_dict")
    wanted = ("apply", *state) if any(hasattr(update, name) for name in state) else ("apply",)
    missing = [name for name in wanted if not callable(getattr(update, name, None))]
    if missing or isinstance(update, type):
        raise problem(
            "update= is no update",
            expected="an object with apply(), and with both or none of state_dict() and load_state_dict()",
            received=repr(update) if isinstance(update, type) else f"{update!r} without {missing}",
            fix="pass an instance, for example MaskedDistillation(), or write the method that is missing",
        )


def needs_relation(update: Update) -> bool:
    """Return whether an update needs related layers."""
    return isinstance(update, NeedsRelation) and update.needs_relation


def weighs_trust(update: Update) -> bool:
    """Return whether an update goes by the trust in the student itself."""
    return isinstance(update, WeighsTrust) and update.weighs_trust


def state_of(update: Update) -> Dict[str, Any]:
    """Return an update's state, not copied; empty for one that remembers nothing."""
    return update.state_dict() if isinstance(update, Stateful) else {}


def load_state(update: Update, state: Mapping[str, Any]) -> None:
    """Restore what :func:`state_of` returned."""
    if isinstance(update, Stateful):
        update.load_state_dict(state)


def keep_state(update: Update, context: RoundContext) -> Callable[[], None]:
    """Return what lets an update's state be as it is now, after a round of this context."""
    if isinstance(update, KeepsState) and vouched_for(update, "keep", by=("state_dict", "load_state_dict")):
        return update.keep(context)
    return functools.partial(load_state, update, copied(state_of(update)))


def rehearse(update: Update, context: RoundContext) -> None:
    """Let an update do what can fail in a round, without writing."""
    if isinstance(update, Rehearses):
        update.rehearse(context)
    elif context.inputs is not None:
        context.predict(context.teacher)
        context.student_outputs()


def check_source_loss(source_loss: Any) -> None:
    """Raise unless this is a function of the network, or ``None``."""
    if source_loss is not None and not callable(source_loss):
        raise problem(
            "source_loss= cannot be called",
            expected="a function of the network that returns the host's supervised loss on source data",
            received=type(source_loss).__name__,
            fix="pass source_loss=lambda teacher: F.cross_entropy(teacher(images_s), labels_s)",
        )


def check_teacher(update: Update, teacher: nn.Module) -> None:
    """Let an update that can tell say whether what it has restored belongs to this teacher."""
    if isinstance(update, KnowsTeacher):
        update.check_teacher(teacher)


def check_result(result: Any, selected: Sequence[Layer]) -> None:
    """Raise unless an update returned what it did, to the selected layers alone."""
    if not isinstance(result, UpdateResult) or not set(result.updated) <= {layer.name for layer in selected}:
        raise problem(
            "apply() returned something else",
            expected="an UpdateResult with names of the selected layers",
            received=repr(result),
            fix="return UpdateResult(names of the layers that were written)",
        )
