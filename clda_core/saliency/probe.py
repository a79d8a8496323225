"""The default loss of which saliency takes the derivatives, on unlabelled data."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional

from .._config import Strategy
from ..errors import problem

__all__ = ["PseudoLabelCrossEntropy"]

_IGNORED = 255


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
                ``(N, *spatial)`` or ``(N, 1, *spatial)``, or an integer label map of which the positions labelled 255
                are left out. Another spatial size than that of the logits is resized to it, nearest neighbour.

        Returns:
            Scalar, float32 or float64.

        Raises:
            CldaError: If the mask's shape does not fit, or no position is valid.
        """
        scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if scores.numel() == 0:
            raise _nothing_valid("an empty batch")
        if mask is None:
            return functional.cross_entropy(scores, scores.detach().argmax(dim=1))
        weights = _weights(mask, scores)
        total = weights.sum()
        if not total > 0:
            raise _nothing_valid("a mask that leaves every position out")
        # An ignored position may hold NaN, which a weight of zero would leave in the gradient.
        scores = scores.masked_fill((weights == 0).unsqueeze(1), 0.0)
        losses = functional.cross_entropy(scores, scores.detach().argmax(dim=1), reduction="none")
        return (losses * weights).sum() / total


def _weights(mask: Tensor, scores: Tensor) -> Tensor:
    shape, positions = tuple(mask.shape), (scores.shape[0], *scores.shape[2:])
    if mask.dim() == scores.dim() and mask.shape[1] == 1:
        mask = mask.squeeze(1)
    elif mask.dim() == 1:
        mask = mask.reshape(-1, *[1] * (len(positions) - 1))
    if mask.dim() != len(positions) or mask.shape[0] != positions[0]:
        raise problem(
            "the mask does not fit the logits",
            expected=f"({positions[0]},) or {positions}, the latter at any resolution",
            received=f"shape {shape}",
            fix="pass one weight or label a sample, or a position",
        )
    if mask.is_floating_point():
        mask = mask.masked_fill(~(mask > 0), 0.0)
    elif mask.dtype != torch.bool:
        mask = mask != _IGNORED
    weights = mask.detach().to(device=scores.device, dtype=scores.dtype)
    if weights.shape == positions:
        return weights
    return functional.interpolate(weights.unsqueeze(1), size=positions[1:], mode="nearest").squeeze(1)


def _nothing_valid(received: str) -> Exception:
    return problem(
        "the probe has nothing to average over",
        expected="at least one valid position",
        received=received,
        fix="skip this batch, or correct the mask",
    )
