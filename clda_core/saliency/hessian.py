"""Hessian saliency."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ..errors import check_number
from ..strategy import Strategy
from .base import needed

__all__ = ["Hessian"]


class Hessian(Strategy):
    r"""Scores a parameter by the second-order change of the loss if it were set to zero, with the true curvature.

    .. math:: s_k = \tfrac{1}{2} \, |\hat{H}_{kk}| \, \theta_k^2, \qquad
              \hat{H}_{kk} = \tfrac{1}{S} \textstyle\sum_s z_{sk} (H z_s)_k, \quad z_{sk} = \pm 1

    Deviations from the sources: optimal brain damage computes :math:`H_{kk}` with a Gauss-Newton recursion, which is
    non-negative; Hutchinson's estimate of the full Hessian may be negative (saddle points, and noise), hence the
    absolute value. It makes the score of a parameter with little curvature of its own too high, by the size of the
    noise that other parameters' curvature adds; more samples shrink it by the square root of their number. AdaHessian
    also averages the diagonal within a filter and over iterations; neither is done here.

    Args:
        samples: Number of random vectors :math:`S` per observation, >= 1; each costs a backward pass.

    Raises:
        CldaError: If ``samples`` is no integer >= 1.

    Example:
        >>> import torch
        >>> Hessian().score(torch.tensor([-2.0, 0.5]), torch.tensor([0.5, -8.0]))
        tensor([1., 1.])

    References:
        LeCun et al., Optimal Brain Damage, NeurIPS 1989, saliency of a parameter.
        <https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html>;
        Yao et al., ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning, AAAI 2021, Hutchinson diagonal.
        <https://arxiv.org/abs/2006.00719>
    """

    order = 2
    elementwise = True

    def __init__(self, *, samples: int = 1) -> None:
        check_number("samples", samples, at_least=1, integer=True)
        self.samples = samples

    def score(self, parameter: Tensor, derivative: Optional[Tensor]) -> Tensor:
        """Return ``|derivative| * parameter ** 2 / 2``.

        Args:
            parameter: Any shape, detached.
            derivative: The estimated diagonal of the Hessian; shape and dtype of ``parameter``.

        Returns:
            Non-negative scores, shape and dtype of ``parameter``; in units of the loss.

        Raises:
            CldaError: If ``derivative`` is ``None``.
        """
        return needed(derivative, self).mul(parameter).mul_(parameter).abs_().mul_(0.5)
