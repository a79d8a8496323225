"""Attention transfer: the student looks where the teacher looks."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from ..errors import check_number
from ..strategy import Strategy
from .chunked import in_chunks, mean_computed, narrowed, only_first_derivatives, shares
from .positions import Features, align_features, check_spatial, computing_dtype

__all__ = ["AttentionTransfer", "attention_transfer"]

_LEAST = 1e-36
"""The largest activation of an image that has any; the derivative by smaller ones is beyond the range of float32."""


def attention_transfer(
    student_features: Features,
    teacher_features: Features,
    mask: Optional[Tensor] = None,
    *,
    power: float = 2.0,
    ignore_index: Optional[int] = None,
) -> Tensor:
    r"""Squared distance of normalised spatial attention maps.

    ``L = mean_l mean_n Σ_i (a(s)_ni - a(t)_ni)²`` over feature pairs ``l``, images ``n`` and positions ``i``, where
    ``a(x)_ni = Q_ni / ‖Q_n‖₂`` and ``Q_ni = Σ_c |x_nci|^power``; it lies in ``[0, 2]``. The channel counts may differ.
    The source states the distance unsquared, which has no gradient at 0, while its code averages the square over
    positions, which shrinks as the image grows. The mask enters the norm and the sum as weights of positions; an image
    counts by its largest weight.

    Args:
        student_features: One tensor ``(N, C, ...)`` with spatial dimensions, or several, paired in order.
        teacher_features: As many; of two grids in a pair the smaller one is taken.
        mask: Bool or float weights or labels, as for :func:`~clda_core.distillation.kl_distillation`.
        power: Exponent ``p`` >= 1; larger ones concentrate on the strongest activations.
        ignore_index: The label of positions to leave out, in an integer mask; so is every negative label.

    Returns:
        Scalar, float32 (float64 for float64 features), 0 if no position is valid.

    Raises:
        CldaError: If features cannot be paired, have no spatial dimensions, shapes, devices, dtypes or the mask do
            not fit, or ``power < 1``.

    Note:
        The gradient goes to the student only. Draws no random numbers, has no effect on BatchNorm.

    Example:
        >>> a = torch.ones(2, 3, 4, 4)
        >>> attention_transfer(a, a).item()
        0.0

    References:
        Zagoruyko, Komodakis, Paying More Attention to Attention, ICLR 2017, §3.1.
        https://arxiv.org/abs/1612.03928
    """
    check_number("power", power, at_least=1)
    pairs = align_features(student_features, teacher_features, mask, ignore_index)
    check_spatial(student_features, "attention transfer", "use features before the pooling, or FeatureDistillation")
    return mean_computed(_Attention, pairs, power)


class AttentionTransfer(Strategy):
    """:func:`attention_transfer` as a strategy.

    Args:
        power: Exponent of the activations, >= 1.

    Raises:
        CldaError: If an argument is out of range.

    Example:
        >>> AttentionTransfer()((torch.ones(2, 3, 4, 4),), (torch.ones(2, 8, 4, 4),)).item()
        0.0
    """

    reads = "features"

    def __init__(self, *, power: float = 2.0) -> None:
        check_number("power", power, at_least=1)
        self.power = power

    def __call__(self, student_features: Features, teacher_features: Features, mask: Optional[Tensor] = None) -> Tensor:
        """Return the loss of features, paired in order."""
        return attention_transfer(student_features, teacher_features, mask, power=self.power)


class _Attention(torch.autograd.Function):
    """Reads the features in chunks, and again in the backward pass: kept are they and what is of one map's size."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Optional[Tensor], power: float) -> Tensor:
        images = None if weights is None else weights.amax(1, keepdim=True)
        share = shares((student.shape[0], 1), images, student)
        weight = share.new_ones(()) if weights is None else weights.to(share.dtype)
        of_student, inverse, inverse_norm = _maps(student, weights, weight, power)
        apart = of_student - _maps(teacher, weights, weight, power)[0]
        by_map = 2 * weight * apart
        by_energy = by_map - weight * of_student * (by_map * of_student).sum(1, keepdim=True)
        slope = by_energy * inverse_norm * share * inverse * (power / student.shape[1])
        ctx.save_for_backward(student, slope, inverse, weights)
        ctx.power = power
        return narrowed((weight * apart * apart * share).sum(), computing_dtype(student, teacher))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tuple[Optional[Tensor], ...]:
        only_first_derivatives()
        student, slope, inverse, weights = ctx.saved_tensors
        gradient, slope = torch.empty_like(student), slope * upstream
        for chunk, (x,) in in_chunks((student,), weights):
            x.mul_(inverse[chunk[0]].unsqueeze(1))
            gradient[chunk] = x.sign() * x.abs().pow(ctx.power - 1) * slope[chunk[0], chunk[2]].unsqueeze(1)
        return gradient, None, None, None


def _maps(features: Tensor, weights: Optional[Tensor], weight: Tensor, power: float) -> Tuple[Tensor, Tensor, Tensor]:
    """Return the normalised maps ``(N, P)``, and the inverses of the largest activations and of the norms, ``(N, 1)``.

    The energies are those of activations divided by the image's largest, whose powers do not overflow.
    """
    samples, _, positions = features.shape
    largest, energies = weight.new_zeros(samples, 1), weight.new_zeros(samples, positions)
    for chunk, (x,) in in_chunks((features,), weights):
        largest[chunk[0]] = torch.max(largest[chunk[0]], x.abs_().amax((1, 2))[:, None])
    inverse = _inverse(largest, largest <= _LEAST)
    for chunk, (x,) in in_chunks((features,), weights):
        energies[chunk[0], chunk[2]] = x.mul_(inverse[chunk[0]].unsqueeze(1)).abs_().pow_(power).mean(1)
    norm = (weight * energies * energies).sum(1, keepdim=True).sqrt()
    inverse_norm = _inverse(norm, norm == 0)
    return energies * inverse_norm, inverse, inverse_norm


def _inverse(values: Tensor, zero: Tensor) -> Tensor:
    return values.masked_fill(zero, 1.0).reciprocal().masked_fill(zero, 0.0)
