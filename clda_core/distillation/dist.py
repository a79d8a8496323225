"""DIST: the student reproduces how the teacher's predictions relate, not the predictions themselves."""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._compat import autocast_off
from ..errors import check_number
from .base import LogitDistillation, align_logits, computing_dtype, valid_mask
from .chunked import Chunk, chunks, exponentials, kept_gradient, shares, values_in

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
    deviate by less than 1e-6 of their mean, or 3e-7 where the logits are small: that much is rounding in float32.

    Args:
        student_logits: Shape ``(N, C, ...)``, float, unnormalised.
        teacher_logits: Shape ``(N, C', ...)``; another grid is resized to the smaller of the two.
        mask: Bool or float weights ``(N,)``, ``(N, ...)`` or ``(N, 1, ...)``, at any resolution; only their ratios
            matter. With ``ignore_index`` also an integer label map.
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
    _check_options(temperature, inter, intra)
    pair = align_logits(student_logits, teacher_logits, valid_mask(mask, ignore_index), class_map)
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
        dtype, classes = computing_dtype(student, teacher), student.shape[1]
        share = shares((student.shape[0], student.shape[2]), weights, student)
        parts, read, between, moments = chunks(student), [], share.new_zeros(()), share.new_zeros(5, classes)
        within_noise = share.new_zeros(2)

        def probabilities(chunk: Chunk) -> List[Tensor]:
            """Return those of student and teacher, and how much of each position's is rounding."""
            found, noise = [], []
            for logits in (student, teacher):
                x = values_in(chunk, logits, weights)
                _, values, total = exponentials(x, temperature, 1)
                found.append(values.div_(total))
                largest = torch.max(x.amax(1, keepdim=True), -x.amin(1, keepdim=True))
                noise.append(largest.div_(temperature).clamp_(max=1).mul_(8 * torch.finfo(dtype).eps))
            return found + noise

        for chunk in parts:
            part = share[chunk[0], chunk[2]].unsqueeze(1)
            q, p, *noise = probabilities(chunk)
            squares = q * q, p * p, q * p
            between += (_across_classes(squares, noise).distance * part).sum()
            within_noise = torch.max(within_noise, torch.stack([values.max() for values in noise]))
            weighed = (value if weights is None else value * part for value in (q, p, *squares))
            moments += torch.stack([value.sum((0, 2)) for value in weighed])
            if len(parts) == 1:  # small enough to be kept for the second reading
                read.append([q, p, *noise])
        if weights is None:
            moments *= share[0, 0]
        mean_q, mean_p, square_q, square_p, product = moments.unbind()
        within = _correlate((square_q, square_p, product), (mean_q, mean_p), within_noise.unbind())
        if ctx.needs_input_grad[0]:
            # Without its share of the mean, by which it would vanish in half precision.
            kept = torch.empty_like(student, dtype=dtype)
            by_p, by_q = (intra / classes * slope[None, :, None] for slope in within[1:])
            centre = by_p * mean_p[None, :, None] + by_q * mean_q[None, :, None]
            for chunk in parts:
                q, p, *noise = read.pop() if read else probabilities(chunk)
                if inter and classes > 2:  # of two classes the correlation is 1 or -1, whatever their values
                    across = _across_classes((q * q, p * p, q * p), noise)
                    by_value = torch.addcmul(-centre, p, by_p + inter / classes * across.by_teacher)
                    by_value.addcmul_(q, by_q + inter / classes * across.by_student)
                else:
                    by_value = torch.addcmul(-centre, p, by_p).addcmul_(q, by_q)
                by_value.mul_(q)  # what is equal for all classes of a position cancels in the next line
                by_value.addcmul_(q, by_value.sum(1, keepdim=True), value=-1)
                if weights is not None:  # the slopes of a rare class may be beyond float32 where it is not rare
                    by_value.masked_fill_((weights[chunk[0], chunk[2]] == 0).unsqueeze(1), 0.0)
                kept[chunk] = by_value
            ctx.save_for_backward(kept, share.unsqueeze(1).to(dtype))
            ctx.factor, ctx.dtype = temperature, student.dtype
        return (temperature**2 * (inter * between + intra * within.distance.mean())).to(dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tuple[Optional[Tensor], ...]:
        return kept_gradient(ctx, upstream), None, None, None, None, None, None


class _Correlation(NamedTuple):
    """``1 - ρ``, and by how much it grows with the student's value, per unit of the teacher's and of its own."""

    distance: Tensor
    by_teacher: Tensor
    by_student: Tensor


def _across_classes(squares: Sequence[Tensor], noise: Sequence[Tensor]) -> _Correlation:
    """Correlate the classes of each position, ``(N, 1, P)``, from both squares and the product ``(N, C, P)``."""
    means = [square.mean(1, keepdim=True) for square in squares]
    mean = torch.full_like(means[0][:1, :, :1], 1 / squares[0].shape[1])  # of probabilities
    return _correlate(means, (mean, mean), noise)


def _correlate(squares: Sequence[Tensor], means: Sequence[Tensor], noise: Sequence[Tensor]) -> _Correlation:
    """Correlate student and teacher.

    Args:
        squares: The means of the student's squares, the teacher's and the product.
        means: Those of the student's values and the teacher's.
        noise: How much of their variation is rounding, relative to the mean.
    """
    (q_square, p_square, product), (q, p) = squares, means
    of_student, student_varies = _inverse_deviation(q_square - q * q, q, noise[0])
    of_teacher, teacher_varies = _inverse_deviation(p_square - p * p, p, noise[1])
    of_teacher = of_teacher * teacher_varies
    rho = ((product - q * p) * of_teacher * of_student * student_varies).clamp(-1, 1)  # beyond by rounding only
    return _Correlation(teacher_varies - rho, -of_teacher * of_student, rho * of_student * of_student)


def _inverse_deviation(variance: Tensor, mean: Tensor, noise: Tensor) -> Tuple[Tensor, Tensor]:
    """Return the inverse deviation, or the inverse mean of values that do not vary, and whether they vary as 0 or 1."""
    square, floor = mean * mean, torch.finfo(mean.dtype).tiny ** 0.9  # its inverse can be squared
    least = (noise * noise).clamp(min=256 * torch.finfo(mean.dtype).eps)  # what the difference of squares leaves
    constant = (variance <= least * square) | (variance <= floor)
    deviation = torch.where(constant, square, variance)
    negligible = deviation <= floor
    inverse = deviation.masked_fill(negligible, 1.0).rsqrt().masked_fill(negligible, 0.0)
    return inverse, (~constant).to(mean.dtype)
