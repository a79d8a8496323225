"""mmengine: a hook that builds, steps, logs, saves and resumes the learner, for mmsegmentation 1.x and others."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional, Union

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import load_checkpoint
from torch import nn

from .._stepping import watching
from ..learner import CollaborativeLearner
from ..schedule import Schedule

__all__ = ["CollaborationHook"]


@HOOKS.register_module()
class CollaborationHook(Hook):
    """Steps the learner with the runner's ``OptimWrapper``.

    The model's ``loss`` adds ``self.learner.distill(...)`` to its losses; the hook does the rest, whatever the
    precision, the clipping and the accumulation: it gives the model its ``learner``, steps that where the wrapper steps
    the optimizer, unless the scaler skips the step, writes the metrics to the message hub, and puts learner and teacher
    into the checkpoint, under ``clda``.

    Args:
        teacher: The teacher, or its config; it is frozen, put into eval mode and moved to the model's device.
        checkpoint: A file with the teacher's weights.
        schedule: Arguments of :class:`~clda_core.Schedule`, as a config has them, or a schedule.
        log_interval: Iterations between two writings of the metrics.
        options: Further arguments of :class:`~clda_core.CollaborativeLearner`.

    Attributes:
        learner: The learner, once the run has begun.
    """

    priority = "LOW"  # after EMAHook, which copies the model

    def __init__(
        self,
        teacher: Union[nn.Module, Mapping[str, Any]],
        *,
        checkpoint: Optional[str] = None,
        schedule: Any = None,
        log_interval: int = 10,
        **options: Any,
    ) -> None:
        self.teacher = teacher
        self.checkpoint = checkpoint
        self.schedule = schedule
        self.log_interval = log_interval
        self.options = options
        self.learner: Optional[CollaborativeLearner] = None

    def before_run(self, runner: Any) -> None:
        """Build the learner, give it to the model, and step it where the wrapper steps."""
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper):
            return  # the runner tests
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        teacher = self.teacher
        if not isinstance(teacher, nn.Module):
            with torch.random.fork_rng(devices=[]):  # the student's weights are drawn after this
                teacher = MODELS.build(teacher)
        if self.checkpoint is not None:
            load_checkpoint(teacher, self.checkpoint, map_location="cpu")
        teacher.to(next(model.parameters()).device).requires_grad_(False).eval()
        schedule = Schedule(**self.schedule) if isinstance(self.schedule, Mapping) else self.schedule
        self.learner = model.learner = CollaborativeLearner(teacher, model, schedule=schedule, **self.options)
        wrapper.step = partial(_step, self.learner, wrapper, wrapper.step)

    def after_run(self, runner: Any) -> None:
        """Give the wrapper its own ``step`` back."""
        if self.learner is not None:
            del runner.optim_wrapper.step

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Optional[Dict[str, Any]] = None
    ) -> None:
        """Write the metrics to the message hub, from where the runner's loggers take them."""
        if self.learner is not None and self.every_n_train_iters(runner, self.log_interval):
            for name, value in self.learner.metrics().items():
                runner.message_hub.update_scalar(f"train/{name}", value)

    def before_save_checkpoint(self, runner: Any, checkpoint: Dict[str, Any]) -> None:
        """Put learner and teacher into the checkpoint."""
        if self.learner is not None:
            both = {"learner": self.learner.state_dict(), "teacher": self.learner.teacher.state_dict()}
            checkpoint["clda"] = both

    def after_load_checkpoint(self, runner: Any, checkpoint: Dict[str, Any]) -> None:
        """Restore them."""
        if self.learner is not None and "clda" in checkpoint:
            self.learner.load_state_dict(checkpoint["clda"]["learner"])
            self.learner.teacher.load_state_dict(checkpoint["clda"]["teacher"])


def _step(learner: CollaborativeLearner, wrapper: OptimWrapper, step: Callable[..., Any], **kwargs: Any) -> None:
    learner.observe(scaler=getattr(wrapper, "loss_scaler", None))
    with watching(wrapper.optimizer) as stepped:
        learner.step(step_fn=partial(step, **kwargs), stepped=stepped)
