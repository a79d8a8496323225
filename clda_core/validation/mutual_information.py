"""Mutual information between image and prediction: on one view, and on two."""

from __future__ import annotations

from typing import List, Optional

import torch
from torch import Tensor

from ..strategy import Strategy
from .sums import at_positions, of_rows, probabilities, ratio, summed

__all__ = ["ConsistentInformation", "MutualInformation"]


class MutualInformation(Strategy):
    r"""Mutual information between input and predicted class, :math:`H(\bar p) - \overline{H(p)}`, in nats.

    :math:`\bar p` is the mean prediction over all positions seen. The score rises as predictions become surer, and
    falls when they collapse to few classes. It needs no second view.

    Note:
        The statistics are the sum of weights, of negative entropies, and of probabilities by class: ``C + 2`` numbers.

    Example:
        >>> validator = MutualInformation()
        >>> certain, unsure = torch.eye(2) * 100, torch.zeros(2, 2)
        >>> [round(validator.score(validator.statistics(logits)).item(), 4) for logits in (certain, unsure)]
        [0.6931, 0.0]

    References:
        Shi and Sha, Information-Theoretical Learning of Discriminative Clusters for Unsupervised Domain Adaptation,
        ICML 2012, Eq. (3).
    """

    needs_view = False

    def statistics(self, logits: Tensor, view_logits: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Tensor:
        """Return what one batch of logits ``(N, C, ...)`` adds to the score, shape ``(C + 2,)``."""
        return summed(at_positions(self, logits, view_logits, mask), _information)

    def score(self, statistics: Tensor) -> Tensor:
        """Return the score of summed statistics, in ``[0, log C]``; NaN if they have seen nothing."""
        return _score(self, statistics)


class ConsistentInformation(Strategy):
    r"""Mutual information, less how far predictions move under a second view, in nats.

    .. math:: H(\bar p) + \overline{\textstyle\sum_c p_c \log q_c}
        = H(\bar p) - \overline{H(p)} - \overline{\mathrm{KL}(p \| q)}

    with the predictions :math:`p` on the images and :math:`q` on the second view. It is the sum of
    :class:`SoftConsistency`, which is highest for a network that always predicts the same class, and of the entropy of
    the mean prediction, which is 0 for such a network.

    Note:
        The statistics are the sum of weights, of the products, and of probabilities by class: ``C + 2`` numbers.

    Example:
        >>> validator = ConsistentInformation()
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
        >>> [round(validator.score(validator.statistics(logits, view)).item(), 2) for view in (logits, -logits)]
        [0.69, -8.31]

    References:
        Hu et al., Learning Discrete Representations via Information Maximizing Self-Augmented Training, ICML 2017,
        whose training objective weighs the same two terms. <https://arxiv.org/abs/1702.08720>
    """

    needs_view = True

    def statistics(self, logits: Tensor, view_logits: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Tensor:
        """Return what one batch of logits ``(N, C, ...)`` on two views adds to the score, shape ``(C + 2,)``."""
        return summed(at_positions(self, logits, view_logits, mask), _information)

    def score(self, statistics: Tensor) -> Tensor:
        """Return the score of summed statistics, at most ``log C``; NaN if they have seen nothing."""
        return _score(self, statistics)


def _information(values: Tensor, weights: Tensor) -> List[Tensor]:
    """Return the sums of weights, of ``Σ p log q`` and of ``p`` by class; on one view ``q`` is ``p``."""
    p, log_p = probabilities(values[0])
    log_q = log_p if len(values) == 1 else probabilities(values[1])[1]
    return [
        weights.sum(),
        (weights * (p * log_q).sum(1)).sum(),
        (weights.unsqueeze(1) * p).sum((0, 2)),
    ]


def _score(whose: object, statistics: Tensor) -> Tensor:
    count, likelihood, of_class = of_rows(whose, statistics, 1, beside=2)
    mean = of_class / count
    entropy = -torch.sum(mean * torch.log(mean.clamp(min=1e-30)))
    return ratio(likelihood, count) + entropy
