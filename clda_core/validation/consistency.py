"""How much predictions agree between two views of the same images: softly, by class label, and by IoU."""

from __future__ import annotations

from typing import List, Optional

import torch
from torch import Tensor

from ..strategy import Strategy
from .sums import MeanByPrediction, at_positions, by_prediction, of_rows, one_hot, probabilities, ratio, summed

__all__ = ["ConsistencyIoU", "HardConsistency", "SoftConsistency"]


def _soft(values: Tensor, weights: Tensor) -> List[Tensor]:
    likelihood = probabilities(values[0])[0].mul_(probabilities(values[1])[1]).sum(1)
    return by_prediction(one_hot(values[0]), weights, weights * likelihood)


def _hard(values: Tensor, weights: Tensor) -> List[Tensor]:
    first = one_hot(values[0])
    return by_prediction(first, weights, weights * (first * one_hot(values[1])).sum(1))


def _overlap(values: Tensor, weights: Tensor) -> List[Tensor]:
    first, second = one_hot(values[0]), one_hot(values[1])
    both = by_prediction(first * second, weights)
    return [*both, *by_prediction(first, weights), *by_prediction(second, weights)]


class SoftConsistency(MeanByPrediction):
    r"""Negative cross-entropy between predictions on two views, :math:`\overline{\sum_c p_c \log q_c}`, in nats.

    :math:`p` are the predictions on the images, :math:`q` those on the second view. It is at most the negative entropy
    of :math:`p`, which it is where both are the same.

    Note:
        The statistics are the sums of weights and of the products over the positions of each class that is predicted
        on the images: ``2 C`` numbers. The score of a class is the mean over these positions.

    Example:
        >>> validator = SoftConsistency()
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
        >>> [round(validator.score(validator.statistics(logits, view)).item(), 2) for view in (logits, -logits)]
        [-0.0, -9.0]
    """

    needs_view = True
    _terms = staticmethod(_soft)


class HardConsistency(MeanByPrediction):
    r"""Share of positions at which the same class is predicted on two views.

    It does not depend on how sure the predictions are.

    Note:
        The statistics are the sums of weights and of agreements over the positions of each class that is predicted on
        the images: ``2 C`` numbers. The score of a class is the mean over these positions.

    Example:
        >>> validator = HardConsistency()
        >>> statistics = validator.statistics(torch.eye(3), torch.eye(3)[[0, 1, 0]])
        >>> round(validator.score(statistics).item(), 4), validator.score_by_class(statistics).tolist()
        (0.6667, [1.0, 1.0, 0.0])
    """

    needs_view = True
    _terms = staticmethod(_hard)


class ConsistencyIoU(Strategy):
    r"""Mean over classes of the IoU between the predictions on two views.

    .. math:: \mathrm{IoU}_c = \frac{|A_c \cap B_c|}{|A_c \cup B_c|}

    with the positions :math:`A_c` and :math:`B_c` at which class :math:`c` is predicted on the images and on the second
    view. The mean is over the classes that are predicted on either, so rare classes count as much as frequent ones.

    Note:
        The statistics are the sizes of :math:`A_c \cap B_c`, of :math:`A_c` and of :math:`B_c`: ``3 C`` numbers.

    Example:
        >>> validator = ConsistencyIoU()
        >>> statistics = validator.statistics(torch.eye(3), torch.eye(3)[[0, 1, 0]])
        >>> validator.score_by_class(statistics).tolist(), validator.score(statistics).item()
        ([0.5, 1.0, 0.0], 0.5)
    """

    needs_view = True

    def statistics(self, logits: Tensor, view_logits: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Tensor:
        """Return what one batch of logits ``(N, C, ...)`` on two views adds to the score, shape ``(3 C,)``."""
        return summed(at_positions(self, logits, view_logits, mask), _overlap)

    def score(self, statistics: Tensor) -> Tensor:
        """Return the mean over the classes that were predicted, in [0, 1]; NaN if the statistics have seen nothing."""
        scores = self.score_by_class(statistics)
        seen = ~torch.isnan(scores)
        return ratio(torch.where(seen, scores, torch.zeros_like(scores)).sum(), seen.sum())

    def score_by_class(self, statistics: Tensor) -> Tensor:
        """Return the IoU of each class ``(C,)``, NaN for a class that was predicted on neither view."""
        both, first, second = of_rows(self, statistics, 3)
        return ratio(both, first + second - both)
