"""The student's turn: trained and still, it teaches the teacher."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Optional

import torch
from torch import nn

from ._host.borrowing import borrowed
from .distillation import Distillation
from .layers import LayerGrouping
from .lead import FixedTrust, LinearTrust, Trust
from .learner import CollaborativeLearner
from .outputs import Extract, call_model, check_batches, no_batches
from .relation import Relation
from .report import Report
from .saliency import Probe, SaliencyEstimator, Threshold
from .schedule import RoundSchedule, Schedule
from .selection import Selection
from .update import Guard, MaskedDistillation, SourceLoss, Update
from .validation import Validator

__all__ = ["teach"]

_LEARNING_RATE = 1e-3


def teach(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[Any],
    *,
    student_inputs: Optional[Callable[[Any], Any]] = None,
    view: Optional[Callable[[Any], Any]] = None,
    source_loss: Optional[SourceLoss] = None,
    saliency: Optional[SaliencyEstimator] = None,
    threshold: Optional[Threshold] = None,
    selection: Optional[Selection] = None,
    relation: Optional[Relation] = None,
    validator: Optional[Validator] = None,
    trust: Optional[Trust] = None,
    update: Optional[Update] = None,
    distillation: Optional[Distillation] = None,
    schedule: Optional[RoundSchedule] = None,
    layers: Optional[LayerGrouping] = None,
    probe: Optional[Probe] = None,
    extract: Optional[Extract] = None,
    keep_rounds: int = 1000,
) -> Report:
    """Let a trained student update the teacher's non-salient layers, one round per batch; nothing else is trained.

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
        view: Makes of a batch the same images changed in colour, masked or the like, which the teacher learns on; the
            student's come from these by ``student_inputs``.
        source_loss: A supervised loss on source data as a function of the network; called in every round, so it may
            take a new batch each time.
        saliency: As of :class:`~clda_core.CollaborativeLearner`, like all that follow.
        threshold: The score above which a parameter is salient.
        selection: Chooses the non-salient layers.
        relation: Teacher layer to student layer.
        validator: Scores both networks for ``trust``.
        trust: How far the student is trusted by its lead; by default all the way, since it is trained, or by
            :class:`~clda_core.lead.LinearTrust` where a ``validator`` is given.
        update: What the student does to them; by default that of the learner inside a guard, with longer steps, since
            there are few and the student does not change. It learns on the view and from the source where these are
            given; of another update see what it does with them.
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
    check_batches("batches", batches)
    learner = CollaborativeLearner(
        teacher,
        student,
        saliency=saliency,
        threshold=threshold,
        selection=selection,
        relation=relation,
        validator=validator,
        trust=(FixedTrust() if validator is None else LinearTrust()) if trust is None else trust,
        update=_default(view, source_loss) if update is None else update,
        distillation=distillation,
        schedule=Schedule(interval=1, observe_every=5) if schedule is None else schedule,
        layers=layers,
        probe=probe,
        extract=extract,
        keep_rounds=keep_rounds,
    )
    learner._teaches = True
    empty = True
    for inputs in batches:
        empty = False
        # Outside of what gives the random state back: every batch would get the same draws.
        with torch.no_grad():
            its = inputs if student_inputs is None else student_inputs(inputs)
            changed = None if view is None else view(inputs)
            own = {}
            if student_inputs is not None:
                own = {"student_inputs": its, "student_view": None if view is None else student_inputs(changed)}
        with borrowed(student, doing="distill"):
            learner.distill(call_model(student, its), inputs, view=changed, source_loss=source_loss, **own)
        learner.step(step_fn=lambda: None)
    if empty:
        raise no_batches("teach on")
    return learner.report()


def _default(view: Any, source_loss: Any) -> Update:
    """Return the update that learns from what there is."""
    return Guard(
        MaskedDistillation(
            learning_rate=_LEARNING_RATE,
            learns_on="inputs" if view is None else "view",
            source_weight=0.0 if source_loss is None else 1.0,
        )
    )
