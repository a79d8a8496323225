"""Attention transfer: the student looks where the teacher looks."""

from __future__ import annotations

from typing import Optional, Sequence, Union

import torch
from torch import Tensor

from .._compat import autocast_off
from .._config import Strategy
from ..errors import check_number, problem
from .base import Aligned, align_features, unit, weighted_mean

__all__ = ["AttentionTransfer", "attention_transfer"]


def attention_transfer(
    student_features: Union[Tensor, Sequence[Tensor]],
    teacher_features: Union[Tensor, Sequence[Tensor]],
    mask: Optional[Tensor] = None,
    *,
    power: float = 2.0,
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
        mask: Bool or float weights ``(N,)``, ``(N, ...)`` or ``(N, 1, ...)``, or an integer label map (255 is left
            out), at any resolution.
        power: Exponent ``p`` >= 1; larger ones concentrate on the strongest activations.

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
    pairs = align_features(student_features, teacher_features, mask)
    for features in [student_features] if isinstance(student_features, Tensor) else student_features:
        if features.dim() < 3:
            raise problem(
                "attention transfer needs spatial dimensions",
                expected="features (N, C, ...) of an image or sequence",
                received=f"shape {tuple(features.shape)}",
                fix="take features before the pooling, or use FeatureDistillation",
            )
    with autocast_off(pairs[0].student.device.type):
        return torch.stack([_loss(pair, power) for pair in pairs]).mean()


class AttentionTransfer(Strategy):
    """:func:`attention_transfer` as a strategy.

    Args:
        power: Exponent of the activations, >= 1.
        weight: Factor of the loss, >= 0.

    Raises:
        CldaError: If an argument is out of range.

    Example:
        >>> AttentionTransfer()((torch.ones(2, 3, 4, 4),), (torch.ones(2, 8, 4, 4),)).item()
        0.0
    """

    reads = "features"

    def __init__(self, *, power: float = 2.0, weight: float = 1.0) -> None:
        check_number("power", power, at_least=1)
        check_number("weight", weight, at_least=0)
        self.power = power
        self.weight = weight

    def __call__(
        self,
        student_features: Union[Tensor, Sequence[Tensor]],
        teacher_features: Union[Tensor, Sequence[Tensor]],
        mask: Optional[Tensor] = None,
    ) -> Tensor:
        """Return the weighted loss of features, paired in order."""
        return self.weight * attention_transfer(student_features, teacher_features, mask, power=self.power)


def _loss(pair: Aligned, power: float) -> Tensor:
    student, teacher = pair.student.abs().pow(power).mean(1), pair.teacher.abs().pow(power).mean(1)
    if pair.weights is None:
        return (unit(student, 1) - unit(teacher, 1)).pow(2).sum(1).mean()
    root = pair.weights.sqrt()
    distances = (unit(student * root, 1) - unit(teacher * root, 1)).pow(2).sum(1)
    return weighted_mean(distances, pair.weights.amax(1))
