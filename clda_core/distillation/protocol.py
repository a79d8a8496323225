"""What a distillation loss is: any callable of student, teacher and mask, and the two attributes it may have."""

from __future__ import annotations

from typing import Any, Optional, Sequence

from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from ..errors import check_choice, problem
from ..outputs import Outputs

__all__ = ["Distillation", "distillation_loss"]


class Distillation(Protocol):
    """A loss that pulls the student's output towards the teacher's: any callable of three arguments will do.

    A class attribute ``reads`` says what it is called with: ``"logits"`` (also where there is no such attribute) for
    two tensors ``(N, C, ...)``, ``"features"`` for two tuples of tensors, ``"outputs"`` for two
    :class:`~clda_core.outputs.Outputs`. A loss that owns parameters is an ``nn.Module``; the learner trains them.
    Where the networks' classes differ, an attribute ``class_map`` names for each student class the teacher's; rounds
    go by it too.
    """

    def __call__(self, student: Any, teacher: Any, mask: Optional[Tensor], /) -> Tensor:
        """Return a scalar that is differentiable by ``student``.

        Args:
            student: What ``reads`` names, of the student.
            teacher: The same of the teacher, detached.
            mask: ``None``; or which positions count: bool or float weights ``(N,)``, ``(N, ...)`` or ``(N, 1, ...)``
                where ``...`` are the spatial dimensions. Never integers: the learner makes a bool mask of a label map.
        """
        ...


@runtime_checkable
class HasReads(Protocol):
    """A loss that says what it is called with."""

    @property
    def reads(self) -> str:
        """Return ``"logits"``, ``"features"`` or ``"outputs"``."""
        ...


@runtime_checkable
class HasClassMap(Protocol):
    """A loss that says which of the teacher's classes the student's are."""

    @property
    def class_map(self) -> Optional[Sequence[int]]:
        """Return for each student class the index of the teacher's class; ``None`` if they are the same."""
        ...


def reads_of(distillation: Distillation) -> str:
    """Return what a loss is called with: its ``reads``, or ``"logits"``."""
    return distillation.reads if isinstance(distillation, HasReads) else "logits"


def class_map_of(distillation: Distillation) -> Optional[Sequence[int]]:
    """Return the ``class_map`` of a loss, ``None`` if it has none."""
    return distillation.class_map if isinstance(distillation, HasClassMap) else None


def distillation_loss(
    distillation: Distillation, student: Outputs, teacher: Outputs, mask: Optional[Tensor] = None
) -> Tensor:
    """Call a distillation loss with the part of the outputs that its ``reads`` names; the teacher goes in detached.

    Args:
        distillation: A :class:`Distillation`, which may be a plain function of student logits, teacher logits and mask.
        student: What was read from the student's forward pass.
        teacher: What was read from the teacher's forward pass.
        mask: As for :class:`Distillation`.

    Returns:
        The loss, a scalar.

    Raises:
        CldaError: If ``reads`` is unknown, or the loss is no floating-point scalar.

    Example:
        >>> import torch
        >>> outputs = Outputs(torch.zeros(2, 3))
        >>> distillation_loss(lambda s, t, mask: (s - t).pow(2).mean(), outputs, outputs).item()
        0.0
    """
    teacher = Outputs(teacher.logits.detach(), tuple(feature.detach() for feature in teacher.features))
    reads = reads_of(distillation)
    check_choice(f"{type(distillation).__name__}.reads", reads, (*Outputs._fields, "outputs"))
    given = [outputs if reads == "outputs" else getattr(outputs, reads) for outputs in (student, teacher)]
    loss = distillation(given[0], given[1], mask)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        raise problem(
            "the distillation loss is no scalar",
            expected="a floating-point tensor without dimensions",
            received=f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__,
            fix="reduce the loss, for example with .mean()",
        )
    return loss
