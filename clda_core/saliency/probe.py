"""The default loss of which saliency takes the derivatives, on unlabelled data."""

from __future__ import annotations

from typing import Optional

from torch import Tensor
from torch.nn import functional

from ..distillation.masks import weighted_mean
from ..distillation.positions import align
from ..strategy import Strategy

__all__ = ["PseudoLabelCrossEntropy"]


class PseudoLabelCrossEntropy(Strategy):
    r"""Cross-entropy of the teacher's logits against the teacher's own hard pseudo-labels.

    .. math:: \mathcal{L} = \frac{1}{\sum_i w_i} \sum_i w_i \,
              \bigl(-\log \operatorname{softmax}(z_i)_{\hat{y}_i}\bigr), \qquad \hat{y}_i = \arg\max_c z_{ic}

    Positions :math:`i` are images, or pixels of images; weights :math:`w_i` are 1 where no mask is given. Our choice:
    it needs no labels, and uncertain predictions weigh more in its gradient than certain ones.

    Note:
        Computed in float32 (float64 for float64 logits) whatever autocast does. The pseudo-labels carry no gradient.
        On a saturated teacher (every softmax near one-hot) the gradient vanishes, and with it what saliency can see.

    Example:
        >>> import torch
        >>> probe = PseudoLabelCrossEntropy()
        >>> logits = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
        >>> round(probe(logits, torch.tensor([True, False])).item(), 4)
        0.6931

    References:
        Lee, Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks, ICML
        workshop 2013.
    """

    def __call__(self, logits: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Return the weighted mean cross-entropy over valid positions.

        Args:
            logits: Shape ``(N, C, *spatial)``, float, unnormalised.
            mask: Which positions count, as for the distillation losses: bool or float weights of shape ``(N,)``,
                ``(N, *spatial)`` or ``(N, 1, *spatial)``. Another spatial size than that of the logits is resized to
                it, nearest neighbour.

        Returns:
            Scalar, float32 or float64; 0 if no position is valid.

        Raises:
            CldaError: If the batch is empty, the mask's shape does not fit or it is of integers.
        """
        aligned = align(logits, logits, mask).full_precision()
        losses = functional.cross_entropy(aligned.student, aligned.teacher.argmax(dim=1), reduction="none")
        return weighted_mean(losses, aligned.weights)
