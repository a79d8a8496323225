"""Lightning: a callback that steps, logs, saves and resumes the learner."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import torch

from .._stepping import overflowed
from ..learner import CollaborativeLearner

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:
    from pytorch_lightning.callbacks import Callback

__all__ = ["CollaborationCallback"]


class CollaborationCallback(Callback):
    """Steps the learner with the optimizer that trains the student.

    ``training_step`` adds ``learner.distill(...)`` to its loss; the callback does the rest, whatever the precision, the
    clipping and the accumulation: it observes before the optimizer steps, counts the step unless it was skipped, logs
    :meth:`~clda_core.CollaborativeLearner.metrics` every ``log_every_n_steps``, and puts learner and teacher into the
    checkpoint.

    Args:
        learner: The learner. Keep its teacher out of the module, which would train, move and save it as well.

    Note:
        Needs torch 2.0 or newer. The teacher is moved to the student's device. Where several optimizers hold parts of
        the student, the one that holds its first trainable parameter counts.
    """

    def __init__(self, learner: CollaborativeLearner) -> None:
        self.learner = learner
        self._handles: List[Any] = []
        self._counted: Optional[torch.optim.Optimizer] = None
        self._observed = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Move the teacher, and watch the student's optimizer."""
        first = next(parameter for parameter in self.learner.student.parameters() if parameter.requires_grad)
        self.learner.teacher.to(first.device)
        for optimizer in trainer.optimizers:
            if any(parameter is first for group in optimizer.param_groups for parameter in group["params"]):
                self._counted = optimizer
                self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Observe; gradients are complete and unscaled here."""
        if optimizer is self._counted:
            self._drop_skipped()
            self.learner.observe(scaler=getattr(trainer.precision_plugin, "scaler", None))
            self._observed = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Drop what was observed for a step that was skipped, and log."""
        self._drop_skipped()
        if trainer.global_step and trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics(self.learner.metrics(), step=trainer.global_step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hook off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._counted = [], None

    def state_dict(self) -> Dict[str, Any]:
        """Return the states of learner and teacher, for the checkpoint."""
        return {"learner": self.learner.state_dict(), "teacher": self.learner.teacher.state_dict()}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore them."""
        self.learner.load_state_dict(state_dict["learner"])
        self.learner.teacher.load_state_dict(state_dict["teacher"])

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._observed:
            self._observed = False
            self.learner.after_step(stepped=not overflowed(optimizer))

    def _drop_skipped(self) -> None:
        if self._observed:  # and the optimizer was not called: the scaler found an overflow
            self._observed = False
            self.learner.after_step(stepped=False)
