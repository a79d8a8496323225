"""The negative entropy of predictions."""

from __future__ import annotations

from typing import List

from torch import Tensor

from .sums import MeanByPrediction, by_prediction, one_hot, probabilities

__all__ = ["NegativeEntropy"]


def _negative_entropy(values: Tensor, weights: Tensor) -> List[Tensor]:
    p, log_p = probabilities(values[0])
    return by_prediction(one_hot(values[0]), weights, weights * p.mul_(log_p).sum(1))


class NegativeEntropy(MeanByPrediction):
    r"""Negative mean entropy of the predictions, :math:`\overline{\sum_c p_c \log p_c}`, in nats.

    It lies in ``[-log C, 0]``. It rises as predictions become surer, right or wrong, and is highest for a network that
    is certain of one class everywhere. :class:`MutualInformation` is not.

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
    _terms = staticmethod(_negative_entropy)
