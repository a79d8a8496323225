"""Decoupled distillation: the target class and the rest of the distribution, weighted separately."""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..errors import check_number, problem
from .base import IGNORE_INDEX, NEVER, LogitDistillation, align_logits, nearest, per_position, smaller_grid
from .kl import mean_kl

__all__ = ["DecoupledDistillation", "decoupled_distillation"]


def decoupled_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Optional[Tensor] = None,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    labels: Optional[Tensor] = None,
    class_map: Optional[Sequence[int]] = None,
) -> Tensor:
    r"""The KL split into target class against rest, and the distribution among the rest.

    ``L = T² · (α · KL(b_t ‖ b_s) + β · KL(p̂_t ‖ p̂_s))``, averaged over valid positions, where ``b = (p_k, 1 - p_k)``
    holds the tempered probability of the target class ``k`` and ``p̂`` is the softmax over the other classes. Plain KL
    would weigh the second term by ``1 - p_k`` of the teacher, so suppress it where the teacher is sure. In the source
    ``k`` is the true label; target data have none, so here it is the teacher's argmax unless ``labels`` are given.

    Args:
        student_logits: Shape ``(N, C, ...)``, float, unnormalised.
        teacher_logits: Shape ``(N, C', ...)``; another grid is resized to the smaller of the two.
        mask: Bool or float weights ``(N,)``, ``(N, ...)`` or ``(N, 1, ...)``, or an integer label map (255 is left
            out).
        temperature: Softmax temperature, > 0, dimensionless.
        alpha: Weight of the target-class term, >= 0.
        beta: Weight of the non-target term, >= 0.
        labels: Integer target classes of the student, shape ``(N, ...)``; positions of 255 are left out.
        class_map: For each student class the index of the teacher's class.

    Returns:
        Scalar, float32 (float64 for float64 logits); mean over valid positions, 0 if there are none.

    Raises:
        CldaError: If shapes, classes, devices, dtypes, labels or the mask do not fit, or a number is out of range.

    Note:
        The gradient goes to the student only and exists once (no double backward). Draws no random numbers, has no
        effect on BatchNorm. That labels are below ``C`` is checked on the CPU only.

    Example:
        >>> a = torch.tensor([[1.0, 2.0, 3.0]])
        >>> round(decoupled_distillation(a, a).item(), 6)
        0.0

    References:
        Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, §3. https://arxiv.org/abs/2203.08679
    """
    _check_options(temperature, alpha, beta)
    pair = align_logits(student_logits, teacher_logits, mask, class_map)
    target = None
    if labels is not None:
        target = _targets(labels, student_logits, smaller_grid(student_logits, teacher_logits))
        labelled = (target[:, 0] != IGNORE_INDEX).to(pair.dtype)
        pair = pair._replace(weights=labelled if pair.weights is None else pair.weights * labelled)
        target = target.masked_fill(target == IGNORE_INDEX, 0)
    student, teacher, weights = pair.full_precision()
    if target is None:
        target = teacher.argmax(1, keepdim=True)
    student_target, student_rest = _split(student, target, temperature)
    teacher_target, teacher_rest = _split(teacher, target, temperature)
    target_loss = mean_kl(student_target, teacher_target, weights, temperature=temperature)
    rest_loss = mean_kl(student_rest, teacher_rest, weights, temperature=temperature)
    return alpha * target_loss + beta * rest_loss


class DecoupledDistillation(LogitDistillation):
    """:func:`decoupled_distillation` as a strategy; the target class is the teacher's argmax.

    Args:
        temperature: Softmax temperature, > 0.
        alpha: Weight of the target-class term, >= 0.
        beta: Weight of the non-target term, >= 0.
        weight: Factor of the loss, >= 0.
        class_map: For each student class the index of the teacher's class, where the classes differ.

    Raises:
        CldaError: If an argument is out of range.

    Example:
        >>> DecoupledDistillation()(torch.zeros(2, 3), torch.zeros(2, 3)).item()
        0.0
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        weight: float = 1.0,
        class_map: Optional[Sequence[int]] = None,
    ) -> None:
        super().__init__(temperature=temperature, weight=weight, class_map=class_map)
        _check_options(temperature, alpha, beta)
        self.alpha = alpha
        self.beta = beta

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Return the weighted loss of logits ``(N, C, ...)``."""
        loss = decoupled_distillation(
            student_logits,
            teacher_logits,
            mask,
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
            class_map=self.class_map,
        )
        return self.weight * loss


def _check_options(temperature: float, alpha: float, beta: float) -> None:
    check_number("temperature", temperature, above=0)
    check_number("alpha", alpha, at_least=0)
    check_number("beta", beta, at_least=0)


def _split(logits: Tensor, target: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    """Return logits of (target, rest) and logits among the rest; without ever computing the difference ``1 - p``."""
    rest = logits.scatter(1, target, NEVER)
    any_rest = temperature * torch.logsumexp(rest / temperature, 1, keepdim=True)
    return torch.cat([logits.gather(1, target), any_rest], 1), rest


def _targets(labels: Tensor, logits: Tensor, grid: Sequence[int]) -> Tensor:
    """Return labels as ``(N, 1, P)`` on the grid of the loss."""
    values = nearest(per_position(labels, logits, grid, "labels"), grid)
    if values.is_floating_point() or values.dtype == torch.bool:
        raise problem(
            "the labels are of a wrong dtype",
            expected="integer class indices",
            received=str(labels.dtype),
            fix="pass argmax labels; weights go to mask=",
        )
    classes = logits.shape[1]
    if values.device.type == "cpu" and bool(((values != IGNORE_INDEX) & ((values < 0) | (values >= classes))).any()):
        raise problem(
            "a label is no class of the student",
            expected=f"0 to {classes - 1}, or {IGNORE_INDEX} to leave the position out",
            received=f"labels from {values.min().item()} to {values.max().item()}",
            fix="map the labels to the student's classes",
        )
    return values.reshape(len(values), 1, -1).long()
