"""transformers: a callback of its ``Trainer`` that steps, saves and resumes the learner."""

from __future__ import annotations

import os
from typing import Any, Optional

import torch
from transformers import TrainerCallback

from .._compat import load_plain
from .._stepping import StepWatch
from ..checkpoint import atomically
from ..errors import problem
from ..learner import CollaborativeLearner

__all__ = ["CollaborationCallback"]

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
    """

    def __init__(self, learner: CollaborativeLearner, *, resume_from: Optional[str] = None) -> None:
        self.learner = learner
        self.resume_from = resume_from
        self._watch: Optional[StepWatch] = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the teacher, and restore it and the learner if the Trainer resumes.

        Raises:
            CldaError: If the Trainer resumes, and there is no ``clda.pt`` to go on from.
        """
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
        saved = load_plain(path)
        self.learner.load_state_dict(saved["learner"])
        self.learner.teacher.load_state_dict(saved["teacher"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe; gradients are complete and clipped here."""
        optimizer = kwargs.get("optimizer")
        self.learner.observe(scaler=getattr(optimizer, "scaler", None))
        self._watch = StepWatch(optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step, unless it was skipped, and make a round if one is due."""
        self.learner.after_step(stepped=self._watch is None or self._watch.stepped())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write learner and teacher beside the student."""
        if state.is_world_process_zero:
            with atomically(os.path.join(_folder(args, state), _FILE)) as unfinished:
                both = {"learner": self.learner.state_dict(), "teacher": self.learner.teacher.state_dict()}
                torch.save(both, unfinished)


def _folder(args: Any, state: Any) -> str:
    return os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
