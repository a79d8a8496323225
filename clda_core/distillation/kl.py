"""Temperature KL: the student's class distribution matches the teacher's."""

from __future__ import annotations

from typing import Any, Optional, Sequence

import torch
from torch import Tensor

from ..errors import check_number
from .chunked import KeepsGradient, computed, in_chunks, narrowed, never, shares, to_exponentials
from .logit_distillation import LogitDistillation
from .positions import Aligned, align_logits, computing_dtype

__all__ = ["KLDistillation", "kl_distillation"]


def kl_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Optional[Tensor] = None,
    *,
    temperature: float = 2.0,
    class_map: Optional[Sequence[int]] = None,
    ignore_index: Optional[int] = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of the student's tempered class distribution from the teacher's.

    ``L = T² · Σ_i w_i Σ_c p_ic · log(p_ic / q_ic) / Σ_i w_i`` over positions ``i`` and classes ``c``, where
    ``p = softmax(teacher / T)``, ``q = softmax(student / T)`` and ``w`` is the mask. ``T²`` keeps the gradient's size
    nearly independent of ``T``.

    Args:
        student_logits: Shape ``(N, C, ...)``, float, unnormalised.
        teacher_logits: Shape ``(N, C', ...)``, float, unnormalised; another grid is resized to the smaller of the two.
        mask: Bool or float weights ``(N,)``, ``(N, ...)`` or ``(N, 1, ...)``, at any resolution; only their ratios
            matter. With ``ignore_index`` also an integer label map.
        temperature: Softmax temperature, > 0, dimensionless.
        class_map: For each student class the index of the teacher's class.
        ignore_index: The label of positions to leave out, in an integer mask; so is every negative label.

    Returns:
        Scalar, float32 (float64 for float64 logits); sum over classes, mean over valid positions, 0 if there are none.

    Raises:
        CldaError: If shapes, classes, devices, dtypes or the mask do not fit, or ``temperature <= 0``.

    Note:
        The gradient goes to the student only and exists once (no double backward). Between forward and backward one
        tensor of the student's shape and dtype is kept. Draws no random numbers, has no effect on BatchNorm.

    Example:
        >>> a = torch.zeros(2, 3)
        >>> round(kl_distillation(a, a, temperature=2.0).item(), 6)
        0.0

    References:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, §2. https://arxiv.org/abs/1503.02531
    """
    check_number("temperature", temperature, above=0)
    pair = align_logits(student_logits, teacher_logits, mask, class_map, ignore_index)
    return mean_kl(pair, temperature=temperature)


class KLDistillation(LogitDistillation):
    """:func:`kl_distillation` as a strategy.

    Args:
        temperature: Softmax temperature, > 0.
        class_map: For each student class the index of the teacher's class, where the classes differ.

    Raises:
        CldaError: If an argument is out of range.

    Example:
        >>> KLDistillation()(torch.zeros(2, 3), torch.zeros(2, 3)).item()
        0.0
    """

    _loss = staticmethod(kl_distillation)

    def __init__(self, *, temperature: float = 2.0, class_map: Optional[Sequence[int]] = None) -> None:
        super().__init__(temperature=temperature, class_map=class_map)


def mean_kl(pair: Aligned, *, temperature: float = 1.0, dim: int = 1) -> Tensor:
    """Return ``T²`` times the weighted mean of the divergence between distributions along one dimension.

    Args:
        pair: Logits on the same positions; values at weight 0 are never used.
        temperature: Softmax temperature, > 0.
        dim: 1 for the distribution over classes at each position, which counts by its weight; 2 for that over positions
            of each class, in which a position counts by its weight and an image by its largest one.
    """
    return computed(_MeanKL, pair, temperature, dim)


class _MeanKL(KeepsGradient):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Optional[Tensor], temperature: float, dim: int
    ) -> Tensor:
        rows = weights
        if weights is not None and dim == 2:
            rows = weights.amax(1, keepdim=True).expand(-1, student.shape[1])
        share = shares((student.shape[0], student.shape[3 - dim]), rows, student)
        mean = share.new_zeros(())
        # In [-1, 1]; a factor uses the whole range of half precision, whose small end the share of a position is below.
        factor = 2.0**15 if student.dtype == torch.float16 else 1.0
        kept = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for chunk, memory in in_chunks((student, teacher), weights, dim=dim, spare=2):
            logits, exponentials = memory[:2], memory[2:]
            if weights is not None and dim == 2:
                offset = temperature * weights[chunk[0]].unsqueeze(1).to(logits.dtype).log()
                logits.add_(offset).clamp_(min=min(1.0, temperature) * never(logits.dtype))
            x, y = to_exponentials(logits, temperature, dim + 1, out=exponentials)
            total_x, total_y = totals = exponentials.sum(dim + 1, keepdim=True)
            apart = logits[1].sub_(logits[0])
            divergence = apart.mul_(y).sum(dim, keepdim=True).div_(total_y).add_((total_x / total_y).log_())
            mean += (divergence.squeeze(dim) * share[chunk[0], chunk[3 - dim]]).sum()
            if kept is not None:
                scale_x, scale_y = factor / totals
                kept[chunk] = x.mul_(scale_x).addcmul_(y, scale_y, value=-1)
        dtype = computing_dtype(student, teacher)
        if kept is not None:
            KeepsGradient.keep(ctx, kept, share.unsqueeze(dim).to(dtype), temperature / factor, student.dtype)
        return narrowed(mean.clamp_(min=0) * temperature**2, dtype)
