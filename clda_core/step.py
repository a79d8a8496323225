"""The optimizer step in the making, and what was distilled in it."""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

import torch
from torch import Tensor

from ._host.ranks import adding, sum_across_ranks, world_size
from .outputs import Outputs, without_graph
from .saliency.observer import Observation


class Pair(NamedTuple):
    """What both models put out for one batch, and what they are run on in a round.

    Attributes:
        student: The student's outputs.
        teacher: The teacher's; ``None``, like all that follows, where the only process has no data.
        inputs: What the teacher is run on.
        student_inputs: What the student is run on, where that is something else.
        mask: What counts.
        has_data: Whether this process has any of it; all the others are stand-ins otherwise.
    """

    student: Outputs
    teacher: Optional[Outputs]
    inputs: Any
    student_inputs: Any
    mask: Optional[Tensor]
    has_data: bool


class Step:
    """All that belongs to one optimizer step. Replacing the value drops the step.

    Attributes:
        here: Whether this process has target data; ``None`` as long as ``distill`` was not called.
        inputs: What a round runs the teacher on.
        student_inputs: What it runs the student on, where that is something else.
        mask: Which positions of them count.
        shapes: Of the logits that were distilled, without the batch, by whose they are.
        observed: The domains of which ``observe`` was called.
        pending: What was observed; it counts once the step is made.
        loss_given: Whether the host gave a loss on target data to be observed.
        missed: Whether the step should have been observed and had no data then.
        unscaled: Whether the gradients of the KD loss's own parameters are unscaled.
    """

    def __init__(self) -> None:
        self.here: Optional[bool] = None
        self.inputs: Any = None
        self.student_inputs: Any = None
        self.mask: Optional[Tensor] = None
        self.shapes: Dict[str, Tuple[int, ...]] = {}
        self.observed: Set[str] = set()
        self.pending: List[Observation] = []
        self.loss_given = False
        self.missed = False
        self.unscaled = False
        self._anywhere = False

    @property
    def adds(self) -> bool:
        """Whether this process adds to what the processes average."""
        return self.here is not False

    def keep(self, pair: Pair) -> None:
        """Keep a batch for the round, without the graph of a network that made it: no round needs that."""
        batch = (pair.inputs, pair.student_inputs, pair.mask)
        self.inputs, self.student_inputs, self.mask = map(without_graph, batch)
        both = {"student": pair.student, "teacher": pair.teacher} if pair.has_data else {}
        self.shapes = {whose: tuple(of.logits.shape[1:]) for whose, of in both.items() if of is not None}

    def anywhere(self, device: torch.device) -> bool:
        """Return whether any process has target data; all of them must ask, and all get the same answer."""
        if not self._anywhere:
            self._anywhere = bool(self.here)
            if world_size() > 1:
                with adding(bool(self.here)):
                    self._anywhere = bool(sum_across_ranks([torch.ones(1, device=device)])[0].item())
        return self._anywhere
