"""Running teacher and student on target data, in distillation and in rounds, and reading what they put out."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from ._fits import check_fits, check_graph
from ._host.borrowing import evaluating
from ._host.rng import keeping_rng
from .distillation import Distillation
from .distillation.base import in_students_classes
from .errors import problem
from .outputs import Extract, Outputs, as_outputs, call_model
from .step import TargetStep


class Runner:
    """Runs both models, and checks that rounds work on what was distilled.

    Args:
        teacher: The teacher.
        student: The student.
        extract: Reads what they return.
        distillation: The KD loss, whose ``class_map`` says which classes both have.

    Attributes:
        step: The target data of the optimizer step in the making.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, extract: Optional[Extract], distillation: Distillation
    ) -> None:
        self.step = TargetStep()
        self._teacher = teacher
        self._student = student
        self._extract = extract
        self._distillation = distillation
        self._checked = False
        self._own_graph = True

    def check_once(self, student_raw: Any, student: Outputs, teacher_raw: Any, teacher: Outputs, classes: bool) -> None:
        """Raise, at the first call, if outputs can be seen to be something else than the library is for.

        Args:
            student_raw: What the student returned.
            student: What was read from it.
            teacher_raw: What the teacher returned.
            teacher: What was read from it.
            classes: Whether a strategy takes the logits for those of classes that exclude each other.
        """
        if not self._checked:
            check_fits(self._student, student_raw, student, "student", of_classes=classes)
            check_fits(self._teacher, teacher_raw, teacher, "teacher", of_classes=classes)
            self._own_graph = check_graph(self._student, student)
            self._checked = True

    def run_teacher(self, inputs: Any, student: Outputs) -> Any:
        """Return what the teacher returns in eval mode and without a graph.

        Raises:
            CldaError: If there are no inputs, or they seem to be its output.
        """
        if inputs is None:
            raise problem(
                "distill() cannot get the teacher's output",
                expected="inputs or teacher_output=",
                received="neither",
                fix="call learner.distill(student_output, inputs)",
            )
        try:
            with keeping_rng("distill", self._teacher), evaluating(self._teacher), torch.no_grad():
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

    def outputs(self, model: nn.Module, inputs: Any) -> Outputs:
        """Run the teacher or the student in a round.

        Raises:
            CldaError: If the student cannot be run on the inputs, or the logits are of another shape than those that
                were distilled.
        """
        whose = "student" if model is self._student else "teacher"
        try:
            raw = call_model(model, inputs)
        except Exception as error:
            if whose == "teacher":
                raise
            raise problem(
                f"rounds cannot run the student on {'the teacher' if self.step.student_inputs is None else 'it'}'s "
                f"inputs ({type(error).__name__}: {error})",
                expected="what the student is called with, as student_inputs= of distill() if that is something else",
                received=type(inputs).__name__,
                fix="call learner.distill(student_output, inputs, student_inputs=...)",
            ) from error
        outputs = as_outputs(raw, self._extract, whose)
        expected, shape = self.step.shapes.get(whose), tuple(outputs.logits.shape[1:])
        if expected is not None and shape != expected:
            raise problem(
                f"the {whose}'s logits in a round are of another shape than those distilled",
                expected=f"(N, {', '.join(map(str, expected))})",
                received=f"shape {tuple(outputs.logits.shape)} in eval mode",
                fix="pass distill() what the models return, let extract= read what they return in eval mode too, and "
                "pass student_inputs= where the student is called with something else than the teacher",
            )
        if whose == "student" and not self._own_graph:
            raise problem(
                "the logits that were distilled are not the student's alone",
                expected="logits that the student computes from its inputs, by its own parameters",
                received="a graph with other parameters, of a head or an adapter outside of the student perhaps",
                fix="pass student= the whole network that puts out these logits",
            )
        return outputs

    def in_common_classes(self, model: nn.Module, inputs: Any) -> Outputs:
        """Run the teacher or the student in a round; the teacher's logits come in the student's classes."""
        outputs = self.outputs(model, inputs)
        if model is self._student:
            return outputs
        class_map = getattr(self._distillation, "class_map", None)
        return outputs._replace(logits=in_students_classes(outputs.logits, class_map))

    def logits(self, inputs: Any) -> Tensor:
        """Return the teacher's logits in its own classes."""
        return self.outputs(self._teacher, inputs).logits
