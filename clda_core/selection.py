"""From saliency rates to the layers to update. Everything here is a pure function of the rates."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from typing import Any, Dict, Mapping, Optional, Tuple

from typing_extensions import Protocol, runtime_checkable

from .errors import check_number, problem
from .strategy import Strategy

__all__ = [
    "AllLayers",
    "BelowRate",
    "DomainShift",
    "DrawnFraction",
    "HighestFraction",
    "LowestFraction",
    "RandomFraction",
    "Selection",
]


class Selection(Protocol):
    """Which of the teacher's layers are non-salient; a plain function will do."""

    def __call__(self, target: Mapping[str, float], source: Mapping[str, float], /) -> Tuple[str, ...]:
        """Return the names of the non-salient layers.

        Args:
            target: Layer saliency rates on target data, in the model's order, in [0, 1]; a layer whose rate is unknown
                is absent.
            source: The same on source data; empty where none was observed.

        Returns:
            Names among those of ``target``, in its order. The same arguments give the same names: every rank of a
            distributed run, and a resumed run, then decides alike.
        """
        ...


@runtime_checkable
class DrawsAnew(Protocol):
    """A selection that chooses anew in each round, though the rates be the same."""

    def draw(self, target: Mapping[str, float], source: Mapping[str, float], step: int, /) -> Tuple[str, ...]:
        """Return the names for the round after an optimizer step; see :class:`Selection`, which it needs not be."""
        ...


def select(selection: Any, target: Mapping[str, float], source: Mapping[str, float], step: int) -> Tuple[str, ...]:
    """Return the non-salient layers in the round after an optimizer step.

    Raises:
        CldaError: If the selection returned something else than names of layers with a known rate.
    """
    chosen = selection.draw(target, source, step) if isinstance(selection, DrawsAnew) else selection(target, source)
    check_selected(chosen, target)
    return tuple(chosen)


class LowestFraction(Strategy):
    """Selects the layers with the lowest rates on target data.

    Args:
        fraction: Of the layers with a known rate, in (0, 1], rounded to the nearest number, at least one layer.

    Raises:
        CldaError: If ``fraction`` is out of range.

    Example:
        >>> LowestFraction(fraction=0.5)({"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.2}, {})
        ('a', 'd')
    """

    def __init__(self, *, fraction: float = 0.3) -> None:
        self.fraction = _checked(fraction)

    def __call__(self, target: Mapping[str, float], source: Mapping[str, float]) -> Tuple[str, ...]:
        """Return the names; see :class:`Selection`."""
        return _lowest(_known(target), self.fraction)


class DrawnFraction(Strategy):
    r"""Draws layers anew in each round, the likelier the lower their rate on target data.

    Of the layers in order of their rate, that of place :math:`r = 1, \dots, L` (1 for the lowest) has the weight
    :math:`w_r = (L + 1 - r)^\beta`, and layers are drawn without replacement in proportion to their weights. With
    ``bias`` :math:`\beta = 0` every layer is as likely; the larger it is, the nearer to :class:`LowestFraction`. Layers
    of equal rates share the mean of their places.
    Always the same layers would overfit where others are as non-salient; all of them at once are more than a teacher
    bears where nothing but the student holds it.

    Stateless: the draw is a hash of the seed, the optimizer step and the layers' names, so it is the same on every
    rank, repeats when a run is resumed, and uses no random generator.

    Args:
        fraction: Of the layers with a known rate, in (0, 1], rounded to the nearest number, at least one layer.
        bias: The exponent :math:`\beta`, >= 0.
        seed: Any integer.

    Raises:
        CldaError: If an argument is out of range.

    Example:
        >>> rule = DrawnFraction(fraction=0.5)
        >>> rates = {"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.2}
        >>> [rule.draw(rates, {}, step) for step in (10, 20, 30)]
        [('c', 'd'), ('c', 'd'), ('a', 'd')]

    References:
        Efraimidis and Spirakis, Weighted random sampling with a reservoir, Information Processing Letters 2006, for the
        draw: the largest :math:`u_r^{1 / w_r}` of uniform :math:`u_r`.
    """

    def __init__(self, *, fraction: float = 0.5, bias: float = 1.0, seed: int = 0) -> None:
        check_number("bias", bias, at_least=0)
        check_number("seed", seed, integer=True)
        self.fraction = _checked(fraction)
        self.bias = bias
        self.seed = seed

    def __call__(self, target: Mapping[str, float], source: Mapping[str, float]) -> Tuple[str, ...]:
        """Return the names of the first draw."""
        return self.draw(target, source, 0)

    def draw(self, target: Mapping[str, float], source: Mapping[str, float], step: int) -> Tuple[str, ...]:
        """Return the names for the round after optimizer step ``step``."""
        known = _known(target)
        ordered = sorted(known.values())
        keys: Dict[str, float] = {}
        for name, rate in known.items():
            place = (bisect_left(ordered, rate) + 1 + bisect_right(ordered, rate)) / 2
            # Sorting by log(-log(u)) - log(w) from below is sorting by u ** (1 / w) from above, and never overflows.
            drawn = math.log(-math.log(_uniform(f"{self.seed}\n{step}\n{name}")))
            keys[name] = drawn - self.bias * math.log(len(known) + 1 - place)
        return _lowest(keys, self.fraction)


class BelowRate(Strategy):
    """Selects the layers whose rate on target data is below a given one; possibly none, possibly all.

    Args:
        rate: In (0, 1]. Under a :class:`~clda_core.saliency.QuantileThreshold` rates are relative; under the others
            they are not.

    Raises:
        CldaError: If ``rate`` is out of range.

    Example:
        >>> BelowRate(rate=0.25)({"a": 0.1, "b": 0.4, "c": 0.25}, {})
        ('a',)
    """

    def __init__(self, *, rate: float = 0.1) -> None:
        check_number("rate", rate, above=0, at_most=1)
        self.rate = rate

    def __call__(self, target: Mapping[str, float], source: Mapping[str, float]) -> Tuple[str, ...]:
        """Return the names; see :class:`Selection`."""
        return tuple(name for name, rate in _known(target).items() if rate < self.rate)


class DomainShift(Strategy):
    r"""Selects the layers that domain shift made non-salient: salient on source data, less so on target data.

    .. math:: \Delta_l = \mathrm{LSR}_l^{\text{source}} - \mathrm{LSR}_l^{\text{target}}

    Give ``fraction`` for the layers of largest :math:`\Delta_l`, whatever its size or sign, or ``margin`` for those
    above it, possibly none. With neither, ``fraction`` is 0.3. A layer whose rate is unknown on either side is not
    selected. Each domain is measured against a threshold of its own, unless the learner's ``threshold=`` is a
    :class:`~clda_core.saliency.ReferenceThreshold`.

    Args:
        fraction: Of the layers with known rates, in (0, 1], rounded to the nearest number, at least one layer.
        margin: In [0, 1).

    Raises:
        CldaError: If an argument is out of range, or both ``fraction`` and ``margin`` are given; on a call, if no
            source data was observed.

    Example:
        >>> rule = DomainShift(margin=0.1)
        >>> rule({"a": 0.3, "b": 0.3, "c": 0.3}, {"a": 0.5, "b": 0.35, "c": 0.2})
        ('a',)

    References:
        Cho et al., CLDA: Collaborative Learning for Enhanced Unsupervised Domain Adaptation, 2024, for the notion of
        domain-shift-induced non-salient parameters; the rule is ours. <https://arxiv.org/abs/2409.02699>
    """

    def __init__(self, *, fraction: Optional[float] = None, margin: Optional[float] = None) -> None:
        if fraction is not None and margin is not None:
            raise problem(
                "fraction and margin exclude each other",
                expected="one of them",
                received=f"fraction={fraction!r}, margin={margin!r}",
                fix="leave one of them out",
            )
        if margin is not None:
            check_number("margin", margin, at_least=0, below=1)
        self.fraction = None if fraction is None else _checked(fraction)
        self.margin = margin

    def __call__(self, target: Mapping[str, float], source: Mapping[str, float]) -> Tuple[str, ...]:
        """Return the names; see :class:`Selection`."""
        before = _known(source)
        if not before:
            raise problem(
                f"{type(self).__name__} has no source data to compare with",
                expected="at least one observation of a source batch",
                received="none",
                fix="observe source batches as such before the first round, or use a rule that reads target data only",
            )
        change = {name: rate - before[name] for name, rate in _known(target).items() if name in before}
        if self.margin is not None:
            return tuple(name for name, value in change.items() if -value > self.margin)
        return _lowest(change, 0.3 if self.fraction is None else self.fraction)


class HighestFraction(Strategy):
    """Control: selects the layers with the highest rates, the opposite of :class:`LowestFraction`.

    Args:
        fraction: As for :class:`LowestFraction`.

    Raises:
        CldaError: If ``fraction`` is out of range.

    Example:
        >>> HighestFraction(fraction=0.5)({"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.2}, {})
        ('b', 'c')
    """

    def __init__(self, *, fraction: float = 0.3) -> None:
        self.fraction = _checked(fraction)

    def __call__(self, target: Mapping[str, float], source: Mapping[str, float]) -> Tuple[str, ...]:
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

    Raises:
        CldaError: If ``fraction`` is out of range or ``seed`` is no integer.

    Example:
        >>> RandomFraction(fraction=0.5, seed=1)({"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.2}, {})
        ('a', 'd')
    """

    def __init__(self, *, fraction: float = 0.3, seed: int = 0) -> None:
        check_number("seed", seed, integer=True)
        self.fraction = _checked(fraction)
        self.seed = seed

    def __call__(self, target: Mapping[str, float], source: Mapping[str, float]) -> Tuple[str, ...]:
        """Return the names; see :class:`Selection`."""
        known = _known(target)
        state = "\n".join([str(self.seed), *(f"{name}={rate:.6f}" for name, rate in known.items())])
        drawn = {name: hashlib.sha256(f"{name}\n{state}".encode()).hexdigest() for name in known}
        place = {name: float(index) for index, name in enumerate(sorted(known, key=drawn.__getitem__))}
        return _lowest({name: place[name] for name in known}, self.fraction)


class AllLayers(Strategy):
    """Control: selects every layer whose rate is known.

    Example:
        >>> AllLayers()({"a": 0.1, "b": 0.4}, {})
        ('a', 'b')
    """

    def __call__(self, target: Mapping[str, float], source: Mapping[str, float]) -> Tuple[str, ...]:
        """Return the names; see :class:`Selection`."""
        return tuple(_known(target))


def _uniform(text: str) -> float:
    """Return a number in (0, 1) that depends on a text alone."""
    return (int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) + 0.5) / 16.0**13


def _checked(fraction: float) -> float:
    check_number("fraction", fraction, above=0, at_most=1)
    return fraction


def _known(rates: Mapping[str, float]) -> Dict[str, float]:
    return {name: rate for name, rate in rates.items() if not math.isnan(rate)}


def _lowest(values: Mapping[str, float], fraction: float) -> Tuple[str, ...]:
    """Return the given fraction of the names, those of the lowest values, in order; of equal values the first."""
    count = max(1, math.floor(fraction * len(values) + 0.5))
    chosen = frozenset(sorted(values, key=values.__getitem__)[:count])
    return tuple(name for name in values if name in chosen)


def check_selected(selected: Any, rates: Mapping[str, float]) -> None:
    """Raise unless a selection returned names of layers with a known rate."""
    if not isinstance(selected, (tuple, list)) or not all(isinstance(name, str) and name in rates for name in selected):
        raise problem(
            "the selection returned something else than known layers",
            expected=f"a tuple of names among {list(rates)[:5]}...",
            received=repr(selected),
            fix="return names of layers with a known LSR from selection=",
        )
