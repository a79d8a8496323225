"""Magnitude: saliency without data."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ..strategy import Strategy

__all__ = ["Magnitude"]


class Magnitude(Strategy):
    r"""Scores a parameter by its absolute value.

    .. math:: s_k = |\theta_k|

    Note:
        Needs no loss and no gradient, so it sees neither source nor target data: the same on both, and unchanged until
        an update writes the parameter. Layers are initialised at different scales, and scale-invariant layers (before
        a BatchNorm) may have any; a model-wide threshold then mostly compares those scales.

    Example:
        >>> import torch
        >>> Magnitude().score(torch.tensor([-2.0, 0.5]), None)
        tensor([2.0000, 0.5000])

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015, Sec. 3.
        <https://arxiv.org/abs/1506.02626>
    """

    order = 0
    elementwise = True

    def score(self, parameter: Tensor, derivative: Optional[Tensor]) -> Tensor:
        """Return ``|parameter|``.

        Args:
            parameter: Any shape, detached.
            derivative: Not read.

        Returns:
            Non-negative scores, shape and dtype of ``parameter``.
        """
        return parameter.abs()
