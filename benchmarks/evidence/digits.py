"""Fonts to real handwritten digits, residual networks with BatchNorm, self-training: the job of the examples."""

from __future__ import annotations

from functools import lru_cache
from typing import Dict

import torch.nn.functional as F
from torch import nn

from benchmarks.evidence.task import Host, HostLoss, Task
from examples.classification.digits_data import LabelledImages, source_digits, target_digits
from examples.classification.digits_models import BIG, SMALL, residual_network
from examples.classification.self_training import Batches, HostEma, SelfTraining, forward, self_training_loss


class DigitsHost(Host):
    def __init__(self, model: nn.Module, batches: Batches, settings: SelfTraining) -> None:
        self.model, self.batches, self.settings = model, batches, settings
        self.host_ema = HostEma(model, settings.ema_decay)
        self.ema = self.host_ema.model

    def loss(self, step: int, steps: int) -> HostLoss:
        batch = self.batches[step]
        source_logits, target_logits = forward(self.model, batch)
        weight = self.settings.target_weight_at(step, steps)
        loss = self_training_loss(source_logits, target_logits, batch, self.host_ema, weight)
        return HostLoss(
            loss,
            output=lambda: target_logits,
            images=batch.target,
            source=batch.images,
            source_loss=lambda model: F.cross_entropy(model(batch.images), batch.labels),
        )

    def after_step(self) -> None:
        self.host_ema.update(self.model)


class Digits(Task):
    name, metric = "digits", "accuracy"
    steps, teacher_steps, learning_rate, warmup, dense = 600, 600, 1e-3, 300, False

    def __init__(self) -> None:
        self.settings = SelfTraining()
        self.target, self.evaluation = target_digits()

    def teacher(self, seed: int) -> nn.Module:
        return residual_network(BIG, seed=5 * seed + 1)

    def student(self, seed: int) -> nn.Module:
        return residual_network(SMALL, seed=5 * seed + 3)

    def host(self, model: nn.Module, seed: int, stream: int) -> Host:
        batches = Batches(_source(5 * seed), self.target, self.settings, 5 * seed + 2 + 2 * stream)
        return DigitsHost(model, batches, self.settings)

    def evaluate(self, model: nn.Module) -> Dict[str, float]:
        return {self.metric: self.evaluation.accuracy(model)}


@lru_cache(maxsize=2)
def _source(seed: int) -> LabelledImages:
    return source_digits(seed)
