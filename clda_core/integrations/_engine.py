"""What every integration asks of its engine: that it trains the learner's student, and that it steps."""

from __future__ import annotations

import warnings
from typing import Any, Iterable, List

from ..errors import problem
from ..learner import CollaborativeLearner

_PATIENCE = 100
"""Batches, each times what is accumulated, after which a training that was not stepped once is worth a warning."""


def students_optimizer(optimizers: Iterable[Any], learner: CollaborativeLearner) -> Any:
    """Return the optimizer that holds most of the student's trainable elements, of several that hold as many the first.

    Returns:
        The optimizer; ``None`` where none holds any and the learner is not enabled.

    Raises:
        CldaError: If none holds any parameter of the student.
    """
    optimizers = list(optimizers)
    trainable = {
        id(parameter): parameter.numel() for parameter in learner.student.parameters() if parameter.requires_grad
    }
    held = [sum(trainable.get(id(parameter), 0) for parameter in _parameters(optimizer)) for optimizer in optimizers]
    if any(held):
        return optimizers[held.index(max(held))]
    if not learner.enabled:
        return None
    raise problem(
        "the engine's optimizer does not train the learner's student, so that no step would be counted",
        expected="an optimizer that holds trainable parameters of learner.student",
        received=f"{len(optimizers)} optimizers without any"
        if trainable
        else "a student whose parameters are all frozen",
        fix="build the learner with the very model that the engine trains, before anything copies it, and make the "
        "optimizer of that model's parameters",
    )


def check_trains(model: Any, optimizer: Any, learner: CollaborativeLearner) -> None:
    """Raise if an engine that steps the learner by itself trains another model, or another part of it.

    Optimizers that hold flat copies of the parameters, as DeepSpeed's do, say nothing of it.

    Raises:
        CldaError: If the student is none of the engine's model, or the optimizer holds only other parts of that.
    """
    of_model = {id(parameter) for parameter in model.parameters()}
    held = {id(parameter) for parameter in _parameters(optimizer)}
    of_student = {id(parameter) for parameter in learner.student.parameters()}
    if held & of_model or not of_student & of_model:
        students_optimizer([optimizer], learner)


class Steps:
    """The learner's two halves around the steps that an engine makes.

    Warns, once in a training, if the engine goes through many batches, or an epoch, and is never seen to step. So it is
    with an optimizer that is stepped in two halves, or by itself.

    Args:
        learner: The learner.
        fix: What to do if no step is seen.
    """

    def __init__(self, learner: CollaborativeLearner, fix: str) -> None:
        self._learner, self._fix = learner, fix
        self._observed = False
        self._optimizer: Any = None
        self._batches, self._seen = 0, True

    def begin(self) -> None:
        """Begin a training; what an unfinished step has left of another is dropped."""
        self.end(made=False)
        self._batches, self._seen = 0, False

    def observe(self, optimizer: Any, *, scaler: Any = None) -> None:
        """Observe, once in a step: LBFGS and SAM evaluate its closure several times.

        Args:
            optimizer: The one that is about to step, by whose learning rate an update may choose its own.
            scaler: The GradScaler that scaled the loss, if any.
        """
        self._seen, self._optimizer = True, optimizer
        if not self._observed:
            self._learner.observe(scaler=scaler)
            self._observed = True

    def end(self, made: bool) -> None:
        """Count the step that was observed, if there is one and it was ``made``."""
        if self._observed:
            optimizer, self._observed, self._optimizer = self._optimizer, False, None
            self._learner.after_step(stepped=made, optimizer=optimizer)

    def after_batch(self, accumulated: int = 1) -> None:
        """Note a batch; of those in ``accumulated`` one is a step."""
        if not self._seen:
            self._batches += 1
            if self._batches >= _PATIENCE * accumulated:
                self.warn()

    def warn(self) -> None:
        """Say so if there were batches and no step; at the end of an epoch."""
        if self._seen or not self._batches or not self._learner.enabled:
            return
        self._seen = True
        warnings.warn(
            f"{self._batches} batches were trained, and no optimizer step of the student was seen: the learner counts "
            f"none and makes no rounds. {self._fix}",
            stacklevel=3,
        )


def _parameters(optimizer: Any) -> List[Any]:
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]
