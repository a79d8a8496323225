"""The target data of the optimizer step in the making, and the rounds that wait for some."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor

from ._host.ranks import adding, sum_across_ranks, world_size
from .schedule import RoundSchedule


@dataclass
class TargetStep:
    """What one optimizer step has of target data.

    Attributes:
        here: Whether this process has some; ``None`` as long as ``distill`` was not called.
        inputs: What a round runs the teacher on.
        student_inputs: What it runs the student on, where that is something else.
        mask: Which positions of them count.
        shapes: Of the logits that were distilled, without the batch, by whose they are.
        loss_given: Whether the host gave a loss on target data to be observed.
        missed: Whether the step should have been observed and had no data then.
    """

    here: Optional[bool] = None
    inputs: Any = None
    student_inputs: Any = None
    mask: Optional[Tensor] = None
    shapes: Dict[str, Tuple[int, ...]] = field(default_factory=dict)
    loss_given: bool = False
    missed: bool = False
    _anywhere: bool = False

    @property
    def adds(self) -> bool:
        """Whether this process adds to what the processes average."""
        return self.here is not False

    def anywhere(self, device: torch.device) -> bool:
        """Return whether any process has target data; all of them must ask, and all get the same answer."""
        if not self._anywhere:
            self._anywhere = bool(self.here)
            if world_size() > 1:
                with adding(bool(self.here)):
                    self._anywhere = bool(sum_across_ranks([torch.ones(1, device=device)])[0].item())
        return self._anywhere


class DueRounds:
    """At which steps a round is due and gradients are observed; a round without target data is owed to a later step.

    Args:
        schedule: The schedule.

    Attributes:
        owed: The step whose round is owed, or ``None``.
    """

    def __init__(self, schedule: RoundSchedule) -> None:
        self.owed: Optional[int] = None
        self._schedule = schedule
        self._warned = False

    def due(self, step: int) -> bool:
        """Return whether a step ends with a round, if it has target data."""
        return self._schedule.due(step) or self.owed is not None

    def observed(self, step: int) -> bool:
        """Return whether gradients are observed at a step, be it for a round that is owed."""
        return self._schedule.observes(step) or (self.owed is not None and self._schedule.observes(self.owed))

    def owe(self, step: int) -> None:
        """Put the round of a step off to the next one with target data."""
        if self.owed is None or not self._schedule.observes(self.owed):
            self.owed = step
        self.warn_of_no_data(step)

    def warn_of_no_data(self, step: int) -> None:
        """Say once that a step that counts for rounds has no target data."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"optimizer step {step} has no target data: distill() was not called, or its batch was empty or masked "
                "out whole. Nothing is observed at such a step, and a round that is due is made at the next step with "
                "target data. This is said once",
                stacklevel=4,
            )
