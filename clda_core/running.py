"""Running teacher and student on target data, in distillation and in rounds, and reading what they put out."""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Set

from torch import Tensor, nn

from ._host.borrowing import borrowed
from ._host.compat import made_in_inference_mode
from ._host.ranks import world_size
from .distillation import Distillation
from .distillation.class_map import in_students_classes
from .distillation.masks import leaves_nothing
from .distillation.protocol import class_map_of, reads_of
from .distillation.weighted_sum import single_losses
from .errors import problem
from .fits import check_fits, check_graph, check_unnormalised
from .outputs import (
    Extract,
    Outputs,
    as_outputs,
    call_model,
    emptied,
    owned,
    stand_in,
)
from .saliency import PseudoLabelCrossEntropy
from .step import Batch, Pair, Step


class Runner:
    """Runs both models, and checks that rounds work on what was distilled.

    Args:
        teacher: The teacher.
        student: The student.
        extract: Reads what they return.
        distillation: The KD loss, whose ``class_map`` says which classes both have.
        of_classes: Whether a strategy takes the logits for those of classes that exclude each other.

    Attributes:
        class_map: The KD loss's.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        extract: Optional[Extract],
        distillation: Distillation,
        *,
        of_classes: bool,
    ) -> None:
        self._teacher = teacher
        self._student = student
        self._extract = extract
        self.class_map: Optional[Sequence[int]] = class_map_of(distillation)
        self._of_classes = of_classes
        self._of_channels = any(reads_of(loss) == "features" for loss in _ours(distillation))
        self._checked = False
        self._checked_in_rounds: Set[str] = set()
        self._own_graph = True

    def pair(
        self,
        student_output: Any,
        teacher_output: Any,
        batch: Batch,
        *,
        wait: bool,
    ) -> Pair:
        """Return the teacher's outputs beside the student's; the first are checked to be what the library is for.

        Outputs and batch are what ``distill`` got, the mask of bool or float weights; ``wait`` says whether a mask on a
        device may be waited for, to see if it leaves anything.

        Raises:
            CldaError: If there are neither inputs nor the teacher's output, or the outputs of either model do not fit.
        """
        student = as_outputs(student_output, self._extract, "student", may_be_empty=True)
        has_data = _has_samples(student, batch.mask, wait=wait)
        if not has_data:
            if world_size() == 1:
                return Pair(student, None, Batch(), has_data, as_in_rounds=False)
            # The other ranks wait for this one, so it makes all the calls that they make.
            student = stand_in(emptied(student))
            batch = Batch(*map(stand_in, batch))._replace(mask=None)
        raw = self._run_teacher(batch.inputs, student) if teacher_output is None else teacher_output
        teacher = as_outputs(raw, self._extract, "teacher", may_be_empty=not has_data)
        if teacher_output is None or any(map(made_in_inference_mode, (teacher.logits, *teacher.features))):
            teacher = owned(teacher)
        if not has_data:
            teacher = stand_in(emptied(teacher))
        elif not self._checked:
            takes = {"of_classes": self._of_classes, "of_channels": self._of_channels}
            check_fits(self._student, student_output, student, "student", **takes)
            check_fits(self._teacher, raw, teacher, "teacher", **takes)
            self._own_graph = check_graph(self._student, student)
            self._checked = student.logits.requires_grad  # a loss that is only read has no graph to look at
        as_in_rounds = has_data and (teacher_output is None or not self._teacher.training)
        return Pair(student, teacher, batch, has_data, as_in_rounds)

    def in_common_classes(self, step: Step, model: nn.Module, inputs: Any) -> Outputs:
        """Run the teacher or the student in a round; the teacher's logits come in the student's classes."""
        outputs = self.outputs(step, model, inputs)
        return outputs if model is self._student else self.common(outputs)

    def common(self, teacher: Outputs) -> Outputs:
        """Return the teacher's outputs with logits of the student's classes."""
        return teacher._replace(logits=in_students_classes(teacher.logits, self.class_map))

    def outputs(self, step: Step, model: nn.Module, inputs: Any) -> Outputs:
        """Run the teacher or the student in a round after a step.

        Raises:
            CldaError: If the student cannot be run on the inputs, or the logits are of another shape than those that
                were distilled in the step.
        """
        whose = "student" if model is self._student else "teacher"
        try:
            raw = call_model(model, inputs)
        except Exception as error:
            if whose == "teacher":
                raise
            raise problem(
                f"rounds cannot run the student on {'the teacher' if step.batch.student_inputs is None else 'it'}'s "
                f"inputs ({type(error).__name__}: {error})",
                expected="what the student is called with, as student_inputs= of distill() if that is something else",
                received=type(inputs).__name__,
                fix="call learner.distill(student_output, inputs, student_inputs=...)",
            ) from error
        outputs = as_outputs(raw, self._extract, whose)
        expected, shape = step.shapes.get(whose), tuple(outputs.logits.shape[1:])
        if expected is not None and shape != expected:
            raise problem(
                f"the {whose}'s logits in a round are of another shape than those distilled",
                expected=f"(N, {', '.join(map(str, expected))})",
                received=f"shape {tuple(outputs.logits.shape)} in eval mode",
                fix="pass distill() what the models return, before it is resized, let extract= read what they return "
                "in eval mode too, and pass student_inputs= where the student is called with something else than the "
                "teacher",
            )
        if self._of_classes and whose not in self._checked_in_rounds:  # some models end with a softmax in eval mode
            check_unnormalised(outputs.logits, whose)
            self._checked_in_rounds.add(whose)
        if whose == "student" and not self._own_graph:
            raise problem(
                "the logits that were distilled are not the student's alone",
                expected="logits that the student computes from its inputs, by its own parameters",
                received="a graph with other parameters, of a head or an adapter outside of the student perhaps",
                fix="pass student= the whole network that puts out these logits",
            )
        return outputs

    def _run_teacher(self, inputs: Any, student: Outputs) -> Any:
        """Return what the teacher returns in eval mode and without a graph."""
        if inputs is None:
            raise problem(
                "distill() cannot get the teacher's output",
                expected="inputs or teacher_output=",
                received="neither",
                fix="call learner.distill(student_output, inputs)",
            )
        try:
            with borrowed(self._teacher, doing="distill"):
                return call_model(self._teacher, inputs)
        except Exception as error:
            if not isinstance(inputs, Tensor) or inputs.shape != student.logits.shape:
                raise
            raise problem(
                f"the teacher cannot be run on the inputs ({type(error).__name__}: {error})",
                expected="inputs, as the teacher is called with",
                received="a tensor of the shape of the student's logits",
                fix="if it is the teacher's output call learner.distill(student_output, inputs, teacher_output=...)",
            ) from error


def _has_samples(student: Outputs, mask: Optional[Tensor], *, wait: bool) -> bool:
    """Return whether a batch counts; a mask on a device is looked at only if one may ``wait`` for the device."""
    if student.logits.numel() == 0:
        return False
    if mask is None or mask.device != student.logits.device:
        return True
    return not (wait or mask.device.type == "cpu") or not leaves_nothing(mask)


def takes_classes(distillation: Distillation, probe: Any) -> bool:
    """Return whether a strategy of ours reads logits as those of classes that exclude each other."""
    logits = any(reads_of(loss) == "logits" for loss in _ours(distillation))
    return logits or isinstance(probe, PseudoLabelCrossEntropy)


def _ours(distillation: Distillation) -> List[Distillation]:
    return [loss for loss in single_losses(distillation) if _module_of(loss).startswith("clda_core.")]


def _module_of(strategy: Any) -> str:
    return str(getattr(strategy, "__module__", None) or type(strategy).__module__)
