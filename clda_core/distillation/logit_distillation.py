"""What the strategies on logits have in common: their options, with which they call a function."""

from __future__ import annotations

from typing import Callable, Optional, Sequence, Tuple

from torch import Tensor

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

    _loss: Callable[..., Tensor]
    """The function; its options are named like the strategy's."""

    _weights: Tuple[str, ...] = ()
    """The names of those that weigh the loss's parts."""

    def __init__(self, *, temperature: float = 4.0, class_map: Optional[Sequence[int]] = None) -> None:
        check_options(temperature)
        check_class_map(class_map)
        self.temperature = temperature
        self.class_map = class_map

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Return the loss of logits ``(N, C, ...)``."""
        options = {name: getattr(self, name) for name in ("temperature", "class_map", *self._weights)}
        return self._loss(student_logits, teacher_logits, mask, **options)
