"""When rounds happen, and how strongly they act."""

from __future__ import annotations

import math
from typing import Any, Optional, Union, cast

from typing_extensions import Literal, Protocol

from .errors import check_choice, check_number
from .strategy import Strategy

__all__ = ["Never", "RoundSchedule", "Schedule"]


class RoundSchedule(Protocol):
    """Decides when gradients are observed and when a round is made; steps are optimizer steps, counted from 1."""

    def due(self, step: int) -> bool:
        """Return whether optimizer step ``step`` ends with a round."""
        ...

    def observes(self, step: int) -> bool:
        """Return whether gradients are observed at optimizer step ``step``."""
        ...

    def strength(self, step: int) -> float:
        """Return the factor in [0, 1] by which an update after step ``step`` is scaled."""
        ...


class Schedule(Strategy):
    r"""A round every ``interval`` optimizer steps, with a strength that may decay; a warm-up is possible, not needed.

    Step :math:`n` (counted from 1) ends with a round if :math:`n > w` and :math:`i` divides :math:`n - w`, with warm-up
    :math:`w` and interval :math:`i`. For the first of every ``observe_every`` rounds the last ``observations`` steps
    before and including it are observed; the rounds between them go by the same rates. With
    :math:`p = (n - w) / (T - w)` the strength is 1, :math:`1 - p` (linear) or :math:`(1 + \cos \pi p) / 2` (cosine).
    Whether a round changes the teacher, and by how much, is a matter of the student's lead (:mod:`clda_core.lead`), so
    the defaults suit trainings of any length. The paper does not publish its schedule; this one and its defaults are
    ours.

    Args:
        warmup: Optimizer steps before which nothing is observed or updated; a float in (0, 1) is a share of ``total``.
        interval: Optimizer steps between rounds, >= 1; a float in (0, 1) is a share of ``total``, at least one step.
        observations: Observed steps for a round, between 1 and ``interval``.
        observe_every: Rounds from one that is observed to the next, >= 1. Rates and lead change slowly, and an
            observation costs a forward and a backward pass of the teacher, and a look at both networks their passes.
        decay: How the strength falls after the warm-up.
        total: Optimizer steps of the whole training; needed by ``"linear"``, ``"cosine"`` and shares, and > ``warmup``.

    Raises:
        CldaError: If a number is out of range or ``total`` is missing.

    Example:
        >>> schedule = Schedule(warmup=4, interval=3)
        >>> [step for step in range(1, 12) if schedule.due(step)]
        [7, 10]
        >>> schedule = Schedule(warmup=4, interval=3, observe_every=2)
        >>> [step for step in range(1, 17) if schedule.observes(step)]
        [7, 13]
    """

    def __init__(
        self,
        *,
        warmup: Union[int, float] = 0,
        interval: Union[int, float] = 7,
        observations: int = 1,
        observe_every: int = 3,
        decay: Literal["constant", "linear", "cosine"] = "constant",
        total: Optional[int] = None,
    ) -> None:
        warmup = _steps("warmup", warmup, total, at_least=0)
        interval = _steps("interval", interval, total, at_least=1)
        check_number("observations", observations, at_least=1, at_most=interval, integer=True)
        check_number("observe_every", observe_every, at_least=1, integer=True)
        check_choice("decay", decay, ("constant", "linear", "cosine"))
        if total is not None or decay != "constant":
            check_number("total", total, above=warmup, integer=True)
        self.warmup = warmup
        self.interval = interval
        self.observations = observations
        self.observe_every = observe_every
        self.decay = decay
        self.total = total

    def due(self, step: int) -> bool:
        """Return whether optimizer step ``step`` (counted from 1) ends with a round."""
        return step > self.warmup and (step - self.warmup) % self.interval == 0

    def observes(self, step: int) -> bool:
        """Return whether gradients are observed at optimizer step ``step``."""
        if step <= self.warmup:
            return False
        rounds, steps = divmod(step - self.warmup - 1, self.interval)
        return rounds % self.observe_every == 0 and steps >= self.interval - self.observations

    def strength(self, step: int) -> float:
        """Return the factor in [0, 1] by which an update after step ``step`` is scaled."""
        if self.decay == "constant" or self.total is None:
            return 1.0
        progress = min(max((step - self.warmup) / (self.total - self.warmup), 0.0), 1.0)
        return 1.0 - progress if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def _steps(name: str, value: Any, total: Optional[int], *, at_least: int) -> int:
    """Return a number of steps, which may be given as a share of the total."""
    if isinstance(value, float) and 0 < value < 1:
        check_number("total", total, above=0, integer=True)
        value = max(at_least, round(value * cast(int, total)))
    check_number(name, value, at_least=at_least, integer=True)
    return cast(int, value)


class Never(Strategy):
    """No rounds: plain knowledge distillation from a frozen teacher, the baseline that CLDA is compared with."""

    def due(self, step: int) -> bool:
        """Return False."""
        return False

    def observes(self, step: int) -> bool:
        """Return False."""
        return False

    def strength(self, step: int) -> float:
        """Return 0."""
        return 0.0


def makes_rounds(schedule: RoundSchedule) -> bool:
    """Return whether a schedule ever makes a round."""
    return not isinstance(schedule, Never)
