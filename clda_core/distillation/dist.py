"""DIST: the student reproduces how the teacher's predictions relate, not the predictions themselves."""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import autocast_off
from ..errors import check_number
from .base import LogitDistillation, align_logits, unit, weighted_mean

__all__ = ["DISTDistillation", "dist_distillation"]


def dist_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Optional[Tensor] = None,
    *,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
    class_map: Optional[Sequence[int]] = None,
) -> Tensor:
    r"""One minus the Pearson correlation of predictions, across classes and across positions.

    ``L = T² · (inter · mean_i [1 - ρ(p_i·, q_i·)] + intra · mean_c [1 - ρ(p_·c, q_·c)])`` with the tempered
    probabilities ``p`` of the teacher and ``q`` of the student; ``ρ(p_i·, q_i·)`` correlates the classes of position
    ``i``, ``ρ(p_·c, q_·c)`` the valid positions of the whole batch for class ``c``. The mask weighs positions in both.
    Where the teacher's values do not vary there is no relation, and the distance counts as 0 (undefined in the source).

    Args:
        student_logits: Shape ``(N, C, ...)``, float, unnormalised.
        teacher_logits: Shape ``(N, C', ...)``; another grid is resized to the smaller of the two.
        mask: Bool or float weights ``(N,)``, ``(N, ...)`` or ``(N, 1, ...)``, or an integer label map (255 is left
            out).
        temperature: Softmax temperature, > 0, dimensionless.
        inter: Weight of the relation between classes (β), >= 0.
        intra: Weight of the relation within a class (γ), >= 0.
        class_map: For each student class the index of the teacher's class.

    Returns:
        Scalar, float32 (float64 for float64 logits), in ``[0, 2 T² (inter + intra)]``; 0 if no position is valid.

    Raises:
        CldaError: If shapes, classes, devices, dtypes or the mask do not fit, or a number is out of range.

    Note:
        The gradient goes to the student only. The intra-class term depends on the batch, per rank in distributed runs.
        Draws no random numbers, has no effect on BatchNorm.

    Example:
        >>> a = torch.eye(3)
        >>> round(abs(dist_distillation(a, a).item()), 5)
        0.0

    References:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, §4.
        https://arxiv.org/abs/2205.10536
    """
    _check_options(temperature, inter, intra)
    pair = align_logits(student_logits, teacher_logits, mask, class_map).full_precision()
    with autocast_off(student_logits.device.type):
        student, teacher = F.softmax(pair.student / temperature, 1), F.softmax(pair.teacher / temperature, 1)
        classes = student.new_full((), 1 / student.shape[1])
        between = weighted_mean(_distance(student, teacher, classes, (1,)), pair.weights)
        weights = student.new_ones(student.shape[0], student.shape[2]) if pair.weights is None else pair.weights
        total = weights.sum()
        positions = (weights / total.masked_fill(total == 0, 1.0)).unsqueeze(1)
        within = _distance(student, teacher, positions, (0, 2)).mean()
        return temperature**2 * (inter * between + intra * within)


class DISTDistillation(LogitDistillation):
    """:func:`dist_distillation` as a strategy.

    Args:
        temperature: Softmax temperature, > 0.
        inter: Weight of the relation between classes, >= 0.
        intra: Weight of the relation within a class, >= 0.
        weight: Factor of the loss, >= 0.
        class_map: For each student class the index of the teacher's class, where the classes differ.

    Raises:
        CldaError: If an argument is out of range.

    Example:
        >>> DISTDistillation()(torch.eye(3), torch.eye(3)).item()
        0.0
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        inter: float = 1.0,
        intra: float = 1.0,
        weight: float = 1.0,
        class_map: Optional[Sequence[int]] = None,
    ) -> None:
        super().__init__(temperature=temperature, weight=weight, class_map=class_map)
        _check_options(temperature, inter, intra)
        self.inter = inter
        self.intra = intra

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Return the weighted loss of logits ``(N, C, ...)``."""
        loss = dist_distillation(
            student_logits,
            teacher_logits,
            mask,
            temperature=self.temperature,
            inter=self.inter,
            intra=self.intra,
            class_map=self.class_map,
        )
        return self.weight * loss


def _check_options(temperature: float, inter: float, intra: float) -> None:
    check_number("temperature", temperature, above=0)
    check_number("inter", inter, at_least=0)
    check_number("intra", intra, at_least=0)


def _distance(student: Tensor, teacher: Tensor, share: Tensor, dims: Tuple[int, ...]) -> Tensor:
    """Return ``1 - ρ`` along ``dims``, 0 where the teacher does not vary."""
    s, t = _standardised(student, share, dims), _standardised(teacher, share, dims)
    return (t * (t - s)).sum(dims)


def _standardised(values: Tensor, share: Tensor, dims: Tuple[int, ...]) -> Tensor:
    """Centre, and scale to length 1; what varies by no more than rounding counts as constant and becomes 0."""
    centred = values - (share * values).sum(dims, keepdim=True)
    rounding = (share * values.detach().pow(2)).sum(dims, keepdim=True) * (8 * torch.finfo(values.dtype).eps) ** 2
    return unit(centred * share.sqrt(), dims, rounding)
