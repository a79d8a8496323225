"""The negative entropy of predictions."""

from __future__ import annotations

from typing import List, Optional

from torch import Tensor

from ..strategy import Strategy
from .sums import at_positions, by_prediction, of_rows, one_hot, probabilities, ratio, summed

__all__ = ["NegativeEntropy"]


class NegativeEntropy(Strategy):
    r"""Negative mean entropy of the predictions, :math:`\overline{\sum_c p_c \log p_c}`, in nats.

    It rises as predictions become surer, right or wrong, and is highest for a network that is certain of one class
    everywhere. :class:`MutualInformation` is not.

    Note:
        The statistics are the sums of weights and of negative entropies over the positions of each predicted class:
        ``2 C`` numbers. The score of a class is the mean over these positions.

    Example:
        >>> import torch
        >>> validator = NegativeEntropy()
        >>> round(validator.score(validator.statistics(torch.zeros(2, 4))).item(), 4)
        -1.3863

    References:
        Morerio et al., Minimal-Entropy Correlation Alignment for Unsupervised Deep Domain Adaptation, ICLR 2018, which
        selects by the entropy on target data. <https://arxiv.org/abs/1711.10288>
    """

    needs_view = False

    def statistics(self, logits: Tensor, view_logits: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Tensor:
        """Return what one batch of logits ``(N, C, ...)`` adds to the score, shape ``(2 C,)``."""
        return summed(at_positions(self, logits, view_logits, mask), _terms)

    def score(self, statistics: Tensor) -> Tensor:
        """Return the score of summed statistics, in ``[-log C, 0]``; NaN if they have seen nothing."""
        counts, sums = of_rows(self, statistics, 2)
        return ratio(sums.sum(), counts.sum())

    def score_by_class(self, statistics: Tensor) -> Tensor:
        """Return the mean over the positions of each predicted class ``(C,)``, NaN for one that was never predicted."""
        counts, sums = of_rows(self, statistics, 2)
        return ratio(sums, counts)


def _terms(values: Tensor, weights: Tensor) -> List[Tensor]:
    p, log_p = probabilities(values[0])
    of_position = p.mul_(log_p).sum(1)
    return by_prediction(one_hot(values[0]), weights, weights * of_position)
