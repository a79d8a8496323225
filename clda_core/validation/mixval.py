"""MixVal: whether a mix of two images is predicted as the one that dominates it."""

from __future__ import annotations

from typing import Any, List, Mapping, Optional

from torch import Tensor

from ..errors import check_number, problem
from ..strategy import Strategy
from .sums import at_positions, by_prediction, of_rows, one_hot, precise, ratio, summed

__all__ = ["MixVal", "mixed"]


def mixed(inputs: Any, ratio: float = 0.55) -> Any:
    r"""Mix each image of a batch with the next one, the last with the first.

    :math:`\lambda x_i + (1 - \lambda) x_{i+1}` is the second view of :class:`MixVal`.

    Args:
        inputs: What the model is called with: a tensor, or a mapping, tuple or list with some. Floating-point tensors
            are mixed along dimension 0; whatever else there is stays that of the image which dominates.
        ratio: :math:`\lambda`, > 0.5 and < 1.

    Returns:
        The same, of new tensors where it is mixed.

    Raises:
        CldaError: If ``ratio`` is out of range, or there is no floating-point tensor to mix.

    Example:
        >>> import torch
        >>> mixed(torch.tensor([[0.0], [1.0], [3.0]]), 0.75)
        tensor([[0.2500],
                [1.5000],
                [2.2500]])
    """
    check_number("ratio", ratio, above=0.5, below=1)
    if not _can_be_mixed(inputs):
        raise problem(
            "there is nothing to mix in the inputs",
            expected="a floating-point tensor of images, or a mapping, tuple or list with one",
            received=f"{inputs.dtype}" if isinstance(inputs, Tensor) else type(inputs).__name__,
            fix="pass images as floating-point numbers, normalised as the model takes them",
        )
    return _mixed(inputs, ratio)


class MixVal(Strategy):
    r"""Accuracy of predictions on mixed images, the class of the dominating image taken for right.

    The second view is :func:`mixed`: each image with the next one of the batch. Where both are predicted as the same
    class the mix probes whether that class is one dense cluster (*intra*); where they are not, where the boundary lies
    between two (*inter*). The score is the mean of both accuracies.

    Args:
        ratio: The share of the dominating image, > 0.5 and < 1.

    Raises:
        CldaError: If ``ratio`` is out of range.

    Note:
        The statistics are the sums of weights and of right predictions, intra and inter, over the positions at which
        each class is predicted on the dominating image: ``4 C`` numbers. A position counts where it does in both
        images, with the weight that it has in the dominating one. A batch of one image adds nothing. The score is NaN
        as long as either kind was not seen: of a network that predicts a single class it stays NaN.

        The source makes two runs, with mixes of images from the same cluster in one, and ranks several networks by
        both; here one pass of each batch gives both kinds as they come.

    Example:
        >>> import torch
        >>> validator = MixVal()
        >>> logits = torch.eye(2)[[0, 0, 1]]
        >>> validator.score(validator.statistics(logits, torch.eye(2)[[0, 1, 1]])).item()
        0.75

    References:
        Hu et al., Mixed Samples as Probes for Unsupervised Model Selection in Domain Adaptation, NeurIPS 2023.
        <https://openreview.net/forum?id=ackajXqei2>
    """

    needs_view = True

    def __init__(self, *, ratio: float = 0.55) -> None:
        check_number("ratio", ratio, above=0.5, below=1)
        self.ratio = ratio

    def view(self, inputs: Any) -> Any:
        """Return the mixed images on which the network has to be run for the second logits."""
        return mixed(inputs, self.ratio)

    def statistics(self, logits: Tensor, view_logits: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Tensor:
        """Return what one batch of logits ``(N, C, ...)`` and those on its mix add to the score, shape ``(4 C,)``."""
        positions = at_positions(self, logits, view_logits, mask)
        labels = precise(positions.logits[0]).max(1)[1]
        weights = positions.weights * (positions.weights.roll(-1, 0) > 0)
        if len(weights) == 1:  # the next image is the image itself
            weights = weights * 0.0
        return summed(positions._replace(weights=weights), _terms, labels == labels.roll(-1, 0))

    def score(self, statistics: Tensor) -> Tensor:
        """Return the mean of the accuracies intra and inter, in [0, 1]; NaN as long as either was not seen."""
        same, same_right, other, other_right = of_rows(self, statistics, 4)
        return (ratio(same_right.sum(), same.sum()) + ratio(other_right.sum(), other.sum())) / 2

    def score_by_class(self, statistics: Tensor) -> Tensor:
        """Return the same by the class of the dominating image ``(C,)``, NaN where either was not seen."""
        same, same_right, other, other_right = of_rows(self, statistics, 4)
        return (ratio(same_right, same) + ratio(other_right, other)) / 2


def _terms(values: Tensor, weights: Tensor, alike: Tensor) -> List[Tensor]:
    dominating, on_mix = one_hot(values[0]), one_hot(values[1])
    right = (dominating * on_mix).sum(1)
    intra, inter = weights * alike, weights * ~alike
    return by_prediction(dominating, intra, intra * right, inter, inter * right)


def _can_be_mixed(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_can_be_mixed, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_can_be_mixed, value))
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _mixed(value: Any, share: float) -> Any:
    if isinstance(value, Mapping):
        return {name: _mixed(item, share) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_mixed(item, share) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return share * value + (1 - share) * value.roll(-1, 0) if _can_be_mixed(value) else value
