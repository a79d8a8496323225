"""Lightning: a callback that steps, logs, saves and resumes the learner."""

from __future__ import annotations

import warnings
from typing import Any, Dict, List

from .._host.stepping import StepWatch
from ..checkpoint import pack, unpack
from ..learner import CollaborativeLearner
from ._engine import Steps, students_optimizer

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:
    from pytorch_lightning.callbacks import Callback

__all__ = ["CollaborationCallback"]
__dir__ = __all__.copy  # as of every other public module, see clda_core/__init__.py


class CollaborationCallback(Callback):
    """Steps the learner with the optimizer that trains the student.

    ``training_step`` adds ``learner.distill(...)`` to its loss; the callback does the rest, whatever the precision, the
    clipping and the accumulation: it observes before the optimizer steps, counts the step unless it was skipped, logs
    :meth:`~clda_core.CollaborativeLearner.metrics` every ``log_every_n_steps``, and puts learner and teacher into the
    checkpoint. A step in which the optimizer evaluates its closure several times is one step.

    Args:
        learner: The learner. Keep its teacher out of the module, which would train, move and save it as well.

    Note:
        The teacher is moved to the student's device. Where several optimizers hold parts of
        the student, the one that holds most of it counts. In manual optimization a SAM optimizer that is stepped by its
        ``first_step`` and ``second_step`` counts with its ``base_optimizer``.

    Warns:
        UserWarning: If no step is seen in an epoch, or in 100 times the accumulated batches; and if a training resumes
            from a checkpoint without the callback's state.
    """

    def __init__(self, learner: CollaborativeLearner) -> None:
        self.learner = learner
        self._watches: List[StepWatch] = []
        self._counted: Any = None
        self._restored = False
        self._steps = Steps(
            learner,
            "In manual optimization step the optimizer by its step(); or leave the callback out, and call "
            "learner.observe() before and learner.after_step() after the step",
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Move the teacher, and watch the student's optimizer.

        Raises:
            CldaError: If no optimizer of the trainer holds parameters of the student.
        """
        self._reset()
        self.learner.teacher.to(next(self.learner.student.parameters()).device)
        if trainer.global_step and not self._restored and self.learner.enabled and not self.learner.report().steps:
            warnings.warn(
                "the training resumes, and its checkpoint holds no state of CollaborationCallback: the learner starts "
                "from step 0, with the teacher that it was given",
                stacklevel=2,
            )
        self._counted = students_optimizer(trainer.optimizers, self.learner)
        if self._counted is None:
            return
        self._watches = [StepWatch(self._counted, after=self._steps.end)]
        inner = getattr(self._counted, "base_optimizer", None)  # SAM's, which is all that is stepped in its two halves
        if hasattr(inner, "step"):
            self._watches.append(StepWatch(inner, before=lambda: self._observe(trainer), after=self._steps.end))
        self._steps.begin()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Observe; gradients are complete and unscaled here."""
        if optimizer is not self._counted:
            return
        if not self._watches[0].inside:
            self._steps.end(made=False)  # one that was skipped before in the same batch, in manual optimization
        self._observe(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Drop what was observed for a step that was skipped, and log."""
        self._steps.end(made=False)  # the scaler found an overflow, and did not call the optimizer
        self._steps.after_batch(max(1, trainer.accumulate_grad_batches))
        if trainer.global_step and trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics(self.learner.metrics(), step=trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if no step was seen."""
        self._steps.warn()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Forget the step that was not finished, and watch no more."""
        self._reset()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Watch no more."""
        self._reset()

    def state_dict(self) -> Dict[str, Any]:
        """Return the states of learner and teacher, for the checkpoint."""
        return pack(self.learner)

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore both, or neither.

        Raises:
            CldaError: If one of the two does not fit.
        """
        unpack(self.learner, state_dict)
        self._restored = True

    def _observe(self, trainer: Any) -> None:
        self._steps.observe(self._counted, scaler=getattr(trainer.precision_plugin, "scaler", None))

    def _reset(self) -> None:
        for watch in self._watches:
            watch.close()
        self._watches, self._counted = [], None
        self._steps.end(made=False)
