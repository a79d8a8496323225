"""One training of one network by its host, as somebody's student or alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn

from benchmarks.evidence.task import Host, Task, set_learning_rate
from clda_core import CollaborativeLearner, Report
from clda_core.saliency import PseudoLabelCrossEntropy
from clda_core.selection import DomainShift


@dataclass
class Cotraining:
    """The host going on to train the teacher too, between rounds.

    Attributes:
        host: Of the teacher.
        learning_rate: At its peak; the teacher has converged once already.
    """

    host: Host
    learning_rate: float


def train(
    task: Task,
    host: Host,
    *,
    steps: int,
    learning_rate: Optional[float] = None,
    learner: Optional[CollaborativeLearner] = None,
    cotraining: Optional[Cotraining] = None,
    evaluations: int = 4,
    view: bool = True,
    look: Optional[Callable[[int], None]] = None,
    looks: int = 0,
) -> Dict[str, Any]:
    """Train ``host.model`` in place; return the curve, seconds and the learner's report.

    Args:
        task: For its learning rate and evaluation.
        host: Of the network to train.
        steps: Optimizer steps.
        learning_rate: At its peak; the task's by default.
        learner: Whose student is ``host.model``.
        cotraining: Of the learner's teacher.
        evaluations: Points on the curve.
        view: Whether the learner gets the host's second view.
        look: Called with the number of steps made, ``looks`` times, the last time at the end; it may only read.
        looks: How often.
    """
    peak = task.learning_rate if learning_rate is None else learning_rate
    optimizer = torch.optim.AdamW(host.model.parameters(), lr=peak, weight_decay=0.01)
    of_teacher = None
    if cotraining is not None:
        cotraining.host.model.train()
        parameters = cotraining.host.model.parameters()
        of_teacher = torch.optim.AdamW(parameters, lr=cotraining.learning_rate, weight_decay=0.01)
    teacher = None if learner is None else learner.teacher
    curve: List[Dict[str, Any]] = []
    seconds, of_steps, in_rounds = 0.0, [], []
    host.model.train()
    for step in range(steps):
        began, began_processor = time.perf_counter(), busy_seconds(host.model)
        busy = learner is not None and (learner.observing or learner.schedule.due(step + 1))
        set_learning_rate(optimizer, peak, step, steps)
        of_host = host.loss(step, steps)
        loss = of_host.loss
        if learner is not None:
            given = {"view": of_host.view if view else None, "source_loss": of_host.source_loss}
            loss = loss + learner.distill(of_host.output(), of_host.images, **given)
        optimizer.zero_grad()
        loss.backward()
        if learner is not None and learner.observing and isinstance(learner.selection, DomainShift):
            learner.observe(probing(of_host.source), domain="source")
        if learner is None:
            optimizer.step()
        elif cotraining is None or of_teacher is None:
            learner.step(optimizer)
        else:
            set_learning_rate(of_teacher, cotraining.learning_rate, step, steps)
            of_teacher.zero_grad()
            cotraining.host.loss(step, steps).loss.backward()
            learner.observe()
            optimizer.step()
            of_teacher.step()
            cotraining.host.after_step()
            learner.after_step(optimizer=optimizer)
        host.after_step()
        seconds += time.perf_counter() - began
        of_steps.append(busy_seconds(host.model) - began_processor)
        in_rounds.append(busy)
        if look is not None and looks * (step + 1) // steps > looks * step // steps:
            look(step + 1)
        if (step + 1) % max(1, steps // evaluations) == 0 or step + 1 == steps:
            curve.append({"step": step + 1, "student": _figure(task, host.model), "teacher": _figure(task, teacher)})
    return {
        "curve": curve,
        "seconds": seconds,
        "processor_seconds": sum(of_steps),
        "overhead": overhead(of_steps, in_rounds),
        "student": task.evaluate(host.model),
        "student_ema": task.evaluate(host.ema),
        "teacher": None if teacher is None else task.evaluate(teacher),
        "rounds": None if learner is None else summary(learner.report()),
        "config": None if learner is None else configuration(learner),
    }


def busy_seconds(model: nn.Module) -> float:
    """Return a clock that other jobs hardly disturb: processor time, or on a GPU the time once its work is done."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def overhead(seconds: Sequence[float], in_rounds: Sequence[bool]) -> Optional[float]:
    """Return how many times longer a run took because some steps were observed or ended with a round.

    Those steps are compared with the others from the first of them on, so that a machine's changing load matters
    little; ``None`` without such steps.
    """
    if not any(in_rounds):
        return None
    first = list(in_rounds).index(True)
    plain = [of for of, busy in zip(seconds[first:], in_rounds[first:]) if not busy]
    if not plain:
        return None
    ratio = (sum(seconds[first:]) / (len(seconds) - first)) / (sum(plain) / len(plain))
    return (first + (len(seconds) - first) * ratio) / len(seconds)


def probing(images: Tensor) -> Callable[[nn.Module], Tensor]:
    """Return the learner's default probe on other images than its own, as a function of the network."""
    probe = PseudoLabelCrossEntropy()
    return lambda network: probe(network(images))


def train_on_source(task: Task, host: Host, *, steps: int) -> None:
    """Train ``host.model`` in place on labelled source data alone."""
    optimizer = torch.optim.AdamW(host.model.parameters(), lr=task.learning_rate, weight_decay=0.01)
    host.model.train()
    for step in range(steps):
        set_learning_rate(optimizer, task.learning_rate, step, steps)
        loss = host.loss(step, steps).source_loss(host.model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def configuration(learner: CollaborativeLearner) -> Dict[str, Any]:
    """Return the learner's strategies with their options."""
    return {role: of for role, of in learner.state_dict()["config"].items() if not role.endswith("_layers")}


def summary(report: Report) -> Dict[str, Any]:
    """Return what a record keeps of a report: the rounds, and each layer's mean LSR and number of updates."""
    rates = {
        layer: [record.rates[layer] for record in report.rounds if layer in record.rates] for layer in report.layers
    }
    return {
        "made": len(report.rounds),
        "accepted": sum(bool(record.updated) for record in report.rounds),
        "updates": {layer: sum(layer in record.updated for record in report.rounds) for layer in report.layers},
        "rates": {layer: round(sum(values) / len(values), 4) for layer, values in rates.items() if values},
    }


def _figure(task: Task, model: Optional[nn.Module]) -> Optional[float]:
    return None if model is None else task.evaluate(model)[task.metric]
