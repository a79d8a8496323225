"""What a benchmark is to the comparison: networks, a host that trains any of them, and an evaluation."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Callable, Dict, Iterator

import torch
from torch import Tensor, nn


@dataclass
class HostLoss:
    """What the host computes in a step.

    Attributes:
        loss: The host's own loss, with its graph.
        output: Returns the network's output, with its graph, on the view of the target that it is trained on.
        images: The target images as the teacher is to see them.
        view: Another view of them, the labels of which are the same position by position: changed in colour or masked.
        source: The source images.
        source_loss: From a network to its supervised loss on the source batch.
    """

    loss: Tensor
    output: Callable[[], Tensor]
    images: Tensor
    view: Tensor
    source: Tensor
    source_loss: Callable[[nn.Module], Tensor]


class Host(ABC):
    """Trains one network by UDA; a step is ``loss``, the caller's optimizer step, ``after_step``."""

    model: nn.Module
    ema: nn.Module

    @abstractmethod
    def loss(self, step: int, steps: int) -> HostLoss:
        """Return the losses of a step, counted from 0; it depends on the seed and the step only."""

    @abstractmethod
    def after_step(self) -> None:
        """Update the host EMA."""


class Task(ABC):
    """A benchmark.

    Attributes:
        name: As on the command line.
        metric: Name of the figure that is compared, in percent.
        steps: Optimizer steps of a student.
        teacher_steps: Optimizer steps of the teacher before that.
        learning_rate: Of AdamW, at its peak, for every network.
        dense: Whether logits have positions.
        related: Whether the student's layers have the shapes of the teacher's, so that it can start from them.
    """

    name: str
    metric: str
    steps: int
    teacher_steps: int
    learning_rate: float
    dense: bool
    related: bool = True

    @abstractmethod
    def teacher(self, seed: int) -> nn.Module:
        """Return the teacher's network, untrained."""

    @abstractmethod
    def student(self, seed: int) -> nn.Module:
        """Return the student's network, untrained."""

    @abstractmethod
    def host(self, model: nn.Module, seed: int, stream: int) -> Host:
        """Return a host for a network; equal seeds and streams see equal batches."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Dict[str, float]:
        """Return figures on labelled target data, the metric among them; modes are as before afterwards."""

    def setting(self) -> str:
        """Return what records are comparable by: the task and its sizes."""
        return f"{self.name}-{self.teacher_steps}-{self.steps}"

    def teacher_setting(self) -> str:
        """Return what trained teachers are shared by: tasks that differ in the student alone have the same teachers."""
        return self.setting()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Give the model in eval mode and without gradients; its modes are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Rise over 5% of the steps, then fall to zero by a cosine."""
    rising = min(1.0, (step + 1) / max(1.0, 0.05 * steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * rising * 0.5 * (1.0 + math.cos(math.pi * step / steps))
