"""DIST: the student reproduces how the teacher's predictions relate, not the predictions themselves."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import autocast_off
from ..errors import check_number
from .base import LogitDistillation, align_logits, computing_dtype
from .chunked import Chunk, chunks, only_first_derivatives, shares, values_in

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
        The gradient goes to the student only and exists once (no double backward). Between forward and backward one
        tensor of the student's shape is kept. The intra-class term depends on the batch, per rank in distributed runs.
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
    pair = align_logits(student_logits, teacher_logits, mask, class_map)
    with autocast_off(student_logits.device.type):
        loss: Tensor = _DIST.apply(*pair, temperature, inter, intra)  # type: ignore[no-untyped-call]
    return loss


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
        >>> round(DISTDistillation()(torch.eye(3), torch.eye(3)).item(), 5)
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


class _DIST(torch.autograd.Function):
    """Reads the logits twice, in chunks: for the moments of each class, and for the gradient, which is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        weights: Optional[Tensor],
        temperature: float,
        inter: float,
        intra: float,
    ) -> Tensor:
        dtype = computing_dtype(student, teacher)
        share = shares((student.shape[0], student.shape[2]), weights, student, dtype)
        parts, read, found = chunks(student), [], []
        between = torch.zeros((), dtype=dtype, device=student.device)

        def probabilities(chunk: Chunk, part: Tensor) -> Tuple[Tensor, Tensor]:
            x, y = values_in(chunk, student, teacher, None if weights is None else part == 0, dtype)
            return F.softmax(x / temperature, 1), F.softmax(y / temperature, 1)

        for chunk in parts:
            part = share[chunk[0], chunk[2]].unsqueeze(1)
            q, p = probabilities(chunk, part)
            between += (_across_classes(q, p).distance() * part).sum()
            found.append(_Moments.over_positions(q, p, part))
            if len(parts) == 1:  # small enough to be kept for the second reading
                read.append((q, p))
        moments = functools.reduce(_Moments.merged, found)
        if ctx.needs_input_grad[0]:
            # Without its share of the mean, by which it would vanish in half precision.
            gradient = torch.empty(student.shape, dtype=dtype, device=student.device)
            for chunk in parts:
                q, p = read.pop() if read else probabilities(chunk, share[chunk[0], chunk[2]].unsqueeze(1))
                gradient[chunk] = _by_logits(q, p, moments, inter, intra)
            ctx.save_for_backward(gradient, share.unsqueeze(1) * temperature)
            ctx.dtype = student.dtype
        return temperature**2 * (inter * between + intra * moments.distance().mean())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tuple[Optional[Tensor], ...]:
        only_first_derivatives()
        gradient, factor = ctx.saved_tensors
        return (gradient * (factor * upstream)).to(ctx.dtype), None, None, None, None, None


class _Moments(NamedTuple):
    """Weighted means and central moments of both models' probabilities; all of one shape but ``weight``."""

    weight: Tensor
    student: Tensor
    teacher: Tensor
    student_square: Tensor
    teacher_square: Tensor
    product: Tensor

    @classmethod
    def over_positions(cls, q: Tensor, p: Tensor, share: Tensor) -> _Moments:
        """Return the moments ``(C,)`` of each class, from probabilities ``(N, C, P)`` and shares ``(N, 1, P)``."""
        weight = share.sum()
        normed = share / weight.masked_fill(weight == 0, 1.0)
        mean_q, mean_p = (normed * q).sum((0, 2)), (normed * p).sum((0, 2))
        centred_q, centred_p = q - mean_q[None, :, None], p - mean_p[None, :, None]
        shared_q, shared_p = share * centred_q, share * centred_p
        squares = (shared_q * centred_q).sum((0, 2)), (shared_p * centred_p).sum((0, 2))
        return cls(weight, mean_q, mean_p, *squares, (shared_q * centred_p).sum((0, 2)))

    def merged(self, other: _Moments) -> _Moments:
        """Return the moments of both together (Chan, Golub and LeVeque, 1983)."""
        weight = self.weight + other.weight
        share = other.weight / weight.masked_fill(weight == 0, 1.0)
        apart_q, apart_p = other.student - self.student, other.teacher - self.teacher
        both = self.weight * share
        return _Moments(
            weight,
            self.student + share * apart_q,
            self.teacher + share * apart_p,
            self.student_square + other.student_square + both * apart_q * apart_q,
            self.teacher_square + other.teacher_square + both * apart_p * apart_p,
            self.product + other.product + both * apart_q * apart_p,
        )

    def inverse_deviations(self) -> Tuple[Tensor, Tensor]:
        """Return the inverse square roots of the squares, 0 for what varies by no more than rounding."""
        return (
            _inverse_root(self.student_square, self.weight * self.student**2),
            _inverse_root(self.teacher_square, self.weight * self.teacher**2),
        )

    def distance(self) -> Tensor:
        """Return ``1 - ρ``, 0 where the teacher does not vary."""
        of_student, of_teacher = self.inverse_deviations()
        correlation = (self.product * of_student * of_teacher).clamp(max=1)  # beyond it by rounding only
        return (of_teacher > 0).to(of_teacher.dtype) - correlation

    def slopes(self) -> Tuple[Tensor, Tensor]:
        """Return by how much the distance grows with the student's value, per unit of the teacher's and of its own."""
        of_student, of_teacher = self.inverse_deviations()
        scale = of_student * of_teacher
        return -scale, self.product * scale * of_student**2


def _across_classes(q: Tensor, p: Tensor) -> _Moments:
    """Return the moments ``(N, 1, P)`` of each position over its classes, which count alike."""
    mean = torch.full_like(q[:1, :1, :1], 1 / q.shape[1])  # of probabilities
    centred_q, centred_p = q - mean, p - mean
    squares = (centred_q * centred_q).sum(1, keepdim=True), (centred_p * centred_p).sum(1, keepdim=True)
    return _Moments(mean.new_full((), q.shape[1]), mean, mean, *squares, (centred_q * centred_p).sum(1, keepdim=True))


def _by_logits(q: Tensor, p: Tensor, moments: _Moments, inter: float, intra: float) -> Tensor:
    """Return the derivative by the tempered logits of a chunk, in units of the positions' shares."""
    p_between, q_between = _across_classes(q, p).slopes()  # what is equal for all classes of a position cancels below
    p_within, q_within = (intra / q.shape[1] * slope[None, :, None] for slope in moments.slopes())
    centre = p_within * moments.teacher[None, :, None] + q_within * moments.student[None, :, None]
    by_q = p * (inter * p_between + p_within) + q * (inter * q_between + q_within) - centre
    return q * (by_q - (q * by_q).sum(1, keepdim=True))


def _inverse_root(square: Tensor, of_mean: Tensor) -> Tensor:
    negligible = square <= (square + of_mean) * (8 * torch.finfo(square.dtype).eps) ** 2
    return square.masked_fill(negligible, 1.0).rsqrt().masked_fill(negligible, 0.0)
