"""The learner: distillation at every step, and a round every so many steps."""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping, Optional, cast

import torch
from torch import Tensor, nn
from typing_extensions import Literal

from ._host.accelerate import accelerated
from ._host.half import loss_scale
from ._host.plain import copied, plain
from ._host.stepping import adaptive_rate, check_steppable, make_step, unscale
from ._host.undo import settled
from .distillation import DISTDistillation, Distillation, check_values, distillation_loss
from .distillation.masks import valid_mask
from .distillation.projectors import Projectors
from .errors import CldaError, check_choice, check_number, problem
from .fits import check_trainable
from .layers import LayerGrouping, ModelView, check_models, group_layers, size, warn_if_swapped
from .lead import Lead, LinearTrust, Trust
from .outputs import Extract, check_extract, zero_loss
from .relation import ByRelativeDepth, Relation, needs_inputs
from .report import Report, why_no_round
from .round import Rounds
from .running import Runner, takes_classes
from .saliency import MeanThreshold, Probe, PseudoLabelCrossEntropy, SaliencyEstimator, Taylor, Threshold
from .saliency.observer import LossOrFunction, Observer, check_loss
from .schedule import RoundSchedule, Schedule, makes_rounds
from .selection import DrawnFraction, Selection
from .state import STATE_VERSION, configuration, restore
from .step import Batch, Step, check_views, with_views
from .strategy import ROLES, check_apart, check_strategies
from .update import MaskedDistillation, SourceLoss, Update
from .update.base import check_source_loss, check_teacher, load_state, state_of
from .update.writable import writable_layers
from .validation import Validator

__all__ = ["CollaborativeLearner"]

_FIXED = frozenset({"teacher", "student", "extract", "keep_rounds", *ROLES})


class CollaborativeLearner:
    r"""Distils a teacher into a student, and lets the student update the teacher's non-salient layers in turns.

    A *round* is: teacher gradients → saliency → Layer Saliency Rate (LSR) → selection → relation → who leads → update.
    Between rounds the teacher is constant and :meth:`distill` is ordinary knowledge distillation. The alternation is
    the paper's; every default strategy is this library's choice.

    Args:
        teacher: The big model. Frozen, or co-trained by the host; it is changed in the selected layers only, and
            where it is partly frozen only in what requires gradients. Float32 or wider. Save it with your checkpoints:
            :meth:`state_dict` does not hold it.
        student: The small model that the host trains; never changed by the learner.
        saliency: Scores parameters; :class:`~clda_core.saliency.Taylor` by default.
        threshold: The score above which a parameter is salient, which the LSR counts;
            :class:`~clda_core.saliency.MeanThreshold` by default.
        selection: Chooses the non-salient layers by their LSR; :class:`~clda_core.selection.DrawnFraction` by default.
        relation: Teacher layer to student layer, for updates that need it (the default does not);
            :class:`~clda_core.relation.ByRelativeDepth` by default.
        validator: Scores both networks on target data without labels; by default
            :class:`~clda_core.validation.SoftConsistency` where :meth:`distill` gets a view, and
            :class:`~clda_core.validation.MutualInformation` where it does not.
        trust: How far the student is trusted by its lead over the teacher, a function of the difference in score;
            :class:`~clda_core.lead.LinearTrust` by default.
        update: What happens to the selected layers; :class:`~clda_core.update.MaskedDistillation` by default.
        distillation: The KD loss; :class:`~clda_core.distillation.DISTDistillation` by default.
        schedule: When rounds are made; :class:`~clda_core.schedule.Never` gives frozen-teacher distillation.
        enabled: ``False`` makes every method do nothing but step the optimizer: bit-identical to the host alone.
        layers: Regrouping for both models, see :func:`~clda_core.layers.group_layers`.
        probe: Loss on the teacher's logits whose gradient is observed when the host trains no teacher;
            cross-entropy against the teacher's own hard pseudo-labels by default.
        extract: Reads logits, or :class:`~clda_core.outputs.Outputs`, from what the models return.
        ignore_index: The label of positions without a class in integer masks; without it those are refused.
        keep_rounds: How many of the last rounds :meth:`report` and :meth:`state_dict` hold one by one, >= 1; of those
            before they hold sums.

    Raises:
        CldaError: If the models share memory that is written or trained, a strategy holds one of them as a sub-module,
            rounds cannot write the teacher (half precision, parameters that overlap), or no layer can be related
            although the update needs it.

    Warns:
        UserWarning: If the student is larger than the teacher, so that the two may have been swapped; once, if a step
            that is observed or ends with a round has no target data; if :meth:`step` is followed by a second step.

    Note:
        The learner registers no hooks and no sub-modules and draws from no global random generator; modes,
        ``requires_grad``, ``.grad`` and buffers of both models are the same after every call. It holds O(layers) state,
        plus the optimizer state of what it updates. Its own passes run both models in eval mode, and the host's forward
        hooks run in them: see docs/learner.md. Models and strategies cannot be exchanged after construction.

    Example:
        >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> learner = CollaborativeLearner(teacher, student)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> images = torch.ones(2, 4)
        >>> learner.distill(student(images), images).backward()
        >>> learner.step(optimizer)
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        saliency: Optional[SaliencyEstimator] = None,
        threshold: Optional[Threshold] = None,
        selection: Optional[Selection] = None,
        relation: Optional[Relation] = None,
        validator: Optional[Validator] = None,
        trust: Optional[Trust] = None,
        update: Optional[Update] = None,
        distillation: Optional[Distillation] = None,
        schedule: Optional[RoundSchedule] = None,
        enabled: bool = True,
        layers: Optional[LayerGrouping] = None,
        probe: Optional[Probe] = None,
        extract: Optional[Extract] = None,
        ignore_index: Optional[int] = None,
        keep_rounds: int = 1000,
    ) -> None:
        check_models(teacher, student)
        warn_if_swapped(teacher, student)
        check_number("keep_rounds", keep_rounds, at_least=1, integer=True)
        check_extract(extract)
        valid_mask(None, ignore_index)
        self.teacher = teacher
        self.student = student
        self.saliency: SaliencyEstimator = Taylor() if saliency is None else saliency
        self.threshold: Threshold = MeanThreshold() if threshold is None else threshold
        self.selection: Selection = DrawnFraction() if selection is None else selection
        self.relation: Relation = ByRelativeDepth() if relation is None else relation
        self.validator = validator  # None is a choice of its own, by what distill() gets
        self.trust: Trust = LinearTrust() if trust is None else trust
        self.update: Update = MaskedDistillation() if update is None else update
        self.distillation: Distillation = DISTDistillation() if distillation is None else distillation
        self.schedule: RoundSchedule = Schedule() if schedule is None else schedule
        self.enabled = enabled
        self.probe: Probe = PseudoLabelCrossEntropy() if probe is None else probe
        self.extract = extract
        self.ignore_index = ignore_index
        self.keep_rounds = keep_rounds
        self._strategies = {role: getattr(self, role) for role in ROLES}
        check_strategies(self._strategies)
        for role, strategy in self._strategies.items():
            check_apart(role, strategy, (teacher, student))
        whole = ModelView(teacher, group_layers(teacher, layers))
        # Relations are between whole models; observed and written is what the host has not frozen.
        self._writable = ModelView(teacher, writable_layers(whole))
        self._student_view = ModelView(student, group_layers(student, layers))
        classes = takes_classes(self.distillation, self.probe if makes_rounds(self.schedule) else None)
        self._runner = Runner(teacher, student, extract, self.distillation, of_classes=classes)
        self._observer = Observer(self._writable, self.saliency, self.threshold, self.probe, self._logits)
        self._rounds = Rounds(
            whole,
            self._writable,
            self._student_view,
            self._observer,
            self._runner,
            Lead(self.validator, self.trust),
            saliency=self.saliency,
            selection=self.selection,
            relation=self.relation,
            update=self.update,
            schedule=self.schedule,
            keep=keep_rounds,
        )
        self._projectors = Projectors(self.distillation, (teacher, student))
        self._step = Step()
        self._steps = 0
        self._kd_loss: Optional[Tensor] = None
        self._teaches = False  # set by teach(), which makes steps without gradients
        if not needs_inputs(self.relation):
            self._rounds.relate(self._step)
        self._rounds.check_teacher(written=enabled)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to exchange models or strategies: observations, relation and checkpoints are of those built with."""
        if name in _FIXED and name in vars(self):
            raise problem(
                f"learner.{name} cannot be replaced",
                expected=f"the {name} that the learner was built with",
                received=type(value).__name__,
                fix=f"build a new CollaborativeLearner with {name}=; only enabled may be assigned",
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        """Say in a few lines what the learner is made of."""
        related = self._rounds.related
        pairs = None if related is None else [layer for layer in self._writable.layers if layer.name in related.pairs]
        relation = "to be related in the first round" if pairs is None else f"{len(pairs)} of them related"
        parts = {
            "teacher": f"{_described(self._writable)}, {relation}",
            "student": _described(self._student_view),
            **self._strategies,
            "so far": f"{self._steps} steps, {self.report().made} rounds{'' if self.enabled else ', not enabled'}",
        }
        return "\n".join([f"{type(self).__name__}(", *(f"  {name}: {part}" for name, part in parts.items()), ")"])

    # ------------------------------------------------------------------------------------------------ every step

    @property
    def observing(self) -> bool:
        """Whether gradients are observed at the optimizer step now in the making, if it has target data."""
        return self.enabled and self._rounds.observed(self._steps + 1)

    @settled
    def distill(
        self,
        student_output: Any,
        inputs: Any = None,
        *,
        teacher_output: Any = None,
        mask: Optional[Tensor] = None,
        student_inputs: Any = None,
        view: Any = None,
        student_view: Any = None,
        source_loss: Optional[SourceLoss] = None,
    ) -> Tensor:
        """Return the KD loss of the student's output against the teacher's.

        Args:
            student_output: What the student returned, with its graph; possibly for another view of the same images.
            inputs: What the teacher is called with: a tuple of arguments, a mapping of keyword arguments, or anything
                else as the one argument.
            teacher_output: The teacher's output if the host has it already; ``inputs`` are then used in rounds only.
            mask: What counts: bool or float weights ``(N, ...)`` without the class dimension; or an integer label map,
                of which ``ignore_index`` and negative labels are left out.
            student_inputs: What rounds call the student with, where that is something else.
            view: The same images changed in colour, masked or the like, position for position, as the teacher is called
                with them: both networks are validated by it. Or a function without arguments that returns them; it is
                called at steps that are observed or end with a round, and at the first.
            student_view: The same for the student, where it has ``student_inputs``.
            source_loss: The host's supervised loss on this step's source data as a function of the network, for example
                ``lambda teacher: F.cross_entropy(teacher(images_s), labels_s)``; for updates that take it in
                (``MaskedDistillation(source_weight=1.0)``), with the teacher in eval mode.

        Returns:
            A scalar to add to the host's loss; its gradient reaches the student (and our projectors) only. It is 0 for
            an empty batch and where the mask leaves nothing.

        Raises:
            CldaError: If neither ``inputs`` nor ``teacher_output`` is given, the student's output has no graph although
                gradients are enabled, outputs do not fit each other or are no class scores, or logits are not finite.
                The last is checked on the CPU only: elsewhere it would cost a synchronisation with the device at every
                step, so NaN passes into the loss.

        Note:
            Under ``torch.no_grad()`` the loss is only read, on validation data for example: rounds are not made of it.
            On one of several ranks without data the loss keeps its graph, and the rank adds nothing to what the ranks
            average.
        """
        if not self.enabled:
            reference = student_output if isinstance(student_output, Tensor) else torch.zeros(())
            return torch.zeros((), dtype=reference.dtype, device=reference.device, requires_grad=True)
        of_step = torch.is_grad_enabled() or self._teaches
        step = self._step if of_step else Step()
        in_round = of_step and self._rounds.concern(self._steps + 1)
        mask = valid_mask(mask, self.ignore_index)
        check_source_loss(source_loss)
        batch = Batch(inputs, student_inputs, view, student_view, source_loss, mask)
        check_views(batch)
        keeps = in_round or (of_step and not self._rounds.rehearsed)
        pair = self._runner.pair(student_output, teacher_output, with_views(batch, wanted=keeps), wait=in_round)
        step.has_data = pair.has_data or bool(step.has_data)
        if pair.teacher is None:  # nothing to distil
            loss = zero_loss(pair.student)
        else:
            check_values(pair.student.logits, pair.teacher.logits, pair.batch.mask)
            loss = distillation_loss(self.distillation, pair.student, pair.teacher, pair.batch.mask)
        check_trainable(pair.student)
        if not pair.has_data:
            loss = loss * 0  # with its graph: the backward() of ranks with data waits for this one's
        if of_step:
            step.count_call()
            self._kd_loss = loss.detach()
            self._rounds.take_inputs |= pair.batch.inputs is not None
        # Of the micro-batches of an accumulated step the last one with data is the round's.
        if keeps and pair.batch.inputs is not None and (pair.has_data or step.batch.inputs is None):
            step.keep(pair)
        return loss

    @settled
    def step(
        self,
        optimizer: Any = None,
        *,
        scaler: Any = None,
        step_fn: Optional[Callable[[], Any]] = None,
        stepped: Optional[Callable[[], bool]] = None,
    ) -> Optional[Any]:
        """Observe, step the optimizer, and make a round if one is due: sugar over :meth:`observe`, :meth:`after_step`.

        A step that is skipped is no step for the learner either.

        Args:
            optimizer: Anything with ``step()``. Accelerate's says itself when it skips a step or accumulates.
            scaler: A GradScaler, whose ``step(optimizer)`` is then called; ``scaler.update()`` stays yours to call. It
                is noticed when it skips a step. Accelerate's optimizer has its own.
            step_fn: Does the step instead, for optimizers that need more than ``step()`` (SAM, LBFGS closures).
            stepped: Asked after the step whether it was made, for an ``optimizer`` or ``step_fn`` that may skip it.

        Returns:
            What the optimizer's ``step()`` or ``step_fn`` returned.

        Raises:
            CldaError: If there is nothing to step, a SAM optimizer comes without ``step_fn``, or the optimizer raises
                (its exception is the cause); the learner is then as before.
        """
        check_steppable(optimizer, scaler, step_fn, stepped, self.student if self.observing else None)
        engines = accelerated(optimizer)
        if not self.enabled or (step_fn is None and engines is not None and engines.accumulates):
            return make_step(optimizer, scaler, step_fn)[0]
        scaled_by, inner = (engines.scaler, engines.optimizer) if scaler is None and engines else (scaler, optimizer)
        self._unscale(scaled_by)
        if "target" not in self._step.observed:
            if scaled_by is not None and self.observing and self._observer.host_trains_teacher():
                unscale(scaled_by, inner)
            self.observe()
        try:
            result, made = make_step(optimizer, scaler, step_fn, stepped)
        except Exception as error:
            self._drop_step()
            raise CldaError(
                f"the optimizer step raised {type(error).__name__}: {error}. The learner has not counted this step. "
                "Fix: see the exception that caused this one"
            ) from error
        self.after_step(stepped=made, optimizer=optimizer)
        self._step.follow(inner, self._steps)
        return result

    # -------------------------------------------------------------------------------------------- the two halves

    @settled
    def observe(
        self,
        loss: Optional[LossOrFunction] = None,
        *,
        domain: Literal["target", "source"] = "target",
        scaler: Any = None,
    ) -> None:
        """Observe the teacher's gradients; call it after ``backward()`` and before the optimizer step.

        Observes nothing unless :attr:`observing`, and no target data where the step has none: ``distill`` was not
        called, or with nothing but empty batches. The first step with target data rehearses a round, whatever the
        schedule says: what would fail in a round fails here, and nothing is written.

        The gradients are, in this order: those of ``loss`` if given; those that the host left on a co-trained teacher's
        parameters (left-overs from before the learner was built, and what was observed before, do not count); those of
        the probe on this step's ``inputs``.

        Args:
            loss: A scalar with a graph to the teacher, or a function of the teacher that returns one, for example
                ``lambda teacher: F.cross_entropy(teacher(images_s), labels_s)``; a function is called in eval mode and
                only when needed, and works for a frozen teacher.
            domain: Whether the batch is target or source data; source observations serve
                :class:`~clda_core.selection.DomainShift` and :class:`~clda_core.saliency.ReferenceThreshold`.
            scaler: The GradScaler that scaled the host's loss, if :meth:`step` does not get it: it does not know the
                parameters of a KD loss, whose gradients are unscaled here. The losses of this step's observation and
                round are then scaled too. The gradients of a co-trained teacher are yours to unscale before.

        Raises:
            CldaError: If there is nothing to observe, the loss cannot be differentiated by the teacher, or the
                rehearsal of a round fails.
        """
        check_choice("domain", domain, ("target", "source"))
        check_loss(loss)
        if self.enabled:
            self._unscale(scaler)
            self._rounds.observe(self._step, self._steps + 1, loss, domain)
            self._step.observed.add(domain)

    @settled
    def after_step(self, *, stepped: bool = True, optimizer: Any = None) -> None:
        """Count the optimizer step and make a round if the schedule says so; call it after the optimizer step.

        A round that is due at a step without target data is made at the next step with some.

        Args:
            stepped: ``False`` if the step was skipped, by a GradScaler for example: nothing is counted then, and what
                was observed for it is dropped.
            optimizer: The host's, by whose learning rate an update may choose its own.

        Raises:
            CldaError: If :meth:`observe` was not called for this step, an update raised (its exception is the cause),
                or observations were non-finite ten times in a row; the teacher is then as before the round. A single
                non-finite observation is discarded and counted, and its round skipped.
        """
        if not self.enabled:
            return
        if not self._step.observed:
            raise problem(
                "after_step() came without observe()",
                expected="observe(), the optimizer step, after_step(), in this order",
                received="after_step() alone",
                fix="call learner.observe() after backward(), or use learner.step(optimizer)",
            )
        if not stepped:
            self._drop_step()
            return
        self._steps += 1
        if self._rounds.due(self._steps):
            self._step.learning_rate = adaptive_rate(optimizer)
        try:
            self._projectors.step()
            self._rounds.follow(self._step, self._steps)
        finally:
            self._drop_step()

    # ------------------------------------------------------------------------------------------ state and report

    def state_dict(self) -> Dict[str, Any]:
        """Return the learner's state: tensors and plain Python types only, so ``weights_only=True`` loads it.

        It holds counters, observations, history, the relation, the configuration, and the state of the update's and the
        projectors' optimizers. The models are not in it: save the teacher beside the student, since it changes.

        Raises:
            CldaError: If a strategy of yours puts anything else into its state or its figures; the message names it.
        """
        state = {
            "version": STATE_VERSION,
            "config": configuration(self._strategies, self._writable, self._student_view),
            "steps": self._steps,
            **self._rounds.state_dict(),
            "observer": self._observer.state_dict(),
            # Copies, since optimizers give out the tensors that their next steps write to.
            "update": copied(state_of(self.update)),
            "projectors": copied(self._projectors.state_dict()),
        }
        return cast(Dict[str, Any], plain(state, "the learner's state"))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, into a learner of the same architecture and configuration.

        States of all former versions of the format are read.

        Raises:
            CldaError: If the state is of a newer version, another architecture or configuration; nothing is changed
                then.
        """
        # A relation by similarity depends on the batch it was made on, so the saved one replaces ours.
        restore(state, self.state_dict(), self._load, relation_may_differ=needs_inputs(self.relation))
        self._drop_step()

    def _load(self, state: Mapping[str, Any]) -> None:
        self._observer.load_state_dict(state["observer"])
        self._projectors.load_state_dict(state["projectors"])
        self._rounds.load_state_dict(state)
        load_state(self.update, state["update"])
        check_teacher(self.update, self.teacher)
        self._steps = int(state["steps"])

    def report(self) -> Report:
        """Return the history: ``print(report)``, ``report.to_dict()``, ``report.plot()``."""
        related, history = self._rounds.related, self._rounds.history
        return Report(
            layers=tuple(layer.name for layer in self._writable.layers),
            rounds=history.rounds,
            unrelated={} if related is None else dict(related.unrelated),
            steps=self._steps,
            discarded=self._observer.discarded,
            earlier=history.earlier,
            no_round=why_no_round(history.rounds, self.schedule, self._steps, self._rounds.owed, self.enabled),
        )

    def metrics(self) -> Dict[str, float]:
        """Return the latest figures as a flat dict for any logger; the KD loss costs one synchronisation."""
        figures = self.report().metrics()
        if self._kd_loss is not None:
            figures["clda/kd_loss"] = float(self._kd_loss)
        return figures

    # ------------------------------------------------------------------------------------------------- internals

    def _unscale(self, scaler: Any) -> None:
        """Divide the gradients of this step that a GradScaler does not know by its scale, once, and note the scaler."""
        if scaler is not None:
            self._step.loss_scale = loss_scale(scaler)
        if not self._step.unscaled:
            self._step.unscaled = self._projectors.unscale(scaler)

    def _drop_step(self) -> None:
        """Drop the step in the making: it is made, skipped, or was interrupted."""
        self._step = Step()
        self._observer.drop_leftover()
        self._projectors.drop_gradients()

    def _logits(self, inputs: Any) -> Tensor:
        """Return the teacher's logits in its own classes, for the probe."""
        return self._runner.outputs(self._step, self.teacher, inputs).logits


def _described(view: ModelView) -> str:
    layers = f"{len(view.layers)} layer{'' if len(view.layers) == 1 else 's'}"
    return f"{type(view.model).__name__} of {size(view.model):,} parameters in {layers}"
