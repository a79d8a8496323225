"""Decoupled distillation: the target class and the rest of the distribution, weighted separately."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import problem
from .chunked import KeepsGradient, computed, in_chunks, narrowed, never, shares
from .logit_distillation import LogitDistillation, check_options
from .masks import nearest, per_position
from .positions import align_logits, computing_dtype, smaller_grid

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
    ignore_index: Optional[int] = None,
) -> Tensor:
    r"""The KL split into target class against rest, and the distribution among the rest.

    ``L = T² · (α · KL(b_t ‖ b_s) + β · KL(p̂_t ‖ p̂_s))``, averaged over valid positions, where ``b = (p_k, 1 - p_k)``
    holds the tempered probability of the target class ``k`` and ``p̂`` is the softmax over the other classes. Plain KL
    would weigh the second term by ``1 - p_k`` of the teacher, so suppress it where the teacher is sure. In the source
    ``k`` is the true label; target data have none, so here it is the teacher's argmax unless ``labels`` are given.

    Args:
        student_logits: Shape ``(N, C, ...)``, float, unnormalised.
        teacher_logits: Shape ``(N, C', ...)``; another grid is resized to the smaller of the two.
        mask: Bool or float weights or labels, as for :func:`~clda_core.distillation.kl_distillation`.
        temperature: Softmax temperature, > 0, dimensionless.
        alpha: Weight of the target-class term, >= 0.
        beta: Weight of the non-target term, >= 0.
        labels: Integer target classes of the student, shape ``(N, ...)``.
        class_map: For each student class the index of the teacher's class.
        ignore_index: The label of positions to leave out, in ``labels`` and in an integer mask; so is every
            negative label.

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
    check_options(temperature, alpha=alpha, beta=beta)
    pair = align_logits(student_logits, teacher_logits, mask, class_map, ignore_index)
    if labels is None:
        target = None
    else:
        target, labelled = _targets(labels, student_logits, smaller_grid(student_logits, teacher_logits), ignore_index)
        labelled = labelled.to(pair.dtype)
        pair = pair._replace(weights=labelled if pair.weights is None else pair.weights * labelled)
    return computed(_Decoupled, pair, target, temperature, alpha, beta)


class DecoupledDistillation(LogitDistillation):
    """:func:`decoupled_distillation` as a strategy; the target class is the teacher's argmax.

    Args:
        temperature: Softmax temperature, > 0.
        alpha: Weight of the target-class term, >= 0.
        beta: Weight of the non-target term, >= 0.
        class_map: For each student class the index of the teacher's class, where the classes differ.

    Raises:
        CldaError: If an argument is out of range.

    Example:
        >>> DecoupledDistillation()(torch.zeros(2, 3), torch.zeros(2, 3)).item()
        0.0
    """

    _loss = staticmethod(decoupled_distillation)
    _weights = ("alpha", "beta")

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        class_map: Optional[Sequence[int]] = None,
    ) -> None:
        super().__init__(temperature=temperature, class_map=class_map)
        check_options(temperature, alpha=alpha, beta=beta)
        self.alpha = alpha
        self.beta = beta


class _Decoupled(KeepsGradient):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        weights: Optional[Tensor],
        target: Optional[Tensor],
        temperature: float,
        alpha: float,
        beta: float,
    ) -> Tensor:
        share = shares((student.shape[0], student.shape[2]), weights, student)
        mean = share.new_zeros(())
        # Kept in [-1, 1], times what uses the whole range of half precision.
        scale = (2.0**15 if student.dtype == torch.float16 else 1.0) / ((alpha + beta) or 1.0)
        kept = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for chunk, logits in in_chunks((student, teacher), weights):
            x, y = logits.div_(temperature)
            k = y.argmax(1, keepdim=True) if target is None else target[chunk[0], :, chunk[2]]
            of_student, of_teacher = _Split.of(x, k), _Split.of(y, k)
            loss = alpha * of_student.target_divergence(of_teacher) + beta * of_student.rest_divergence(of_teacher)
            mean += (loss * share[chunk[0], chunk[2]].unsqueeze(1)).sum()
            if kept is not None:
                surplus = alpha * (of_student.odds.sigmoid() - of_teacher.odds.sigmoid())
                q, p = of_student.log_rest.exp(), of_teacher.log_rest.exp()
                by_logits = (q - p).mul_(beta).addcmul_(surplus, q, value=-1).scatter_(1, k, surplus)
                kept[chunk] = by_logits.mul_(scale)
        dtype = computing_dtype(student, teacher)
        if kept is not None:
            KeepsGradient.keep(ctx, kept, share.unsqueeze(1).to(dtype), temperature / scale, student.dtype)
        return narrowed(mean.clamp_(min=0) * temperature**2, dtype)


class _Split(NamedTuple):
    """A distribution over classes, split into target class against rest, and the distribution among the rest.

    Attributes:
        odds: Shape ``(N, 1, P)``, log of ``p_k / (1 - p_k)``; never from the difference ``1 - p``.
        log_rest: Shape ``(N, C, P)``, log-probabilities among the rest; next to none for the target class.
    """

    odds: Tensor
    log_rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, target: Tensor) -> _Split:
        rest = logits.scatter(1, target, never(logits.dtype))
        any_rest = torch.logsumexp(rest, 1, keepdim=True)
        return cls(logits.gather(1, target) - any_rest, rest - any_rest)

    def target_divergence(self, teacher: _Split) -> Tensor:
        """Return the divergence of (target, rest) from the teacher's, ``(N, 1, P)``."""
        divergence = torch.zeros_like(self.odds)
        for sign in (1, -1):
            log_q, log_p = F.logsigmoid(sign * self.odds), F.logsigmoid(sign * teacher.odds)
            divergence += log_p.exp() * (log_p - log_q)
        return divergence

    def rest_divergence(self, teacher: _Split) -> Tensor:
        """Return the divergence of the distribution among the rest from the teacher's, ``(N, 1, P)``."""
        return (teacher.log_rest.exp() * (teacher.log_rest - self.log_rest)).sum(1, keepdim=True)


def _targets(labels: Tensor, logits: Tensor, grid: Sequence[int], ignore_index: Optional[int]) -> Tuple[Tensor, Tensor]:
    """Return labels as ``(N, 1, P)`` on the grid of the loss, and which ``(N, P)`` of them count."""
    values = nearest(per_position(labels, logits, grid, "labels"), grid)
    if values.is_floating_point() or values.dtype == torch.bool:
        raise problem(
            "the labels are of a wrong dtype",
            expected="integer class indices",
            received=str(labels.dtype),
            fix="pass argmax labels; weights go to mask=",
        )
    values = values.long().reshape(len(values), -1)
    counts = torch.ones_like(values, dtype=torch.bool)
    if ignore_index is not None:
        counts = (values != ignore_index) & (values >= 0)
    classes = logits.shape[1]
    if values.device.type == "cpu" and bool((counts & ((values < 0) | (values >= classes))).any()):
        raise problem(
            "a label is no class of the student",
            expected=f"0 to {classes - 1}" + ("" if ignore_index is None else f", {ignore_index} or a negative number"),
            received=f"labels from {values.min().item()} to {values.max().item()}",
            fix="map the labels to the student's classes, or pass the label of positions to leave out as ignore_index=",
        )
    return values.masked_fill(~counts, 0).unsqueeze(1), counts
