"""The optimizer step in the making, and what was distilled in it."""

from __future__ import annotations

import warnings
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

import torch
from torch import Tensor

from ._host.ranks import adding, sum_across_ranks, world_size
from ._host.stepping import Written, just_stepped, warn_if_stepped_again
from .errors import problem
from .outputs import Outputs, owned, without_graph
from .saliency.observer import Observation
from .update import SourceLoss

_PATIENCE = 100
"""Calls of ``distill`` without a step, after which a warning is due: few hosts accumulate that many batches."""


_WATCHED = 3
"""Steps after which it is looked whether the host makes them once more: if it does, it does from the first on."""


class Batch(NamedTuple):
    """What a round runs the models on.

    Attributes:
        inputs: What the teacher is called with; ``None`` where the host gave its output alone.
        student_inputs: What the student is called with, where that is something else.
        view: The same images on another view, as the teacher is called with it.
        student_view: The same for the student, where that is called with something else.
        source_loss: The host's supervised loss.
        mask: What counts.
    """

    inputs: Any = None
    student_inputs: Any = None
    view: Any = None
    student_view: Any = None
    source_loss: Optional[SourceLoss] = None
    mask: Optional[Tensor] = None


def check_views(batch: Batch) -> None:
    """Raise unless the views of a batch have the inputs beside them that they are views of."""
    lone = batch.view is not None and batch.inputs is None
    if lone or (batch.student_view is not None and (batch.view is None or batch.student_inputs is None)):
        name, beside = ("view", "the inputs") if lone else ("student_view", "view= and student_inputs=")
        raise problem(
            f"distill() got {name}= alone",
            expected=f"{name}= with {beside} beside it",
            received=f"inputs={_given(batch.inputs)}, student_inputs={_given(batch.student_inputs)}, "
            f"view={_given(batch.view)}, student_view={_given(batch.student_view)}",
            fix="call distill(student_output, images, view=changed_images), and student_view= only where the student "
            "takes student_inputs=",
        )


def with_views(batch: Batch, wanted: bool) -> Batch:
    """Return a batch whose views are made, where they are functions, if a round will want them; else one without."""
    if not wanted:
        return batch._replace(view=None, student_view=None)
    with torch.no_grad():
        view, student_view = (made() if callable(made) else made for made in (batch.view, batch.student_view))
    return batch._replace(view=view, student_view=student_view)


def _given(value: Any) -> str:
    return "None" if value is None else type(value).__name__


class Pair(NamedTuple):
    """What both models put out for one batch.

    Attributes:
        student: The student's outputs.
        teacher: The teacher's; ``None`` where the only process has no data.
        batch: What both are run on in a round, with a mask of bool or float weights.
        has_data: Whether this process has any of it; all the others are stand-ins otherwise.
        as_in_rounds: Whether the teacher's outputs are those of eval mode, as rounds make them.
    """

    student: Outputs
    teacher: Optional[Outputs]
    batch: Batch
    has_data: bool
    as_in_rounds: bool


class Step:
    """All that belongs to one optimizer step. Replacing the value drops the step.

    Attributes:
        has_data: Whether this process has target data; ``None`` as long as ``distill`` was not called.
        batch: What a round runs the models on.
        teacher: The teacher's outputs on that batch; ``None`` where a round must ask for them.
        shapes: Of the logits that were distilled, without the batch, by whose they are.
        observed: The domains of which ``observe`` was called.
        pending: What was observed; it counts once the step is made.
        loss_given: Whether the host gave a loss on target data to be observed.
        missed: Whether the step should have been observed and had no data then.
        unscaled: Whether the gradients of the KD loss's own parameters are unscaled.
        learning_rate: The host's, where its optimizer is of Adam's kind and known; else ``None``.
        loss_scale: By what our losses are multiplied before they are differentiated, 1 unless the host scales its own.
    """

    def __init__(self) -> None:
        self.has_data: Optional[bool] = None
        self.batch = Batch()
        self.teacher: Optional[Outputs] = None
        self.shapes: Dict[str, Tuple[int, ...]] = {}
        self.observed: Set[str] = set()
        self.pending: List[Observation] = []
        self.loss_given = False
        self.missed = False
        self.unscaled = False
        self.learning_rate: Optional[float] = None
        self.loss_scale = 1.0
        self._anywhere = False
        self._calls = 0
        self._written: Written = []

    def __getstate__(self) -> Dict[str, Any]:
        """Leave out of a copy what was written: its parameters are others."""
        return {**vars(self), "_written": []}

    def follow(self, optimizer: Any, number: int) -> None:
        """Note that the step before this one was made by an optimizer, ``number`` steps from the first."""
        if number <= _WATCHED:
            self._written = just_stepped(optimizer)

    def count_call(self) -> None:
        """Count a call of ``distill``; warn if there were many and the step is not made, or if it was made twice."""
        self._calls += 1
        warn_if_stepped_again(self._written)
        self._written = []
        if self._calls == _PATIENCE:
            warnings.warn(
                f"distill() was called {_PATIENCE} times without a step of the learner, which makes no rounds then. "
                "Call learner.step(optimizer) in place of optimizer.step(), or observe() before and after_step() after "
                "it; and distill() under torch.no_grad() where the loss is only read. If you do "
                "accumulate the gradients of so many batches, all is well",
                stacklevel=4,
            )

    @property
    def adds(self) -> bool:
        """Whether this process adds to what the processes average."""
        return self.has_data is not False

    def keep(self, pair: Pair) -> None:
        """Keep a batch for the round, without the graph of a network that made it: no round needs that."""
        kept = {name: without_graph(value) for name, value in pair.batch._asdict().items() if name != "source_loss"}
        self.batch = pair.batch._replace(**kept)
        both = {"student": pair.student, "teacher": pair.teacher} if pair.has_data else {}
        self.shapes = {whose: tuple(of.logits.shape[1:]) for whose, of in both.items() if of is not None}
        self.teacher = owned(pair.teacher) if pair.teacher is not None and pair.as_in_rounds else None

    def anywhere(self, device: torch.device) -> bool:
        """Return whether any process has target data; all of them must ask, and all get the same answer."""
        if not self._anywhere:
            self._anywhere = bool(self.has_data)
            if world_size() > 1:
                with adding(bool(self.has_data)):
                    self._anywhere = bool(sum_across_ranks([torch.ones(1, device=device)])[0].item())
        return self._anywhere
