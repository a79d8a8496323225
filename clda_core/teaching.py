"""The student's turn: trained and still, it teaches the teacher."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Optional

from torch import Tensor, nn

from ._host.borrowing import borrowed
from .distillation import Distillation
from .errors import problem
from .layers import LayerGrouping
from .learner import CollaborativeLearner
from .outputs import Extract, call_model
from .relation import Relation
from .report import Report
from .saliency import Probe, SaliencyEstimator, Threshold
from .schedule import RoundSchedule, Schedule
from .selection import Selection
from .update import Guard, MaskedDistillation, Update

__all__ = ["teach"]

_LEARNING_RATE = 1e-3


def teach(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[Any],
    *,
    student_inputs: Optional[Callable[[Any], Any]] = None,
    saliency: Optional[SaliencyEstimator] = None,
    threshold: Optional[Threshold] = None,
    selection: Optional[Selection] = None,
    relation: Optional[Relation] = None,
    update: Optional[Update] = None,
    distillation: Optional[Distillation] = None,
    schedule: Optional[RoundSchedule] = None,
    layers: Optional[LayerGrouping] = None,
    probe: Optional[Probe] = None,
    extract: Optional[Extract] = None,
    keep_rounds: int = 1000,
) -> Report:
    """Let a trained student update the teacher's non-salient layers, one round a batch; nothing else is trained.

    This is the student's half of training *in turns*: distil from the teacher until the student is trained, ``teach``,
    and train a new student of the better teacher. While it trains, a student is noisy and ends where its learning rate
    does; here it is at its best, and the next one has the better teacher from its first step. The paper speaks of both
    models improving in turns; how it spreads them over the training is not public, and this is ours.

    Args:
        teacher: The big model, updated in place.
        student: The small model, trained; never changed.
        batches: Of target images without labels, each as the teacher is called: a tuple of arguments, a mapping of
            keyword arguments, or one argument. A few dozen batches suffice; see docs/turns.md.
        student_inputs: Makes of a batch what the student is called with, where that is something else.
        saliency: As of :class:`~clda_core.CollaborativeLearner`, like all that follow.
        threshold: The score above which a parameter is salient.
        selection: Chooses the non-salient layers.
        relation: Teacher layer to student layer.
        update: What the student does to them; by default that of the learner, with steps ten times as long, since there
            are few and the student does not change.
        distillation: Says by its ``class_map`` which classes both models have; nothing is trained by it.
        schedule: When rounds are made; by default after every batch, of which every fifth is observed.
        layers: Regrouping for both models.
        probe: Loss on the teacher's logits whose gradient is observed.
        extract: Reads logits from what the models return.
        keep_rounds: How many of the last rounds the report holds one by one.

    Returns:
        The rounds, as :meth:`CollaborativeLearner.report` gives them.

    Raises:
        CldaError: As :class:`~clda_core.CollaborativeLearner` does, and if there are no batches or ``batches`` is one
            tensor.

    Example:
        >>> import torch
        >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> report = teach(teacher, student, (torch.randn(8, 4) for _ in range(10)))
        >>> len(report.rounds)
        10
    """
    if isinstance(batches, Tensor):
        raise problem(
            "batches is one tensor, whose items would be taken for batches",
            expected="an iterable of batches of target images",
            received=f"shape {tuple(batches.shape)}",
            fix="pass batches=images.split(32), or a list of batches",
        )
    learner = CollaborativeLearner(
        teacher,
        student,
        saliency=saliency,
        threshold=threshold,
        selection=selection,
        relation=relation,
        update=Guard(MaskedDistillation(learning_rate=_LEARNING_RATE)) if update is None else update,
        distillation=distillation,
        schedule=Schedule(warmup=0, interval=1) if schedule is None else schedule,
        layers=layers,
        probe=probe,
        extract=extract,
        keep_rounds=keep_rounds,
    )
    learner._teaches = True
    empty = True
    for inputs in batches:
        empty = False
        with borrowed(student, doing="distill"):
            its = inputs if student_inputs is None else student_inputs(inputs)
            of_student = None if student_inputs is None else its
            learner.distill(call_model(student, its), inputs, student_inputs=of_student)
        learner.step(step_fn=lambda: None)
    if empty:
        raise problem(
            "there is nothing to teach on",
            expected="at least one batch of target images",
            received="none",
            fix="pass batches as a list or a fresh iterator: one that was read to its end gives nothing",
        )
    return learner.report()
