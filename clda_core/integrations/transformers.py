"""transformers: a callback of its ``Trainer`` that steps, saves and resumes the learner."""

from __future__ import annotations

import os
from typing import Any, Optional

import torch
from transformers import TrainerCallback

from .._host.accelerate import AcceleratedWatch, accelerated
from ..checkpoint import atomically, pack, read, unpack
from ..errors import problem
from ..learner import CollaborativeLearner
from ._engine import Steps, check_trains

__all__ = ["CollaborationCallback"]
__dir__ = __all__.copy  # as of every other public module, see clda_core/__init__.py

_FILE = "clda.pt"


class CollaborationCallback(TrainerCallback):
    """Steps the learner with the Trainer's optimizer.

    The Trainer's ``compute_loss`` adds ``learner.distill(...)`` to its loss; the callback does the rest, whatever the
    precision, the clipping and the accumulation: it observes before the optimizer steps, counts the step unless it was
    skipped, and writes learner and teacher to ``clda.pt`` in each checkpoint's folder.

    Args:
        learner: The learner, whose student is the Trainer's model.
        resume_from: The checkpoint's folder when the Trainer resumes from one outside its ``output_dir``.

    Note:
        The teacher is moved to the student's device. If the loss trains the teacher along under fp16, leave
        ``max_grad_norm`` on: its clipping is what unscales the gradients.

    Warns:
        UserWarning: If no optimizer step is seen in an epoch, or in 100 steps of the Trainer.
    """

    def __init__(self, learner: CollaborativeLearner, *, resume_from: Optional[str] = None) -> None:
        self.learner = learner
        self.resume_from = resume_from
        self._watch: Optional[AcceleratedWatch] = None
        self._steps = Steps(
            learner,
            "If your Trainer has a training loop of its own, call learner.observe() before and learner.after_step() "
            "after the optimizer's step there, and leave the callback out",
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the teacher, and restore it and the learner if the Trainer resumes.

        Raises:
            CldaError: If the Trainer trains something else than the student, or it resumes, and there is no
                ``clda.pt`` to go on from, or it does not fit.
        """
        self._end(made=False)
        if kwargs.get("model") is not None:
            check_trains(kwargs["model"], kwargs.get("optimizer"), self.learner)
        self._steps.begin()
        self.learner.teacher.to(next(self.learner.student.parameters()).device)
        if not state.global_step:
            return
        path = os.path.join(self.resume_from or _folder(args, state), _FILE)
        if not os.path.isfile(path):
            raise problem(
                "the Trainer resumes, and the teacher cannot",
                expected=path,
                received="no such file",
                fix="pass the checkpoint's folder as resume_from= to the callback",
            )
        unpack(self.learner, read(path))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe; gradients are complete and clipped here."""
        self._end(made=False)  # a step that raised
        optimizer = kwargs.get("optimizer")
        engines = accelerated(optimizer)
        self._steps.observe(optimizer, scaler=None if engines is None else engines.scaler)
        self._watch = None if engines is None else AcceleratedWatch(optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step, unless it was skipped, and make a round if one is due."""
        self._end(made=self._watch is None or self._watch.stepped())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so if no step is ever seen."""
        self._steps.after_batch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so if no step was seen."""
        self._steps.warn()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write learner and teacher beside the student."""
        if state.is_world_process_zero:
            with atomically(os.path.join(_folder(args, state), _FILE)) as unfinished:
                torch.save(pack(self.learner), unfinished)

    def _end(self, made: bool) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._steps.end(made)


def _folder(args: Any, state: Any) -> str:
    return os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
