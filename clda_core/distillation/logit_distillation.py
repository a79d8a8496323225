"""What the strategies on logits have in common: their options."""

from __future__ import annotations

from typing import Optional, Sequence

from ..errors import check_number
from ..strategy import Strategy
from .class_map import check_class_map

__all__ = ["LogitDistillation", "check_options"]


def check_options(temperature: float, **weights: float) -> None:
    """Raise :class:`CldaError` unless the temperature is > 0 and the weights of a loss's parts are >= 0."""
    check_number("temperature", temperature, above=0)
    for name, weight in weights.items():
        check_number(name, weight, at_least=0)


class LogitDistillation(Strategy):
    """A strategy on logits, with a temperature, for networks whose classes may differ."""

    def __init__(self, *, temperature: float = 4.0, class_map: Optional[Sequence[int]] = None) -> None:
        check_options(temperature)
        check_class_map(class_map)
        self.temperature = temperature
        self.class_map = class_map
