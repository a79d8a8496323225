"""A round: rates → selection → relation → update → record, whole or not at all."""

from __future__ import annotations

import functools
import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

import torch

from ._host.borrowing import borrowed
from ._host.ranks import adding
from ._host.undo import undoing
from .errors import CldaError, check_number, problem
from .history import Earlier, History, RoundRecord
from .layers import Layer, ModelView, canonical_parameters
from .lead import Lead
from .relation import RelatedLayers, Relation, check_related, needs_inputs
from .running import Runner
from .saliency import SaliencyEstimator
from .saliency.host_gradients import explained
from .saliency.observer import LossOrFunction, Observer
from .schedule import RoundSchedule, makes_rounds
from .selection import Selection, select
from .step import Step
from .update import RoundContext, Update, UpdateResult
from .update.base import check_result, check_update, needs_relation, rehearse, weighs_trust
from .update.writable import check_memory, check_precision, check_writable, written_now

NO_STRENGTH = "the schedule's strength is 0"


class Rounds:
    """Makes the rounds of one learner, and keeps what is known from one to the next.

    Args:
        teacher: The teacher and all its layers, which are related.
        writable: The teacher and what of its layers may be observed and written.
        student: The student and its layers.
        observer: Observes the teacher.
        runner: Runs both models.
        lead: Says how far the student is trusted.
        saliency: Scores parameters.
        selection: Chooses layers.
        relation: Relates them.
        update: Changes them.
        schedule: Says when.
        keep: How many rounds are kept one by one.

    Attributes:
        history: The rounds made.
        related: The relation; ``None`` until the first round where it needs inputs.
        owed: The step whose round waits for target data, or ``None``.
        rehearsed: Whether a round was rehearsed, or need not be.
        take_inputs: Whether ``distill`` was ever given inputs, which rounds then wait for.
        peak: The host's highest learning rate in any round, where its optimizer is of Adam's kind; else 0.
    """

    def __init__(
        self,
        teacher: ModelView,
        writable: ModelView,
        student: ModelView,
        observer: Observer,
        runner: Runner,
        lead: Lead,
        *,
        saliency: SaliencyEstimator,
        selection: Selection,
        relation: Relation,
        update: Update,
        schedule: RoundSchedule,
        keep: int,
    ) -> None:
        check_update(update)
        self.history = History()
        self.related: Optional[RelatedLayers] = None
        self.owed: Optional[int] = None
        self.rehearsed = not makes_rounds(schedule)
        self.take_inputs = False
        self.peak = 0.0
        self._teacher = teacher
        self._writable = writable
        self._student = student
        self._observer = observer
        self._runner = runner
        self._lead = lead
        self._saliency = saliency
        self._selection = selection
        self._relation = relation
        self._update = update
        self._schedule = schedule
        self._keep = keep
        self._checked = False
        self._warned = False
        self._shapes = {"teacher": (teacher, _shapes(teacher)), "student": (student, _shapes(student))}

    # ------------------------------------------------------------------------------------------------------- when

    def due(self, number: int) -> bool:
        """Return whether optimizer step ``number`` ends with a round, if it has target data."""
        return self.owed is not None or self._schedule.due(number)

    def observed(self, number: int) -> bool:
        """Return whether gradients are observed at a step, be it for a round that is owed."""
        return self._schedule.observes(number) or (self.owed is not None and self._schedule.observes(self.owed))

    def concern(self, number: int) -> bool:
        """Return whether a step is observed or ends with a round."""
        return self.observed(number) or self.due(number)

    def has_target(self, step: Step, *, for_round: bool = False) -> bool:
        """Return whether a step has target data on any rank; every rank gets the same answer."""
        if step.has_data is None:  # a loss that is observed has data of its own, though none for an update to run on
            return step.loss_given and not (for_round and self.take_inputs)
        device = next(self._teacher.model.parameters()).device
        return step.anywhere(device) and not (for_round and step.missed)

    def _warn_of_no_data(self, number: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"optimizer step {number} has no target data: distill() was not called, or its batch was empty or "
                "masked out whole. Nothing is observed at such a step, and a round that is due is made at the next "
                "step with target data. This is said once",
                stacklevel=5,
            )

    # ------------------------------------------------------------------------------------------- around every step

    def observe(self, step: Step, number: int, loss: Optional[LossOrFunction], domain: str) -> None:
        """Observe the teacher before an optimizer step, where the schedule says so; rehearse a round at the first.

        ``number`` is the step's, from 1; ``loss`` is ``None`` for the host's gradients or else the probe.
        """
        if not self._checked:
            self.check_teacher()
            self._checked = True
        observed, target = self.observed(number), domain == "target"
        if target:
            step.loss_given |= loss is not None
            whole_round = observed and self.due(number)  # which fails as early as its rehearsal would
            if not self.rehearsed and step.has_data is not None and not whole_round and self.has_target(step):
                probed = loss is None and (self._saliency.order == 2 or not self._observer.host_trains_teacher())
                self.rehearse(step, probed=probed)
                self.rehearsed = True
        if not observed:
            return
        self._check_as_built()
        if target and not self.has_target(step):
            step.missed = True
            self._warn_of_no_data(number)
            return
        lent = borrowed(self._teacher.model, doing=f"observe {domain}", passes=False)
        with adding(step.adds or not target), lent:
            step.pending.append(
                self._observer.observe(loss, domain, step.batch.inputs, step.batch.mask, loss_scale=step.loss_scale)
            )
        step.missed &= not target

    def follow(self, step: Step, number: int) -> None:
        """Count what was observed for an optimizer step that was made, and make the round that is due after it."""
        observed, due = self.observed(number), self.due(number)
        finite = self._observer.commit(step.pending)
        if due and not self.has_target(step, for_round=True):
            if self.owed is None or not self._schedule.observes(self.owed):
                self.owed = number
            self._warn_of_no_data(number)
        elif due:
            self.owed = None
            if finite:
                self.make(step, number, observed=observed)

    def check_teacher(self, *, written: bool = True) -> None:
        """Raise if rounds could not write the teacher as it is now.

        Args:
            written: Whether any round may follow.
        """
        written &= makes_rounds(self._schedule)
        layers = self._writable.layers if written else ()
        check_memory(self._teacher.model, self._student.model, layers)
        if written:
            check_writable(self._writable, self._saliency)

    # ---------------------------------------------------------------------------------------------------- a round

    def make(self, step: Step, number: int, *, observed: bool) -> None:
        """Make the round after an optimizer step; none before anything was observed.

        Args:
            step: What it had of target data.
            number: Its number, from 1.
            observed: Whether it should have been observed: without rates of its own there is no round then, while
                others go by the rates of the round before.

        Raises:
            CldaError: If a strategy returned something else than it should, or raised (the cause); everything is then
                as before.
        """
        with self._borrowing("round", step):
            self._check_as_built()
            layers = {layer.name: layer for layer in written_now(self._writable, self._observer.averages.known)}
            rates = self._observer.rates(renewed=observed)
            known = {name: rate for name, rate in rates.target.items() if name in layers}
            if not known:
                return
            check_precision(self._writable.model, tuple(layers.values()))
            selected = select(self._selection, known, rates.source, number)
            self.relate(step)
            chosen = tuple(layers[name] for name in layers if name in selected)
            context = self._context(step, chosen)
            with self._whole_or_not(context):
                strength = self._schedule.strength(number)
                check_number("the schedule's strength", strength, at_least=0, at_most=1)
                look = self._lead.look(context, renewed=observed)
                context = replace(context, strength=strength, trust=look.trust, learning_rate=self._peak(step))
                result = self._apply(context, look.reason)
                torch.clear_autocast_cache()  # of the weights before, should the host go on in its autocast
                self._observer.end_round(rates)
                record = RoundRecord(
                    step=number,
                    rates=dict(rates.target),
                    source_rates=dict(rates.source),
                    selected=tuple(layer.name for layer in context.layers),
                    updated=result.updated,
                    skipped=dict(result.skipped),
                    strength=context.strength,
                    lead=look.lead,
                    lead_by_class=look.by_class,
                    trust=look.trust,
                    accepted=result.accepted,
                    score_before=result.score_before,
                    score_after=result.score_after,
                )
                self.history = self.history.and_then(record, keep=self._keep)
            self.rehearsed |= bool(result.updated)  # all that a rehearsal tries was done

    def rehearse(self, step: Step, *, probed: bool) -> None:
        """Do all of a round that can fail, but write nothing.

        Args:
            step: The first with target data.
            probed: Whether rounds observe the teacher by the probe.
        """
        self._check_as_built()
        with self._borrowing("rehearse", step), explained():
            if probed:
                self._observer.rehearse(step.batch.inputs, step.batch.mask)
            context = self._context(step, self._writable.layers)
            self._lead.rehearse(context)
            if needs_inputs(self._relation):
                context.predict(context.teacher)
                context.student_outputs()
                self._relation_on(step, needed=False)
            rehearse(self._update, context)
        torch.clear_autocast_cache()

    def relate(self, step: Step) -> None:
        """Relate the models' layers, unless that was done before.

        Raises:
            CldaError: If no layer can be related although the update needs that.
        """
        if self.related is None:
            self.related = self._relation_on(step, needed=needs_relation(self._update))

    def _check_as_built(self) -> None:
        """Raise if the teacher, or the student where its layers matter, is not what the learner was built with."""
        for whose in ("teacher", "student") if needs_relation(self._update) else ("teacher",):
            view, built = self._shapes[whose]
            now = canonical_parameters(view.model)
            for name, shape in built.items():
                if name not in now or now[name].shape != shape:
                    raise problem(
                        f"the {whose}'s parameters were renamed, resized or replaced after the learner was built",
                        expected=f"{name!r} of shape {tuple(shape)}",
                        received=f"shape {tuple(now[name].shape)}" if name in now else "no such parameter",
                        fix="prune, parametrize (weight_norm, spectral_norm), add or merge adapters before you build "
                        "the learner, or build a new one afterwards",
                    )

    def _relation_on(self, step: Step, *, needed: bool) -> RelatedLayers:
        student = self._student._replace(inputs=step.batch.student_inputs)
        related = self._relation(self._teacher, student, step.batch.inputs)
        check_related(related, self._teacher, self._student, needed)
        return related

    def _context(self, step: Step, layers: Tuple[Layer, ...]) -> RoundContext:
        # By its host, since distill() ran it.
        trained = any(parameter.requires_grad for parameter in canonical_parameters(self._teacher.model).values())
        return RoundContext(
            teacher=self._teacher.model,
            student=self._student.model,
            layers=layers,
            related={} if self.related is None else self.related.pairs,
            **step.batch._asdict(),
            forward=functools.partial(self._runner.in_common_classes, step),
            class_map=self._runner.class_map,
            loss_scale=step.loss_scale,
            cotrained=self._observer.cotrained,
            teacher_before=None if step.teacher is None or trained else self._runner.common(step.teacher),
        )

    def _peak(self, step: Step) -> Optional[float]:
        """Return the host's highest learning rate so far, where that is known: 0 at the start of a warm-up."""
        if step.learning_rate is None:
            return self.peak or None
        self.peak = max(self.peak, step.learning_rate)
        return self.peak

    def _apply(self, context: RoundContext, not_trusted: str) -> UpdateResult:
        if not context.layers:
            return UpdateResult(())
        weighs = weighs_trust(self._update)
        strength = context.strength if weighs else context.strength * context.trust
        if not strength:  # not even moments may move, and zero times infinity is no zero
            reason = not_trusted if context.strength else NO_STRENGTH
            return UpdateResult((), {layer.name: reason for layer in context.layers})
        context.before(self._update)  # what _whole_or_not goes back to
        try:
            result = self._update.apply(replace(context, strength=strength))
            check_result(result, context.layers)
            return result
        except Exception as error:
            raise CldaError(
                f"the update {type(self._update).__name__} raised {type(error).__name__}: {error}. The teacher is as "
                "it was before the round. Fix: see the exception that caused this one"
            ) from error

    @contextmanager
    def _borrowing(self, doing: str, step: Step) -> Iterator[None]:
        """Lend the models to a round. Compiled, they would be compiled anew for every set of selected layers."""
        models = (self._teacher.model, self._student.model)
        with adding(step.adds), borrowed(*models, doing=doing, passes=False):
            yield

    @contextmanager
    def _whole_or_not(self, context: RoundContext) -> Iterator[None]:
        """Undo all of a round that does not come to its end: the teacher, the update's state and what is averaged."""
        own = self.history, self._observer.averages, self._lead.averages, self.peak

        def give_back() -> None:
            context.take_back(self._update)
            self.history, self._observer.averages, self._lead.averages, self.peak = own

        with undoing(give_back, on_error_only=True):
            yield

    # ---------------------------------------------------------------------------------------------------- its state

    def state_dict(self) -> Dict[str, Any]:
        """Return the rounds made, when the next ones may be, and the relation as plain Python data."""
        related = self.related
        return {
            "owed": self.owed,
            "rehearsed": self.rehearsed,
            "take_inputs": self.take_inputs,
            "peak": self.peak,
            "lead": self._lead.state_dict(),
            "history": [record.to_dict() for record in self.history.rounds],
            "earlier": self.history.earlier.to_dict(),
            "relation": None
            if related is None
            else {
                "pairs": {name: layer.name for name, layer in related.pairs.items()},
                "unrelated": dict(related.unrelated),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; on an error everything is as before.

        A relation that is made without inputs stays: it follows from the models.
        """
        owed = None if state["owed"] is None else int(state["owed"])
        peak = float(state["peak"])
        rounds = tuple(RoundRecord.from_dict(record) for record in state["history"])
        history = History(rounds, Earlier(**state["earlier"])).last(self._keep)
        related, saved = self.related, state["relation"]
        if needs_inputs(self._relation):
            students = {layer.name: layer for layer in self._student.layers}
            related = (
                None
                if saved is None
                else RelatedLayers(
                    {name: students[other] for name, other in saved["pairs"].items()}, dict(saved["unrelated"])
                )
            )
        self._lead.load_state_dict(state["lead"])
        self.rehearsed, self.take_inputs = bool(state["rehearsed"]), bool(state["take_inputs"])
        self.owed, self.peak, self.history, self.related = owed, peak, history, related


def _shapes(view: ModelView) -> Dict[str, torch.Size]:
    """Return the shape of every parameter of the layers by canonical name."""
    parameters = canonical_parameters(view.model)
    return {name: parameters[name].shape for layer in view.layers for name in layer.parameters}
