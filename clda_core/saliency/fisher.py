"""Fisher saliency."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ..strategy import Strategy
from .base import needed

__all__ = ["Fisher"]


class Fisher(Strategy):
    r"""Scores a parameter by the second-order change of the loss if it were set to zero, curvature from the gradient.

    .. math:: s_k = \tfrac{1}{2} \, g_k^2 \, \theta_k^2

    The source has :math:`\tfrac{1}{2} \theta_k^2 \, \mathbb{E}_n[g_{nk}^2]`, the empirical Fisher information over
    single examples :math:`n`. Two deviations, both because state is kept for each layer and not for each parameter:

    1. :math:`g` is the gradient of the *mini-batch mean*. Its square estimates
       :math:`\mathbb{E}[g_n]^2 + \operatorname{Var}[g_n] / B` for a batch of :math:`B` independent examples. Near a
       minimum of the loss, where :math:`\mathbb{E}[g_n] \approx 0`, that is the Fisher term divided by :math:`B`, a
       common factor that no scale-free threshold sees; far from one the squared mean dominates.
    2. The expectation is taken over observations *after* thresholding: the LSR is averaged, not the score.

    With one observation the score is half the square of :class:`~clda_core.saliency.Taylor`'s, so a quantile threshold
    gives both the same LSR. They differ under a multiple of the mean, which here only the largest scores pass.

    Example:
        >>> import torch
        >>> Fisher().score(torch.tensor([-2.0, 0.5]), torch.tensor([0.5, 4.0]))
        tensor([0.5000, 2.0000])

    References:
        Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018, empirical Fisher criterion.
        <https://arxiv.org/abs/1801.05787>
    """

    order = 1
    elementwise = True

    def score(self, parameter: Tensor, derivative: Optional[Tensor]) -> Tensor:
        """Return ``(derivative * parameter) ** 2 / 2``.

        Args:
            parameter: Any shape, detached.
            derivative: The gradient; shape and dtype of ``parameter``.

        Returns:
            Non-negative scores, shape and dtype of ``parameter``; in units of the loss squared. Below about ``1e-38``
            they underflow to zero in float32.

        Raises:
            CldaError: If ``derivative`` is ``None``.
        """
        product = needed(derivative, self).mul(parameter)
        if product.is_complex():
            product = product.abs()
        return product.mul_(product).mul_(0.5)
