"""One stage of the digits job: train one network, with or without a learner, so that it can be interrupted anywhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Dict, List, Optional

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clda_core.checkpoint import pack, unpack

from . import ranks
from .checkpoint import Checkpoint
from .digits_data import LabelledImages, TargetEvaluation, UnlabelledImages
from .self_training import Batches, HostEma, forward, self_training_loss, set_learning_rate, source_loss

MakeLearner = Callable[[nn.Module, nn.Module], Any]
"""Builds the learner from the teacher and the student."""


@dataclass(frozen=True)
class Task:
    """What every stage shares: data without target labels, the settings of whichever host, and the evaluation."""

    source: LabelledImages
    target: UnlabelledImages
    evaluation: TargetEvaluation
    host: Any
    steps: int
    evaluate_every: int
    progress: bool = True

    def evaluates_after(self, step: int) -> bool:
        """Return whether the accuracy is measured after a step, counted from 0."""
        return (step + 1) % self.evaluate_every == 0 or step + 1 == self.steps


@dataclass
class Stage:
    """What a stage measured.

    Attributes:
        accuracy: The trained network's accuracy on the target, in percent.
        teacher_before: The teacher's before the stage; ``None`` where there is no teacher.
        teacher_after: The teacher's after it.
        curve: By step: the network's and the teacher's accuracy, and the loss.
        seconds: Training alone, and evaluation alone.
        uses_teacher: Whether the learner was there and enabled.
        metrics: ``learner.metrics()`` at the end.
        report: ``learner.report().to_dict()`` at the end, empty without a learner.
        table: The same as a printed table.
    """

    accuracy: float
    teacher_before: Optional[float]
    teacher_after: Optional[float]
    curve: List[Dict[str, Any]]
    seconds: Dict[str, float]
    uses_teacher: bool = False
    metrics: Dict[str, float] = field(default_factory=dict)
    report: Dict[str, Any] = field(default_factory=dict)
    table: str = ""


class HostAlone:
    """Stands where the learner does while the teacher itself is trained: the host's loop, nothing added."""

    teacher = nn.Module()  # an empty one: there is nothing to save

    def distill(self, logits: Tensor, images: Tensor, **_: Any) -> float:
        return 0.0

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def observe(self) -> None:
        pass

    def after_step(self, **_: Any) -> None:
        pass

    def metrics(self) -> Dict[str, float]:
        return {}

    def state_dict(self) -> Dict[str, Any]:
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        pass


def train(
    name: str,
    model: nn.Module,
    task: Task,
    *,
    seed: int,
    teacher: Optional[nn.Module] = None,
    make_learner: Optional[MakeLearner] = None,
    checkpoint: Optional[Checkpoint] = None,
) -> Stage:
    """Train ``model`` in place by self-training, as a student of ``teacher`` if there is one.

    Args:
        name: Shown at the progress bar.
        model: The network to train.
        task: Data and settings.
        seed: Of the batches; equal seeds give the same batches and views in the same order.
        teacher: Updated in place where the learner does so.
        make_learner: Called with the teacher and the model, before the first step.
        checkpoint: Where to save every ``evaluate_every`` steps; what is saved there is continued.
    """
    batches = Batches(task.source, task.target, task.host, seed)
    learner = HostAlone() if teacher is None or make_learner is None else make_learner(teacher, model)  # CLDA 1 of 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.host.learning_rate, weight_decay=task.host.weight_decay)
    host_ema = HostEma(model, task.host.ema_decay)
    log = Log(task.evaluation, model, teacher)
    state = checkpoint.load() if checkpoint is not None else None
    start = 0
    if state is not None:
        rest = unpack(learner, state, model=model, host_ema=host_ema, optimizer=optimizer, log=log)  # CLDA 2 of 5
        start = rest["step"]
        torch.set_rng_state(rest["rng"])

    model.train()
    parallel = ranks.averaging_gradients(model)
    began = time.perf_counter()
    for step in progress(name, start, task):
        set_learning_rate(optimizer, task.host.learning_rate, step, task.steps)
        batch = ranks.part(batches[step])
        source_logits, target_logits = forward(parallel, batch)
        target_weight = task.host.target_weight_at(step, task.steps)
        loss = self_training_loss(source_logits, target_logits, batch, host_ema, target_weight)
        loss = loss + learner.distill(  # CLDA 3 of 5
            target_logits, batch.target, view=batch.target_strong, source_loss=partial(source_loss, batch)
        )
        optimizer.zero_grad()
        loss.backward()
        learner.step(optimizer)  # CLDA 4 of 5, instead of optimizer.step()
        host_ema.update(model)

        if task.evaluates_after(step):
            ranks.share_buffers(model)
            log.add(step + 1, float(loss.detach()), learner.metrics(), time.perf_counter() - began)
            if checkpoint is not None and ranks.first():
                state = {"model": model, "host_ema": host_ema, "optimizer": optimizer, "log": log}
                state.update(step=step + 1, rng=torch.get_rng_state())
                checkpoint.save(pack(learner, **state))  # CLDA 5 of 5
            began = time.perf_counter()
    return log.stage(learner)


class Log:
    """Accuracies over the steps of one stage; part of a checkpoint, so that a resumed run has the whole curve."""

    def __init__(self, evaluation: TargetEvaluation, model: nn.Module, teacher: Optional[nn.Module]) -> None:
        self.evaluation, self.model, self.teacher = evaluation, model, teacher
        self.curve: List[Dict[str, Any]] = []
        self.seconds = {"training": 0.0, "evaluation": 0.0}
        # Kept here because a learner's gauges of the last step are no part of its state.
        self.metrics: Dict[str, float] = {}
        self._add(0, None)

    def add(self, step: int, loss: float, metrics: Dict[str, float], seconds: float) -> None:
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise FloatingPointError(f"the loss became {loss} by step {step}; lower the host's learning rate")
        self.seconds["training"] += seconds
        self.metrics = dict(metrics)
        self._add(step, loss)

    def _add(self, step: int, loss: Optional[float]) -> None:
        began = time.perf_counter()
        accuracy = self.evaluation.accuracy(self.model)
        of_teacher = None if self.teacher is None else self.evaluation.accuracy(self.teacher)
        self.curve.append({"step": step, "accuracy": accuracy, "teacher": of_teacher, "loss": loss})
        self.seconds["evaluation"] += time.perf_counter() - began

    def stage(self, learner: Any) -> Stage:
        first, last = self.curve[0], self.curve[-1]
        stage = Stage(last["accuracy"], first["teacher"], last["teacher"], self.curve, self.seconds)
        if not isinstance(learner, HostAlone):
            report = learner.report()
            stage.uses_teacher = bool(getattr(learner, "enabled", True))
            stage.metrics, stage.report, stage.table = self.metrics, report.to_dict(), str(report)
        return stage

    def state_dict(self) -> Dict[str, Any]:
        return {"curve": self.curve, "seconds": self.seconds, "metrics": self.metrics}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.curve, self.seconds, self.metrics = state["curve"], state["seconds"], state["metrics"]


def progress(name: str, start: int, task: Task) -> Any:
    """Return the steps from ``start`` on, with a bar for people and a line now and then for logs."""
    # Where nobody watches, a line every few seconds is enough for a log.
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        range(start, task.steps),
        desc=name,
        initial=start,
        total=task.steps,
        unit="step",
        mininterval=interval,
        disable=not task.progress,
    )
