"""First-order Taylor saliency."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ..strategy import Strategy
from .base import needed

__all__ = ["Taylor"]


class Taylor(Strategy):
    r"""Scores a parameter by the change of the loss, to first order, if it were set to zero.

    .. math:: s_k = |g_k \, \theta_k|, \qquad g = \nabla_\theta \mathcal{L} \text{ on one mini-batch}

    Deviation from the source: Molchanov et al. (2019) square the product, :math:`(g_k \theta_k)^2`, and sum it over a
    filter; here the absolute value is taken and every parameter keeps its own score. Squaring changes no quantile
    threshold's LSR (it keeps the order of the scores), but it changes multiples of the mean; the squared score, halved,
    is :class:`~clda_core.saliency.Fisher`.

    Example:
        >>> import torch
        >>> Taylor().score(torch.tensor([-2.0, 0.5]), torch.tensor([0.5, 4.0]))
        tensor([1., 2.])

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, first-order criterion.
        <https://arxiv.org/abs/1906.10771>
    """

    order = 1
    elementwise = True

    def score(self, parameter: Tensor, derivative: Optional[Tensor]) -> Tensor:
        """Return ``|derivative * parameter|``.

        Args:
            parameter: Any shape, detached.
            derivative: The gradient; shape and dtype of ``parameter``.

        Returns:
            Non-negative scores, shape and dtype of ``parameter``; in units of the loss.

        Raises:
            CldaError: If ``derivative`` is ``None``.
        """
        product = needed(derivative, self).mul(parameter)
        return product.abs() if product.is_complex() else product.abs_()
