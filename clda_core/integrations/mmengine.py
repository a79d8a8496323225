"""mmengine: a hook that builds, steps, logs, saves and resumes the learner, for mmsegmentation 1.x and others."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional, Union

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import load_checkpoint
from torch import nn

from .._host.stepping import StepWatch
from ..checkpoint import pack, unpack
from ..errors import problem
from ..learner import CollaborativeLearner
from ..schedule import Schedule
from ._engine import Steps, students_optimizer

__all__ = ["CollaborationHook"]
__dir__ = __all__.copy  # as of every other public module, see clda_core/__init__.py


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
        learner: The learner, once the run has begun; it stays for further runs of the same model.

    Warns:
        UserWarning: If no optimizer step is seen in an epoch, or in 100 iterations; and if a training resumes from a
            checkpoint without ``clda``.
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
        self._steps: Optional[Steps] = None

    def before_run(self, runner: Any) -> None:
        """Build the learner, give it to the model, and step it where the wrapper steps.

        Raises:
            CldaError: If there are several optimizers, or the optimizer holds no parameter of the model.
        """
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper):
            return  # the runner tests
        if isinstance(wrapper, OptimWrapperDict):
            raise problem(
                "CollaborationHook cannot tell which optimizer trains the student",
                expected="one OptimWrapper",
                received=f"OptimWrapperDict of {', '.join(wrapper.keys())}",
                fix="give the config one optim_wrapper, with paramwise_cfg= for parts that differ",
            )
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if self.learner is None or self.learner.student is not model:
            self.learner = model.learner = self._built(model)
        self._take_off(wrapper)  # left by a run that an exception ended
        students_optimizer([wrapper.optimizer], self.learner)
        self._steps = Steps(
            self.learner,
            "If the model's train_step steps the optimizer itself, let it call optim_wrapper.update_params() or "
            "optim_wrapper.step()",
        )
        self._steps.begin()
        wrapper.step = partial(_step, self._steps, wrapper, wrapper.step)

    def _built(self, model: nn.Module) -> CollaborativeLearner:
        teacher = self.teacher
        if not isinstance(teacher, nn.Module):
            with torch.random.fork_rng(devices=[]):  # the student's weights are drawn after this
                teacher = MODELS.build(teacher)
        if self.checkpoint is not None:
            load_checkpoint(teacher, self.checkpoint, map_location="cpu")
        teacher.to(next(model.parameters()).device).requires_grad_(False).eval()
        schedule = Schedule(**self.schedule) if isinstance(self.schedule, Mapping) else self.schedule
        return CollaborativeLearner(teacher, model, schedule=schedule, **self.options)

    def after_run(self, runner: Any) -> None:
        """Give the wrapper its own ``step`` back."""
        self._take_off(runner.optim_wrapper)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Optional[Dict[str, Any]] = None
    ) -> None:
        """Write the metrics to the message hub, from where the runner's loggers take them."""
        if self._steps is not None:
            self._steps.after_batch(getattr(runner.optim_wrapper, "_accumulative_counts", 1))
        if self.learner is not None and self.every_n_train_iters(runner, self.log_interval):
            for name, value in self.learner.metrics().items():
                runner.message_hub.update_scalar(f"train/{name}", value)

    def after_train_epoch(self, runner: Any) -> None:
        """Say so if no step was seen."""
        if self._steps is not None:
            self._steps.warn()

    def before_save_checkpoint(self, runner: Any, checkpoint: Dict[str, Any]) -> None:
        """Put learner and teacher into the checkpoint."""
        if self.learner is not None:
            checkpoint["clda"] = pack(self.learner)

    def after_load_checkpoint(self, runner: Any, checkpoint: Dict[str, Any]) -> None:
        """Restore both, or neither.

        Raises:
            CldaError: If one of the two does not fit.
        """
        if self.learner is None:
            return
        if "clda" in checkpoint:
            unpack(self.learner, checkpoint["clda"])
        elif getattr(runner, "_resume", False) and self.learner.enabled:
            warnings.warn(
                "the training resumes, and its checkpoint holds no state of CollaborationHook: the learner starts from "
                "step 0, with the teacher that the config gives",
                stacklevel=2,
            )

    @staticmethod
    def _take_off(wrapper: Any) -> None:
        step = vars(wrapper).get("step") if isinstance(wrapper, OptimWrapper) else None
        if isinstance(step, partial) and step.func is _step:
            del wrapper.step


def _step(steps: Steps, wrapper: OptimWrapper, step: Callable[..., Any], **kwargs: Any) -> None:
    steps.observe(wrapper.optimizer, scaler=getattr(wrapper, "loss_scaler", None))
    made = False
    try:
        with StepWatch(wrapper.optimizer) as watch:
            step(**kwargs)
        made = watch.stepped()
    finally:
        steps.end(made)
