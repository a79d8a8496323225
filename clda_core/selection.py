"""From scores to saliency rates, and from rates to the layers to update. Everything here is a pure function."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Dict, Mapping, Optional, Tuple

from torch import Tensor
from typing_extensions import Protocol

from .errors import check_number, problem
from .saliency.histogram import Histogram, fraction_above, mean, quantile
from .strategy import Strategy

__all__ = [
    "AllLayers",
    "BelowRate",
    "DomainShift",
    "FixedThreshold",
    "HighestFraction",
    "LowestFraction",
    "MeanThreshold",
    "QuantileThreshold",
    "RandomFraction",
    "ReferenceThreshold",
    "Selection",
    "Threshold",
    "layer_saliency_rates",
]


class Threshold(Protocol):
    """The score, one for the whole model, above which a parameter is salient."""

    def __call__(self, target: Histogram, reference: Optional[Histogram]) -> Tensor:
        """Return the threshold.

        Args:
            target: The scores whose rates are wanted.
            reference: The scores seen on source data, or ``None`` where none were observed.

        Returns:
            0-dim, >= 0, on the device of ``target``; NaN where it is unknown.
        """
        ...


class Selection(Protocol):
    """Which of the teacher's layers are non-salient.

    Attributes:
        threshold: The threshold behind the rates.
    """

    threshold: Threshold

    def __call__(
        self, target: Mapping[str, float], source: Mapping[str, float], sizes: Mapping[str, int]
    ) -> Tuple[str, ...]:
        """Return the names of the non-salient layers.

        Args:
            target: Layer saliency rates on target data, in the model's order, in [0, 1]; a layer whose rate is unknown
                is absent.
            source: The same on source data; empty where none was observed.
            sizes: Number of parameters of every layer.

        Returns:
            Names among those of ``target``, in its order. The same arguments give the same names: every rank of a
            distributed run, and a resumed run, then decides alike.
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
        _check_threshold("of", of)
        self.of = of

    def __call__(self, target: Histogram, reference: Optional[Histogram]) -> Tensor:
        """Return ``of`` on the source scores; see :class:`Threshold`."""
        if reference is None:
            raise _no_source(type(self).__name__)
        return self.of(reference, reference)


class LowestFraction(Strategy):
    """Selects the layers with the lowest rates on target data.

    Args:
        fraction: Of the layers with a known rate, in (0, 1], rounded to the nearest number, at least one layer.
        threshold: The threshold behind the rates.

    Raises:
        CldaError: If ``fraction`` is out of range or ``threshold`` is not callable.

    Example:
        >>> LowestFraction(fraction=0.5)({"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.2}, {}, {})
        ('a', 'd')
    """

    def __init__(self, *, fraction: float = 0.3, threshold: Threshold = _DEFAULT) -> None:
        _check_fraction(fraction)
        _check_threshold("threshold", threshold)
        self.fraction = fraction
        self.threshold = threshold

    def __call__(
        self, target: Mapping[str, float], source: Mapping[str, float], sizes: Mapping[str, int]
    ) -> Tuple[str, ...]:
        """Return the names; see :class:`Selection`."""
        return _lowest(_known(target), self.fraction)


class BelowRate(Strategy):
    """Selects the layers whose rate on target data is below a given one; possibly none, possibly all.

    Args:
        rate: In (0, 1]. Under a :class:`QuantileThreshold` rates are relative; under the others they are not.
        threshold: The threshold behind the rates.

    Raises:
        CldaError: If ``rate`` is out of range or ``threshold`` is not callable.

    Example:
        >>> BelowRate(rate=0.25)({"a": 0.1, "b": 0.4, "c": 0.25}, {}, {})
        ('a',)
    """

    def __init__(self, *, rate: float = 0.1, threshold: Threshold = _DEFAULT) -> None:
        check_number("rate", rate, above=0, at_most=1)
        _check_threshold("threshold", threshold)
        self.rate = rate
        self.threshold = threshold

    def __call__(
        self, target: Mapping[str, float], source: Mapping[str, float], sizes: Mapping[str, int]
    ) -> Tuple[str, ...]:
        """Return the names; see :class:`Selection`."""
        return tuple(name for name, rate in _known(target).items() if rate < self.rate)


class DomainShift(Strategy):
    r"""Selects the layers that domain shift made non-salient: salient on source data, less so on target data.

    .. math:: \Delta_l = \mathrm{LSR}_l^{\text{source}} - \mathrm{LSR}_l^{\text{target}}

    Give ``fraction`` for the layers of largest :math:`\Delta_l`, whatever its size or sign, or ``margin`` for those
    above it, possibly none. With neither, ``fraction`` is 0.3. A layer whose rate is unknown on either side is not
    selected.

    Args:
        fraction: Of the layers with known rates, in (0, 1], rounded to the nearest number, at least one layer.
        margin: In [0, 1).
        threshold: The threshold behind the rates. Under :class:`ReferenceThreshold` both sides are measured against the
            source's.

    Raises:
        CldaError: If an argument is out of range, or both ``fraction`` and ``margin`` are given; on a call, if no
            source data was observed.

    Example:
        >>> rule = DomainShift(margin=0.1)
        >>> rule({"a": 0.3, "b": 0.3, "c": 0.3}, {"a": 0.5, "b": 0.35, "c": 0.2}, {})
        ('a',)

    References:
        Cho et al., CLDA: Collaborative Learning for Enhanced Unsupervised Domain Adaptation, 2024, for the notion of
        domain-shift-induced non-salient parameters; the rule is ours. <https://arxiv.org/abs/2409.02699>
    """

    def __init__(
        self,
        *,
        fraction: Optional[float] = None,
        margin: Optional[float] = None,
        threshold: Threshold = _DEFAULT,
    ) -> None:
        if fraction is not None and margin is not None:
            raise problem(
                "fraction and margin exclude each other",
                expected="one of them",
                received=f"fraction={fraction!r}, margin={margin!r}",
                fix="leave one of them out",
            )
        if fraction is not None:
            _check_fraction(fraction)
        if margin is not None:
            check_number("margin", margin, at_least=0, below=1)
        _check_threshold("threshold", threshold)
        self.fraction = fraction
        self.margin = margin
        self.threshold = threshold

    def __call__(
        self, target: Mapping[str, float], source: Mapping[str, float], sizes: Mapping[str, int]
    ) -> Tuple[str, ...]:
        """Return the names; see :class:`Selection`."""
        before = _known(source)
        if not before:
            raise _no_source(type(self).__name__)
        change = {name: rate - before[name] for name, rate in _known(target).items() if name in before}
        if self.margin is not None:
            return tuple(name for name, value in change.items() if -value > self.margin)
        return _lowest(change, 0.3 if self.fraction is None else self.fraction)


class HighestFraction(Strategy):
    """Control: selects the layers with the highest rates, the opposite of :class:`LowestFraction`.

    Args:
        fraction: As for :class:`LowestFraction`.
        threshold: The threshold behind the rates.

    Raises:
        CldaError: If ``fraction`` is out of range or ``threshold`` is not callable.

    Example:
        >>> HighestFraction(fraction=0.5)({"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.2}, {}, {})
        ('b', 'c')
    """

    def __init__(self, *, fraction: float = 0.3, threshold: Threshold = _DEFAULT) -> None:
        _check_fraction(fraction)
        _check_threshold("threshold", threshold)
        self.fraction = fraction
        self.threshold = threshold

    def __call__(
        self, target: Mapping[str, float], source: Mapping[str, float], sizes: Mapping[str, int]
    ) -> Tuple[str, ...]:
        """Return the names; see :class:`Selection`."""
        return _lowest({name: -rate for name, rate in _known(target).items()}, self.fraction)


class RandomFraction(Strategy):
    """Control: selects layers at random, as many as :class:`LowestFraction` would.

    Stateless: the choice is a hash of the seed and of all rates (to six decimals), so it changes when the rates do,
    from round to round, is the same on every rank, repeats when a run is resumed, and draws from no random generator.
    Rates that stay put (magnitude on a teacher that nothing updates) repeat the choice.

    Args:
        fraction: As for :class:`LowestFraction`.
        seed: Any integer.
        threshold: The threshold behind the rates.

    Raises:
        CldaError: If ``fraction`` is out of range, ``seed`` is no integer or ``threshold`` is not callable.

    Example:
        >>> RandomFraction(fraction=0.5, seed=1)({"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.2}, {}, {})
        ('a', 'd')
    """

    def __init__(self, *, fraction: float = 0.3, seed: int = 0, threshold: Threshold = _DEFAULT) -> None:
        _check_fraction(fraction)
        check_number("seed", seed, integer=True)
        _check_threshold("threshold", threshold)
        self.fraction = fraction
        self.seed = seed
        self.threshold = threshold

    def __call__(
        self, target: Mapping[str, float], source: Mapping[str, float], sizes: Mapping[str, int]
    ) -> Tuple[str, ...]:
        """Return the names; see :class:`Selection`."""
        known = _known(target)
        state = "\n".join([str(self.seed), *(f"{name}={rate:.6f}" for name, rate in known.items())])
        drawn = {name: hashlib.sha256(f"{name}\n{state}".encode()).hexdigest() for name in known}
        place = {name: float(index) for index, name in enumerate(sorted(known, key=drawn.__getitem__))}
        return _lowest({name: place[name] for name in known}, self.fraction)


class AllLayers(Strategy):
    """Control: selects every layer whose rate is known.

    Args:
        threshold: The threshold behind the rates, which are only reported.

    Raises:
        CldaError: If ``threshold`` is not callable.

    Example:
        >>> AllLayers()({"a": 0.1, "b": 0.4}, {}, {})
        ('a', 'b')
    """

    def __init__(self, *, threshold: Threshold = _DEFAULT) -> None:
        _check_threshold("threshold", threshold)
        self.threshold = threshold

    def __call__(
        self, target: Mapping[str, float], source: Mapping[str, float], sizes: Mapping[str, int]
    ) -> Tuple[str, ...]:
        """Return the names; see :class:`Selection`."""
        return tuple(_known(target))


def _known(rates: Mapping[str, float]) -> Dict[str, float]:
    return {name: rate for name, rate in rates.items() if not math.isnan(rate)}


def _lowest(values: Mapping[str, float], fraction: float) -> Tuple[str, ...]:
    """Return the given fraction of the names, those of the lowest values, in order; of equal values the first."""
    count = max(1, math.floor(fraction * len(values) + 0.5))
    chosen = frozenset(sorted(values, key=values.__getitem__)[:count])
    return tuple(name for name in values if name in chosen)


def _check_fraction(fraction: float) -> None:
    check_number("fraction", fraction, above=0, at_most=1)


def _check_threshold(name: str, threshold: Threshold) -> None:
    if not callable(threshold) or isinstance(threshold, type):
        raise problem(
            f"{name} is not a threshold",
            expected="an instance such as MeanThreshold() or a callable",
            received=repr(threshold),
            fix="pass FixedThreshold(0.5) for a number, MeanThreshold() for a class",
        )


def _no_source(whose: str) -> Exception:
    return problem(
        f"{whose} has no source data to compare with",
        expected="at least one observation of a source batch",
        received="none",
        fix="observe source batches as such before the first round, or use a rule that reads target data only",
    )


def check_selected(selected: Any, rates: Mapping[str, float]) -> None:
    """Raise unless a selection returned names of layers with a known rate."""
    if not isinstance(selected, (tuple, list)) or not all(isinstance(name, str) and name in rates for name in selected):
        raise problem(
            "the selection returned something else than known layers",
            expected=f"a tuple of names among {list(rates)[:5]}...",
            received=repr(selected),
            fix="return names of layers with a known LSR from selection=",
        )
