"""Layer saliency rates, and the thresholds that say above which score a parameter is salient."""

from __future__ import annotations

from typing import Optional

from torch import Tensor
from typing_extensions import Protocol

from ..errors import check_number, problem
from ..strategy import Strategy
from .histogram import Histogram, fraction_above, mean, quantile

__all__ = [
    "FixedThreshold",
    "MeanThreshold",
    "QuantileThreshold",
    "ReferenceThreshold",
    "Threshold",
    "layer_saliency_rates",
]


class Threshold(Protocol):
    """The score, one for the whole model, above which a parameter is salient; a plain function will do."""

    def __call__(self, target: Histogram, reference: Optional[Histogram], /) -> Tensor:
        """Return the threshold.

        Args:
            target: The scores whose rates are wanted.
            reference: The scores seen on source data, or ``None`` where none were observed.

        Returns:
            0-dim, >= 0, on the device of ``target``; NaN where it is unknown.
        """
        ...


def layer_saliency_rates(histogram: Histogram, threshold: Tensor) -> Tensor:
    r"""Return each layer's saliency rate: the fraction of its parameters whose score exceeds the threshold.

    .. math:: \mathrm{LSR}_l = \frac{1}{|l|} \sum_{k \in l} [\, s_k > \tau \,]

    Args:
        histogram: Scores by layer.
        threshold: :math:`\tau`, 0-dim, >= 0, one for the whole model.

    Returns:
        Shape ``(L,)``, float64, in [0, 1]; NaN for a layer without a score: its rate is unknown. Exact but for the
        scores in the threshold's bin, see :func:`~clda_core.saliency.histogram.fraction_above`.

    Note:
        No host synchronisation.

    Example:
        >>> import torch
        >>> histogram = Histogram.empty(2)
        >>> histogram.add(0, torch.tensor([0.0, 0.0, 0.0, 1.0]))
        >>> histogram.add(1, torch.tensor([3.0, 4.0]))
        >>> layer_saliency_rates(histogram, torch.tensor(2.0)).tolist()
        [0.0, 1.0]

    References:
        Cho et al., CLDA: Collaborative Learning for Enhanced Unsupervised Domain Adaptation, 2024, names the rate; its
        formula and threshold are not public, so this definition is ours. <https://arxiv.org/abs/2409.02699>
    """
    return fraction_above(histogram, threshold)


class QuantileThreshold(Strategy):
    """The score that a given fraction of the model's parameters does not exceed.

    The rates are then relative: their mean weighted by the layers' sizes is ``1 - quantile`` whatever the data (less
    where more than that fraction of the scores is zero), so they rank layers, and cannot say that the model as a whole
    lost saliency.

    Args:
        quantile: In (0, 1).

    Raises:
        CldaError: If ``quantile`` is out of range.

    Example:
        >>> import torch
        >>> histogram = Histogram.empty(1)
        >>> histogram.add(0, torch.tensor([1.0, 2.0, 4.0, 8.0]))
        >>> layer_saliency_rates(histogram, QuantileThreshold(quantile=0.75)(histogram, None)).tolist()
        [0.25]
    """

    def __init__(self, *, quantile: float = 0.5) -> None:
        check_number("quantile", quantile, above=0, below=1)
        self.quantile = quantile

    def __call__(self, target: Histogram, reference: Optional[Histogram] = None) -> Tensor:
        """Return the quantile of ``target``; see :class:`Threshold`."""
        return quantile(target, self.quantile)


class MeanThreshold(Strategy):
    """A multiple of the model's mean score.

    Scale-free (multiplying the loss by a constant changes no rate), yet the total may fall: the more unevenly saliency
    is spread, the fewer parameters exceed the mean.

    Args:
        multiple: > 0.

    Raises:
        CldaError: If ``multiple`` is out of range.

    Example:
        >>> import torch
        >>> histogram = Histogram.empty(1)
        >>> histogram.add(0, torch.tensor([1.0, 1.0, 1.0, 13.0]))
        >>> MeanThreshold(multiple=0.5)(histogram).item()
        2.0
    """

    def __init__(self, *, multiple: float = 1.0) -> None:
        check_number("multiple", multiple, above=0)
        self.multiple = multiple

    def __call__(self, target: Histogram, reference: Optional[Histogram] = None) -> Tensor:
        """Return the multiple of the mean of ``target``; see :class:`Threshold`."""
        return mean(target) * self.multiple


# Our choice: of the thresholds without a scale to set, the one that lets the total fall.
_DEFAULT = MeanThreshold()


class FixedThreshold(Strategy):
    """A given score.

    It depends on the scale of the loss, so it only makes sense with scores that have a scale of their own (magnitude)
    or with a value measured on the same task.

    Args:
        value: >= 0, in the units of the scores.

    Raises:
        CldaError: If ``value`` is out of range.

    Example:
        >>> import torch
        >>> histogram = Histogram.empty(1)
        >>> FixedThreshold(0.5)(histogram).item()
        0.5
    """

    def __init__(self, value: float) -> None:
        check_number("value", value, at_least=0)
        self.value = value

    def __call__(self, target: Histogram, reference: Optional[Histogram] = None) -> Tensor:
        """Return the value; see :class:`Threshold`."""
        return target.sums.new_tensor(self.value)


class ReferenceThreshold(Strategy):
    """A threshold taken from the scores on source data and applied to those on target data.

    What source data makes salient is the yardstick, so a fall of the total from source to target shows in the rates.
    The losses on both must be on one scale: the same probe, not a supervised loss on one side.

    Args:
        of: The threshold to take from the source scores.

    Raises:
        CldaError: If ``of`` is not callable; on a call, if no source data was observed.

    Example:
        >>> import torch
        >>> source, target = Histogram.empty(1), Histogram.empty(1)
        >>> source.add(0, torch.tensor([2.0, 6.0]))
        >>> target.add(0, torch.tensor([1.0, 3.0]))
        >>> ReferenceThreshold()(target, source).item()
        4.0
    """

    def __init__(self, *, of: Threshold = _DEFAULT) -> None:
        if not callable(of) or isinstance(of, type):
            raise problem(
                "of is not a threshold",
                expected="an instance such as MeanThreshold() or a callable",
                received=repr(of),
                fix="pass FixedThreshold(0.5) for a number, MeanThreshold() for a class",
            )
        self.of = of

    def __call__(self, target: Histogram, reference: Optional[Histogram]) -> Tensor:
        """Return ``of`` on the source scores; see :class:`Threshold`."""
        if reference is None:
            raise problem(
                f"{type(self).__name__} has no source data to compare with",
                expected="at least one observation of a source batch",
                received="none",
                fix="observe source batches as such before target ones, or use a threshold of target data only",
            )
        return self.of(reference, reference)
