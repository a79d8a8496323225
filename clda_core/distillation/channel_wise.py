"""Channel-wise distillation: where in the image each class is, rather than which class is where."""

from __future__ import annotations

from typing import Optional, Sequence

from torch import Tensor

from ..errors import check_number
from .kl import mean_kl
from .logit_distillation import LogitDistillation
from .positions import align_logits, check_spatial

__all__ = ["ChannelWiseDistillation", "channel_wise_distillation"]


def channel_wise_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Optional[Tensor] = None,
    *,
    temperature: float = 4.0,
    class_map: Optional[Sequence[int]] = None,
    ignore_index: Optional[int] = None,
) -> Tensor:
    r"""Divergence between the distributions of each class over the positions of an image.

    ``L = T² / (N C) · Σ_n Σ_c Σ_i φ(t_nci) · log(φ(t_nci) / φ(s_nci))`` with
    ``φ(x_nci) = w_ni exp(x_nci / T) / Σ_j w_nj exp(x_ncj / T)``, a softmax over the positions ``i`` that the mask ``w``
    leaves. Images count by their largest weight, so one without a valid position not at all (the source has no mask).

    Args:
        student_logits: Shape ``(N, C, ...)`` with at least one spatial dimension, float, unnormalised.
        teacher_logits: Shape ``(N, C', ...)``; another grid is resized to the smaller of the two.
        mask: Bool or float weights or labels, as for :func:`~clda_core.distillation.kl_distillation`.
        temperature: Softmax temperature, > 0, dimensionless.
        class_map: For each student class the index of the teacher's class.
        ignore_index: The label of positions to leave out, in an integer mask; so is every negative label.

    Returns:
        Scalar, float32 (float64 for float64 logits); sum over positions, mean over classes and images, 0 if no
        position is valid.

    Raises:
        CldaError: If there are no spatial dimensions, shapes, classes, devices, dtypes or the mask do not fit, or
            ``temperature <= 0``.

    Note:
        The gradient goes to the student only and exists once (no double backward). Draws no random numbers, has no
        effect on BatchNorm.

    Example:
        >>> import torch
        >>> a = torch.zeros(2, 3, 4, 4)
        >>> round(channel_wise_distillation(a, a).item(), 6)
        0.0

    References:
        Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, §3.
        https://arxiv.org/abs/2011.13256
    """
    check_number("temperature", temperature, above=0)
    pair = align_logits(student_logits, teacher_logits, mask, class_map, ignore_index)
    check_spatial(student_logits, "channel-wise distillation", "use KLDistillation for classification")
    return mean_kl(pair, temperature=temperature, dim=2)


class ChannelWiseDistillation(LogitDistillation):
    """:func:`channel_wise_distillation` as a strategy.

    Args:
        temperature: Softmax temperature, > 0.
        class_map: For each student class the index of the teacher's class, where the classes differ.

    Raises:
        CldaError: If an argument is out of range.

    Example:
        >>> import torch
        >>> ChannelWiseDistillation()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)).item()
        0.0
    """

    _loss = staticmethod(channel_wise_distillation)
