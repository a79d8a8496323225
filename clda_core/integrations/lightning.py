"""Lightning: a callback that steps, logs, saves and resumes the learner."""

from __future__ import annotations

import warnings
from typing import Any, Dict, List

from .._host.stepping import overflowed
from ..checkpoint import pack, unpack
from ..learner import CollaborativeLearner
from ._engine import Unstepped, not_watched, students_optimizer

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
    checkpoint. A step in which the optimizer evaluates its closure several times is one step.

    Args:
        learner: The learner. Keep its teacher out of the module, which would train, move and save it as well.

    Note:
        Needs torch 2.0 or newer. The teacher is moved to the student's device. Where several optimizers hold parts of
        the student, the one that holds most of it counts. In manual optimization a SAM optimizer that is stepped by its
        ``first_step`` and ``second_step`` counts with its ``base_optimizer``.

    Warns:
        UserWarning: If no step is seen in an epoch, or in 100 times the accumulated batches; and if a training resumes
            from a checkpoint without the callback's state.
    """

    def __init__(self, learner: CollaborativeLearner) -> None:
        self.learner = learner
        self._handles: List[Any] = []
        self._counted: Any = None
        self._observed = False
        self._depth = 0  # of the optimizer's step, whose hooks fire again in one that calls super().step()
        self._restored = False
        self._unstepped = Unstepped(
            "In manual optimization step the optimizer by its step(); or leave the callback out, and call "
            "learner.observe() before and learner.after_step() after the step"
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Move the teacher, and watch the student's optimizer.

        Raises:
            CldaError: If no optimizer of the trainer holds parameters of the student, or it cannot be watched.
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
        self._watch(self._counted, self._before_step)
        inner = getattr(self._counted, "base_optimizer", None)  # SAM's, which is all that is stepped in its two halves
        if hasattr(inner, "register_step_pre_hook"):
            self._watch(inner, lambda *_: self._observe(trainer))
        self._unstepped.begin()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Observe; gradients are complete and unscaled here."""
        if optimizer is not self._counted:
            return
        if not self._depth:
            self._drop_skipped()  # of a step before in the same batch, in manual optimization
        self._observe(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Drop what was observed for a step that was skipped, and log."""
        self._drop_skipped()
        self._unstepped.after_batch(self.learner, max(1, trainer.accumulate_grad_batches))
        if trainer.global_step and trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics(self.learner.metrics(), step=trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if no step was seen."""
        self._unstepped.warn(self.learner)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Forget the step that was not finished, and take the hooks off the optimizer."""
        self._reset()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks off the optimizer."""
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

    def _watch(self, optimizer: Any, before: Any) -> None:
        if not hasattr(optimizer, "register_step_pre_hook"):
            raise not_watched(optimizer)
        self._handles.append(optimizer.register_step_pre_hook(before))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth += 1

    def _observe(self, trainer: Any) -> None:
        """Observe, once in a step: LBFGS and SAM evaluate its closure several times."""
        if not self._observed:
            self._unstepped.stepped()
            self.learner.observe(scaler=getattr(trainer.precision_plugin, "scaler", None))
            self._observed = True

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if optimizer is self._counted:
            self._depth = max(self._depth - 1, 0)
            if self._depth:
                return
        if self._observed:
            self._observed = False
            self.learner.after_step(stepped=not overflowed(optimizer))

    def _drop_skipped(self) -> None:
        self._depth = 0
        if self._observed:  # and the optimizer was not called: the scaler found an overflow
            self._observed = False
            self.learner.after_step(stepped=False)

    def _reset(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._counted = [], None
        self._drop_skipped()
