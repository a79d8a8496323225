"""Temperature KL: the student's class distribution matches the teacher's."""

from __future__ import annotations

from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import autocast_off
from ..errors import check_number
from .base import LogitDistillation, align_logits, computing_dtype
from .chunked import chunks, only_first_derivatives, shares, values_in

__all__ = ["KLDistillation", "kl_distillation"]


def kl_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Optional[Tensor] = None,
    *,
    temperature: float = 2.0,
    class_map: Optional[Sequence[int]] = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of the student's tempered class distribution from the teacher's.

    ``L = T² · Σ_i w_i Σ_c p_ic · log(p_ic / q_ic) / Σ_i w_i`` over positions ``i`` and classes ``c``, where
    ``p = softmax(teacher / T)``, ``q = softmax(student / T)`` and ``w`` is the mask. ``T²`` keeps the gradient's size
    nearly independent of ``T``.

    Args:
        student_logits: Shape ``(N, C, ...)``, float, unnormalised.
        teacher_logits: Shape ``(N, C', ...)``, float, unnormalised; another grid is resized to the smaller of the two.
        mask: Bool or float weights ``(N,)``, ``(N, ...)`` or ``(N, 1, ...)``, or an integer label map (255 is left
            out); only the ratios of the weights matter.
        temperature: Softmax temperature, > 0, dimensionless.
        class_map: For each student class the index of the teacher's class.

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
    return mean_kl(*align_logits(student_logits, teacher_logits, mask, class_map), temperature=temperature)


class KLDistillation(LogitDistillation):
    """:func:`kl_distillation` as a strategy.

    Args:
        temperature: Softmax temperature, > 0.
        weight: Factor of the loss, >= 0.
        class_map: For each student class the index of the teacher's class, where the classes differ.

    Raises:
        CldaError: If an argument is out of range.

    Example:
        >>> KLDistillation()(torch.zeros(2, 3), torch.zeros(2, 3)).item()
        0.0
    """

    def __init__(
        self, *, temperature: float = 2.0, weight: float = 1.0, class_map: Optional[Sequence[int]] = None
    ) -> None:
        super().__init__(temperature=temperature, weight=weight, class_map=class_map)

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Return the weighted loss of logits ``(N, C, ...)``."""
        loss = kl_distillation(
            student_logits, teacher_logits, mask, temperature=self.temperature, class_map=self.class_map
        )
        return self.weight * loss


def mean_kl(
    student: Tensor, teacher: Tensor, weights: Optional[Tensor], *, temperature: float = 1.0, dim: int = 1
) -> Tensor:
    """Return ``T²`` times the weighted mean of the divergence between distributions along one dimension.

    Args:
        student: Shape ``(N, A, B)``, float.
        teacher: Likewise.
        weights: >= 0, the shape without ``dim``; the values at weight 0 are never used.
        temperature: Softmax temperature, > 0.
        dim: 1 or 2, the dimension along which the softmax goes.
    """
    with autocast_off(student.device.type):
        loss: Tensor = _MeanKL.apply(student, teacher, weights, temperature, dim)  # type: ignore[no-untyped-call]
    return loss


class _MeanKL(torch.autograd.Function):
    """Works in chunks and keeps the gradient instead of the intermediate results, which are several times as large."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Optional[Tensor], temperature: float, dim: int
    ) -> Tensor:
        dtype = computing_dtype(student, teacher)
        share = shares((student.shape[0], student.shape[3 - dim]), weights, student, dtype)
        mean = torch.zeros((), dtype=dtype, device=student.device)
        # Without its share, so in [-1, 1]: divided by the number of positions it would vanish in half precision.
        difference = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for chunk in chunks(student, dim):
            part = share[chunk[0], chunk[3 - dim]]
            x, y = values_in(chunk, student, teacher, None if weights is None else (part == 0).unsqueeze(dim), dtype)
            out = None if difference is None else difference[chunk]
            mean += (_divergence(x, y, temperature, dim, out) * part).sum()
        if difference is not None:
            ctx.save_for_backward(difference, share.unsqueeze(dim) * temperature)
        return mean * temperature**2

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tuple[Tensor, None, None, None, None]:
        only_first_derivatives()
        difference, factor = ctx.saved_tensors
        gradient = torch.mul(difference, factor * upstream, out=torch.empty_like(difference))
        return gradient, None, None, None, None


def _divergence(x: Tensor, y: Tensor, temperature: float, dim: int, difference: Optional[Tensor]) -> Tensor:
    """Return the divergence along ``dim``, and write ``softmax(x / T) - softmax(y / T)`` into ``difference``."""
    log_q, log_p = F.log_softmax(x / temperature, dim), F.log_softmax(y / temperature, dim)
    p = log_p.exp()
    divergence = log_p.sub_(log_q).mul_(p).sum(dim)
    if difference is not None:
        torch.sub(log_q.exp_(), p, out=difference)
    return divergence
