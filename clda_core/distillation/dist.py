"""DIST: the student reproduces how the teacher's predictions relate, not the predictions themselves."""

from __future__ import annotations

import math
from typing import Any, Iterator, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .chunked import Chunk, KeepsGradient, computed, in_chunks, shares, to_exponentials
from .logit_distillation import LogitDistillation, check_options
from .positions import align_logits, computing_dtype

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
    ignore_index: Optional[int] = None,
) -> Tensor:
    r"""One minus the Pearson correlation of predictions, across classes and across positions.

    ``L = T² · (inter · mean_i [1 - ρ(p_i·, q_i·)] + intra · mean_c [1 - ρ(p_·c, q_·c)])`` with the tempered
    probabilities ``p`` of the teacher and ``q`` of the student; ``ρ(p_i·, q_i·)`` correlates the classes of position
    ``i``, ``ρ(p_·c, q_·c)`` the valid positions of the whole batch for class ``c``. The mask weighs positions in both.
    Where the teacher's values do not vary there is no relation, and the distance counts as 0. Where the student's do
    not, ``ρ`` counts as 0 and has no derivative; the gradient is then that of the covariance, divided by the teacher's
    deviation and the student's mean, so that a head that starts at zero is pulled towards the teacher. (The source adds
    1e-8 to the deviations, which makes this gradient up to 1e8 times as large.) Probabilities do not vary if they
    deviate by less than 1e-6 of their mean, which is rounding in float32 (3e-7 for float64 logits).

    Args:
        student_logits: Shape ``(N, C, ...)``, float, unnormalised.
        teacher_logits: Shape ``(N, C', ...)``; another grid is resized to the smaller of the two.
        mask: Bool or float weights or labels, as for :func:`~clda_core.distillation.kl_distillation`.
        temperature: Softmax temperature, > 0, dimensionless.
        inter: Weight of the relation between classes (β), >= 0.
        intra: Weight of the relation within a class (γ), >= 0.
        class_map: For each student class the index of the teacher's class.
        ignore_index: The label of positions to leave out, in an integer mask; so is every negative label.

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
    check_options(temperature, inter=inter, intra=intra)
    pair = align_logits(student_logits, teacher_logits, mask, class_map, ignore_index)
    return computed(_DIST, pair, temperature, inter, intra)


class DISTDistillation(LogitDistillation):
    """:func:`dist_distillation` as a strategy.

    Args:
        temperature: Softmax temperature, > 0.
        inter: Weight of the relation between classes, >= 0.
        intra: Weight of the relation within a class, >= 0.
        class_map: For each student class the index of the teacher's class, where the classes differ.

    Raises:
        CldaError: If an argument is out of range.

    Example:
        >>> round(DISTDistillation()(torch.eye(3), torch.eye(3)).item(), 5)
        0.0
    """

    _loss = staticmethod(dist_distillation)
    _weights = ("inter", "intra")

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        inter: float = 1.0,
        intra: float = 1.0,
        class_map: Optional[Sequence[int]] = None,
    ) -> None:
        super().__init__(temperature=temperature, class_map=class_map)
        check_options(temperature, inter=inter, intra=intra)
        self.inter = inter
        self.intra = intra


class _DIST(KeepsGradient):
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
        dtype, classes = computing_dtype(student, teacher), student.shape[1]
        share = shares((student.shape[0], student.shape[2]), weights, student)
        least, even = _least_variance(dtype, share.dtype), share.new_full((2, 1, 1, 1), 1 / classes)

        def chunks() -> Iterator[Tuple[Chunk, Tensor, Tensor, Tensor]]:
            """Yield both models' exponentials ``(2, n, C, p)``, memory like them, and the factors to probabilities."""
            for chunk, memory in in_chunks((student, teacher), weights, spare=2):
                pair = to_exponentials(memory[:2], temperature, 2)
                yield chunk, pair, memory[2:], pair.sum(2, keepdim=True).reciprocal_()

        # The means over positions of both models' probabilities, of their squares, and of the product of the two.
        mean, square, product = share.new_zeros(2, classes), share.new_zeros(2, classes), share.new_zeros(classes)
        distance = share.new_zeros(())
        across_q, across_p = share.new_empty(2, student.shape[0], 1, student.shape[2])  # slopes of each position
        for chunk, pair, work, scale in chunks():
            part, scale_of_product = share[chunk[0], chunk[2]].unsqueeze(1), scale[0] * scale[1]
            scale_of_squares = scale * scale
            mean += _over_positions(pair, part * scale)
            squares = torch.mul(pair, pair, out=work)
            square += _over_positions(squares, part * scale_of_squares)
            squares_between = squares.sum(2, keepdim=True).mul_(scale_of_squares / classes)
            products = torch.mul(pair[0], pair[1], out=work[0])
            product += _over_positions(products, part * scale_of_product)
            product_between = products.sum(1, keepdim=True).mul_(scale_of_product / classes)
            across = _correlate(squares_between, product_between, even, least)
            distance += (across.distance * part).sum()
            across_q[chunk], across_p[chunk] = across.by_student, across.by_teacher
        within = _correlate(square, product, mean, least)
        if ctx.needs_input_grad[0]:
            # Without its share of the mean, by which it would vanish in half precision.
            kept = torch.empty_like(student, dtype=dtype)
            by_q, by_p = (intra / classes * slope.unsqueeze(1) for slope in (within.by_student, within.by_teacher))
            at_mean = by_q * mean[0].unsqueeze(1) + by_p * mean[1].unsqueeze(1)
            between = inter / classes if classes > 2 else 0.0  # of two, ρ is 1 or -1, whatever their values
            for chunk, pair, work, scale in chunks():
                q, p = pair.mul_(scale)
                slope_q = torch.add(by_q, across_q[chunk], alpha=between, out=work[0])
                slope_p = torch.add(by_p, across_p[chunk], alpha=between, out=work[1])
                by_value = torch.addcmul(-at_mean, q, slope_q, out=work[0]).addcmul_(p, slope_p)
                by_value.mul_(q)  # what is equal for all classes of a position cancels in the next line
                by_value.addcmul_(q, by_value.sum(1, keepdim=True), value=-1)
                if weights is not None:  # the slopes of a rare class may be beyond float32 where it is not rare
                    by_value.masked_fill_((weights[chunk[0], chunk[2]] == 0).unsqueeze(1), 0.0)
                kept[chunk] = by_value
            KeepsGradient.keep(ctx, kept, share.unsqueeze(1).to(dtype), temperature, student.dtype)
        return (temperature**2 * (inter * distance + intra * within.distance.mean())).to(dtype)


class _Correlation(NamedTuple):
    """``1 - ρ``, and by how much it grows with the student's value, per unit of its own and of the teacher's."""

    distance: Tensor
    by_student: Tensor
    by_teacher: Tensor


def _over_positions(values: Tensor, share: Tensor) -> Tensor:
    """Return sums over positions, ``(..., C)``, of values ``(..., n, C, p)`` with shares ``(..., n, 1, p)``."""
    return torch.matmul(values, share.transpose(-1, -2)).sum((-3, -1))


def _correlate(square: Tensor, product: Tensor, mean: Tensor, least: float) -> _Correlation:
    """Correlate student and teacher.

    Args:
        square: The means of the student's squares and the teacher's, ``(2, ...)``.
        product: That of their product.
        mean: Those of the student's values and the teacher's, likewise.
        least: The least variance, relative to the mean's square, that is no rounding.
    """
    mean_square, floor = mean * mean, torch.finfo(mean.dtype).tiny ** 0.9  # its inverse can be squared
    variance = square - mean_square
    constant = variance <= (least * mean_square).clamp_(min=floor)
    student_varies, teacher_varies = (~constant).to(mean.dtype)
    of_constant = mean_square.masked_fill(mean_square <= floor, math.inf)  # whose inverse is 0
    of_student, of_teacher = torch.where(constant, of_constant, variance).rsqrt_()
    of_both = of_student * of_teacher * teacher_varies
    covariance = product - mean[0] * mean[1]
    rho = (covariance * of_both).mul_(student_varies).clamp_(-1, 1)  # beyond by rounding only
    return _Correlation(teacher_varies - rho, rho * of_student * of_student, -of_both)


def _least_variance(dtype: torch.dtype, working: torch.dtype) -> float:
    """Return the least variance, relative to the mean's square, that is more than rounding.

    It is more than that of values in ``dtype``, and than what the difference of squares in ``working`` leaves.
    """
    return max((8 * torch.finfo(dtype).eps) ** 2, 256 * torch.finfo(working).eps)
