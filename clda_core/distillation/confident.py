"""Distillation only where the one that teaches is surer than the one that learns."""

from __future__ import annotations

from typing import Callable, Optional

from torch import Tensor

from .._config import Strategy
from ..errors import problem
from .base import align_logits
from .kl import KLDistillation

__all__ = ["WhereMoreConfident", "more_confident"]


def more_confident(student_logits: Tensor, teacher_logits: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    r"""Return the weights of a mask, with 0 where the teacher is not more confident than the student.

    :math:`w_i \, [\max_c p^T_{ic} > \max_c p^S_{ic}]` over positions :math:`i` and classes :math:`c`.

    Args:
        student_logits: Shape ``(N, C, ...)``, of the one that learns.
        teacher_logits: The same classes; another grid is resized to the smaller of the two.
        mask: As for :func:`~clda_core.distillation.kl_distillation`.

    Returns:
        Weights >= 0, shape ``(N, ...)`` on the smaller grid, without a graph.

    Raises:
        CldaError: If the logits or the mask do not fit.

    Example:
        >>> sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> more_confident(unsure, sure).tolist(), more_confident(sure, unsure).tolist()
        ([1.0], [0.0])
    """
    aligned = align_logits(student_logits.detach(), teacher_logits, mask)
    student, teacher, weights = aligned.full_precision()
    surer = (teacher.softmax(dim=1).amax(dim=1) > student.softmax(dim=1).amax(dim=1)).to(aligned.dtype)
    weights = surer if weights is None else surer * weights
    grid = [min(mine, other) for mine, other in zip(student_logits.shape[2:], teacher_logits.shape[2:])]
    return weights.reshape(len(weights), *grid)


class WhereMoreConfident(Strategy):
    """Another loss on logits, restricted by :func:`more_confident`.

    In a teacher's update, where the student teaches, an early student changes nothing that the teacher is sure of.

    Args:
        distillation: The loss, called with logits and a mask; :class:`~clda_core.distillation.KLDistillation` of
            temperature 1 by default.

    Raises:
        CldaError: If the loss is not callable, or reads something else than logits.

    Note:
        Confidence is not correctness: an overconfident student is believed.

    Example:
        >>> loss = WhereMoreConfident()
        >>> loss(torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item()
        0.0
    """

    reads = "logits"

    def __init__(self, distillation: Optional[Callable[..., Tensor]] = None) -> None:
        self.distillation = KLDistillation(temperature=1.0) if distillation is None else distillation
        if not callable(self.distillation) or getattr(self.distillation, "reads", "logits") != "logits":
            raise problem(
                "the loss cannot be restricted to positions",
                expected="a callable of student logits, teacher logits and mask",
                received=repr(distillation),
                fix="pass for example WhereMoreConfident(KLDistillation(temperature=1.0))",
            )

    def __call__(self, student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Return the loss over the positions that are left; see :class:`~clda_core.distillation.Distillation`."""
        return self.distillation(student, teacher, more_confident(student, teacher, mask))
